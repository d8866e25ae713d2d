"""What lets a run go on after an implementation failed."""

from __future__ import annotations

import gc
import math
import time
from contextlib import suppress
from typing import Any

import torch


class TimeIsUp(RuntimeError):
    """A peer was not begun, since the run had taken its time."""


def begin_peer(deadline: float = math.inf) -> None:
    """
    Args:
        deadline: on the clock of ``time.perf_counter``.

    Raises:
        TimeIsUp: it is over.
    """
    if time.perf_counter() > deadline:
        raise TimeIsUp("not begun, since the run had taken its time")


def note_failure(line: dict[str, Any], error: Exception) -> None:
    """Says in an implementation's line why it has no figures, and whether it was never begun."""
    line["error"] = said(error)
    if isinstance(error, TimeIsUp):
        line["left_out"] = True


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
