"""What a result was measured on: goes into every result file."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

import kdkernels
from kdkernels.backends import native

ROOT = Path(__file__).resolve().parent.parent


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    # Results land beside the sources they measure; a result file of before is no change to them.
    return commit + ("-dirty" if git("status", "--porcelain", "--", "kdkernels", "csrc", "python", "setup.py") else "")


def describe(device: str) -> dict[str, str]:
    """Device, versions, commit and date, as text."""
    info = {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "kdkernels": kdkernels.__version__,
        "commit": _commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    if torch.device(device).type == "cuda":
        info["cuda"] = str(torch.version.cuda)
    elif native.why_not() is None:
        info["instruction set"] = native.capability()
    return info
