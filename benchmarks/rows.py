"""Rows: logits in, loss and gradient out, against eager PyTorch, torch.compile and the memory's own speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import Case
from benchmarks.environment import describe
from benchmarks.inputs import Data, draw
from benchmarks.losses import FAMILY
from benchmarks.memory import peak_above_now
from benchmarks.peers import Loss, eager
from benchmarks.timing import medians

IN_PLACE = "kdkernels, in place"
CHECKED_ROWS = 8


@dataclass(frozen=True)
class Row:
    """One implementation's line of a table."""

    implementation: str
    milliseconds: float
    peak_mib: float | None
    gradient_error: float


def copy_milliseconds(case: Case, device: str, rounds: int) -> float:
    """Time of copying one matrix of logits into memory that is there already: two passes over it."""
    source = torch.randn(case.rows, case.width, device=device).to(getattr(torch, case.dtype))
    target = torch.empty_like(source)
    return medians({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]


def _step(loss: Loss, student: Tensor, teacher: Tensor) -> Callable[[], None]:
    def step() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return step


def _step_in_place(data: Data) -> Callable[[], None]:
    # The logits of a model are the output of an operation; here that of a view, which costs nothing.
    leaf = data.student.detach().clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        logits = leaf.view_as(leaf)
        kd.distillation_loss(logits, data.teacher, data.labels, divergence=data.divergence, inplace=True).backward()

    return step


def _implementations(case: Case, data: Data) -> dict[str, Loss]:
    """Every implementation by the name it has in the tables; decoupled losses without torch.compile."""
    losses = {"eager": eager(data.divergence, data.labels)}
    if case.divergence not in FAMILY:
        losses["torch.compile"] = eager(data.divergence, data.labels, compiled=True)
    losses["kdkernels"] = lambda student, teacher: kd.distillation_loss(
        student, teacher, data.labels, divergence=data.divergence
    )
    return losses


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Every implementation of one case: time, peak memory, error of the gradient; and the time of a copy."""
    data = draw(case, device)
    few = data.rows(slice(0, CHECKED_ROWS))
    student = data.student
    losses = _implementations(case, data)
    steps = {name: _step(loss, student, data.teacher) for name, loss in losses.items()}
    errors = {name: gradient_error(loss, few) for name, loss in _implementations(case, few).items()}
    steps[IN_PLACE] = _step_in_place(data)
    errors[IN_PLACE] = errors["kdkernels"]
    times = medians(steps, device, rounds)
    lines = []
    for name, step in steps.items():
        student.grad = None
        peak = peak_above_now(step, device)
        lines.append(Row(name, times[name], None if peak is None else peak / 2**20, errors[name]))
    return {
        "case": asdict(case),
        "title": case.title,
        "copy_ms": copy_milliseconds(case, device, rounds),
        "rows": [asdict(line) for line in lines],
    }


def add_limits(results: list[dict[str, Any]]) -> None:
    """The limit of each case, three passes over a matrix at the speed of the run's fastest copy of that dtype."""
    for entry in results:
        same = [other["copy_ms"] for other in results if other["case"]["dtype"] == entry["case"]["dtype"]]
        entry["limit_ms"] = 3 / 2 * min(same)
        for row in entry["rows"]:
            row["fraction_of_limit"] = entry["limit_ms"] / row["milliseconds"]


def gradient_error(loss: Loss, few: Data) -> float:
    """‖gradient - exact‖ / ‖exact‖ over a few rows, exact by the reference in fp64."""
    student, exact = few.student.clone().requires_grad_(), few.student.double().requires_grad_()
    loss(student, few.teacher).backward()
    kd.reference.distillation_loss(exact, few.teacher.double(), few.labels, divergence=few.divergence).backward()
    assert student.grad is not None
    assert exact.grad is not None
    return float((student.grad.double() - exact.grad).norm() / exact.grad.norm())


def run(cases: Sequence[Case], device: str, rounds: int) -> dict[str, Any]:
    """These cases, with what they were measured on."""
    results = []
    for case in cases:
        print(f"measuring {case.title} …", flush=True)
        torch._dynamo.reset()
        results.append(measure(case, device, rounds))
    add_limits(results)
    return {"benchmark": "rows", "environment": describe(device), "rounds": rounds, "results": results}
