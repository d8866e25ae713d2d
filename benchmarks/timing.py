"""Time of one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

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


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def queued(call: Call, device: str, count: int, before: Call | None = None) -> list[float]:
    """Milliseconds of each of ``count`` calls, queued behind an untimed one without waiting for any.

    So a GPU is seen at work and not waiting for Python, which is ahead of it as in training; what a call makes the
    host wait for still counts. ``before`` runs untimed ahead of each call.
    """
    if torch.device(device).type != "cuda":
        times = []
        for _ in range(count):
            if before is not None:
                before()
            times.append(_once(call, device))
        return times
    if before is not None:
        before()
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        if before is not None:
            before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def wall_clock(calls: Sequence[Call], device: str, seconds: float) -> float:
    """Milliseconds of one call as the host's clock sees it, over rounds of ``calls`` that wait at the end alone."""

    def rounds(count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            for call in calls:
                call()
        synchronize(device)
        return time.perf_counter() - start

    count = max(1, min(1000, int(seconds / max(rounds(1), 1e-6))))
    return 1e3 * rounds(count) / (count * len(calls))


def captured(calls: Sequence[Call], replays: int) -> float:
    """Milliseconds of one of ``calls``, captured one after another in a CUDA graph: the GPU's own share of a call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = queued(graph.replay, "cuda", replays)
    return statistics.median(times) / len(calls)
