"""What a result was measured on: goes into every result file."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

import kdkernels
from kdkernels.backends import native

ROOT = Path(__file__).resolve().parent.parent

PEER_PACKAGES = ("triton", "liger-kernel", "speculators", "trl", "fla-core")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.machine()


def _output(*command: str) -> str:
    """What a command prints; "" where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    # Results land beside the sources they measure; a result file of before is no change to them.
    changed = _output("git", "status", "--porcelain", "--", "kdkernels", "csrc", "python", "setup.py")
    return commit + ("-dirty" if changed else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {package: version for package in packages if (version := _version(package))}


def describe(device: str, commit: str | None = None, packages: Sequence[str] = ()) -> dict[str, str]:
    """Device, versions, also of ``packages``, commit (``commit``, or that of the checkout) and date, as text."""
    info = {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "kdkernels": kdkernels.__version__,
        "commit": commit or _commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    if torch.device(device).type == "cuda":
        info["cuda"] = str(torch.version.cuda)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        info["driver"] = driver.splitlines()[0] if driver else "unknown"
        info |= _versions(PEER_PACKAGES)
    elif native.why_not() is None:
        info["instruction set"] = native.capability()
    return info | _versions(packages)
