"""What lets a run go on after an implementation failed."""

from __future__ import annotations

import gc
from contextlib import suppress

import torch


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def release() -> None:
    """Gives memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(Exception):
            torch.cuda.empty_cache()
