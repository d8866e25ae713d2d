"""Peak memory of one call, above what is allocated when it begins."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def _proc_status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, field
    return int(match[1]) * 1024


def _trim() -> None:
    """Has the C library give freed memory back, which it keeps of blocks up to 32 MiB."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_above_now(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes at the peak of ``call`` above those in use before it; None where the system does not tell.

    On a CUDA device the allocator's peak; else the process's resident set, whose peak Linux lets a process reset.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _proc_status("VmRSS")
    call()
    return max(0, _proc_status("VmHWM") - before)
