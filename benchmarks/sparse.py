"""A sparse teacher's losses, from logits and from hidden states; no implementation that fails ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import linear, rows_cuda, sparse_peers
from benchmarks.environment import describe
from benchmarks.guard import release, said
from benchmarks.linear_inputs import CHECKED_ROWS as CHECKED_HIDDEN
from benchmarks.linear_inputs import CHECKED_TOKENS
from benchmarks.rows_cuda import CHECKED_ROWS, Exact, add_limits, measure_in_turns, time_a_copy
from benchmarks.sparse_cases import Case
from benchmarks.sparse_inputs import DESCRIPTION, draw, draw_hidden, facts

#: What lines say of errors.
ERRORS = ("loss_error", "gradient_error", "hidden_error", "weight_error")
TIMING = (
    "CUDA events around each call (on a CPU its clock), queued without waiting in between; medians. From logits: turns "
    "of the implementations alternate. From hidden states: one implementation after another, all memory freed in "
    "between; the three products alone are timed before each of them, and count with the median of all those calls. "
    "Peak memory: the allocator's (on a CPU the process's resident set), above the inputs. Errors against the "
    "reference in fp64, of the call that is timed: of the loss over all rows, of the gradient ‖gradient - exact‖ / "
    f"‖exact‖ over {CHECKED_ROWS} rows spread over the batch, or over {CHECKED_HIDDEN} rows of dX and {CHECKED_TOKENS} "
    "of dW."
)


@dataclass(frozen=True)
class Effort:
    """How long to measure; peers that would begin after ``minutes`` are left out."""

    logits: rows_cuda.Effort = field(default_factory=lambda: rows_cuda.Effort(seconds=0.1))
    hidden: linear.Effort = field(default_factory=lambda: linear.Effort(seconds=0.3, warm_seconds=1.0))
    minutes: float = 1.5


FULL = Effort()
QUICK = Effort(rows_cuda.QUICK, linear.Effort(seconds=0.1, warm_seconds=0.5))
ON_CPU = Effort(rows_cuda.Effort(seconds=0.3, most=10, copy_elements=2**24), linear.ON_CPU, minutes=4.0)
QUICK_ON_CPU = Effort(rows_cuda.Effort(turns=2, seconds=0.1, most=5, copy_elements=2**24), linear.ON_CPU)


def measure(
    case: Case, device: str, effort: Effort, deadline: float, words: Sequence[str], without: Sequence[str]
) -> dict[str, Any]:
    """What an entry says of a case: its inputs, and a line per implementation."""
    if case.kind == "hidden":
        operands = draw_hidden(case, device)
        ids, logprobs = operands.teacher[:2]
        who = sparse_peers.of_hidden(case, words, without)
        return {"teacher": facts(ids, logprobs)} | {
            "rows": linear.measure(operands, case.flops, who, device, effort.hidden, deadline)
        }
    data = draw(case, device)
    entrants = [(one.name, one, data) for one in sparse_peers.of_logits(case, device, words, without)]
    exact = Exact(data, loss=True)
    release()
    return {"bytes": case.bytes, "teacher": facts(data.ids, data.teacher)} | {
        "rows": measure_in_turns(entrants, exact, device, effort.logits, deadline=deadline)
    }


def _cells(entry: dict[str, Any]) -> list[str]:
    cells = [entry["error"]] if "error" in entry else []
    for line in entry["rows"]:
        cell = f"{line['implementation']}: {line.get('error', 'nothing')[:100]}"
        if "milliseconds" in line and "error" not in line:
            cell = f"{line['implementation']} {line['milliseconds']:.3f} ms"
            if line.get("fraction_of_limit") is not None:
                cell += f", {100 * line['fraction_of_limit']:.1f} % of the limit"
            if "over_bare" in line:
                cell += f", {line['over_bare']:.2f}× the products"
            if line.get("peak_mib") is not None:
                cell += f", {line['peak_mib']:.0f} MiB"
            cell += "".join(f", {line[key]:.1e}" for key in ERRORS if key in line)
        cells.append(cell)
    return cells


def run(
    cases: Sequence[Case],
    device: str = "cuda",
    effort: Effort = FULL,
    *,
    words: Sequence[str] = (),
    without: Sequence[str] = (),
    commit: str | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Every case, with what it was measured on. ``keep`` is given the unfinished result after each."""
    started = time.perf_counter()
    deadline = started + 60 * effort.minutes
    result: dict[str, Any] = {
        "benchmark": "sparse",
        "complete": False,
        "environment": describe(device, commit),
        "inputs": DESCRIPTION,
        "timing": TIMING,
        "effort": asdict(effort),
        "copy": {"bytes_per_second": [], "elements": effort.logits.copy_elements},
        "results": [],
    }
    time_a_copy(result["copy"], device, effort.logits)
    for case in cases:
        entry: dict[str, Any] = {"case": asdict(case), "title": case.title, "rows": []}
        result["results"].append(entry)
        torch._dynamo.reset()
        try:
            entry |= measure(case, device, effort, deadline, words, without)
        except Exception as error:
            entry["error"] = said(error)
        release()
        add_limits(result)
        print(f"[{time.perf_counter() - started:4.0f} s] {case.title}", *_cells(entry), sep="\n    ", flush=True)
        keep(result)
    time_a_copy(result["copy"], device, effort.logits)
    add_limits(result)
    result["complete"] = True
    result["seconds"] = time.perf_counter() - started
    keep(result)
    return result
