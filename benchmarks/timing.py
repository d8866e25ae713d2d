"""Time of one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def _once(call: Call, device: str) -> float:
    """Milliseconds of one call."""
    if torch.device(device).type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start_s)


def medians(calls: Mapping[str, Call], device: str, rounds: int, blocks: int = 3, warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of each call, over ``blocks`` turns of ``rounds`` calls in a row.

    In a row, so that each is measured in the state it keeps itself in (an allocation that comes back to the same
    memory); in turns, so that a slow moment of the machine meets everyone.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            for _ in range(warmup):
                call()
            times[name] += [_once(call, device) for _ in range(rounds)]
    return {name: statistics.median(values) for name, values in times.items()}
