"""Rows: logits in, loss and gradient out, against eager PyTorch, torch.compile and the memory's own speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.environment import describe
from benchmarks.memory import peak_above_now
from benchmarks.peers import EAGER, Loss, implementations
from benchmarks.timing import medians

IN_PLACE = "kdkernels, in place"


@dataclass(frozen=True)
class Case:
    """One table: a divergence on random logits of one shape and dtype (all cases of a run have one shape)."""

    rows: int
    width: int
    dtype: str
    divergence: str


@dataclass(frozen=True)
class Row:
    """One implementation's line of a table."""

    implementation: str
    milliseconds: float
    peak_mib: float | None
    gradient_error: float


def cases(rows: int, width: int) -> list[Case]:
    wanted = [(dtype, name) for dtype in ("float32", "bfloat16") for name in EAGER]
    return [Case(rows, width, dtype, name) for dtype, name in wanted]


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


def _step_in_place(case: Case, student: Tensor, teacher: Tensor) -> Callable[[], None]:
    # The logits of a model are the output of an operation; here that of a view, which costs nothing.
    leaf = student.detach().clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        kd.distillation_loss(leaf.view_as(leaf), teacher, divergence=case.divergence, inplace=True).backward()

    return step


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Every implementation of one case: time, peak memory, error of the gradient; and the time of a copy."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    student = torch.randn(case.rows, case.width, device=device).to(dtype).requires_grad_()
    teacher = torch.randn(case.rows, case.width, device=device).to(dtype)
    losses = implementations(case.divergence)
    steps = {name: _step(loss, student, teacher) for name, loss in losses.items()}
    errors = {name: gradient_error(case, loss, student, teacher) for name, loss in losses.items()}
    steps[IN_PLACE] = _step_in_place(case, student, teacher)
    errors[IN_PLACE] = errors["kdkernels"]
    times = medians(steps, device, rounds)
    student.grad = None
    lines = []
    for name, step in steps.items():
        student.grad = None
        peak = peak_above_now(step, device)
        lines.append(Row(name, times[name], None if peak is None else peak / 2**20, errors[name]))
    return {
        "case": asdict(case),
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


def gradient_error(case: Case, loss: Loss, student: Tensor, teacher: Tensor, checked_rows: int = 8) -> float:
    """‖gradient - exact‖ / ‖exact‖ over a few rows, exact by the reference in fp64."""
    few = student.detach()[:checked_rows].clone().requires_grad_()
    loss(few, teacher[:checked_rows]).backward()
    exact = few.detach().double().requires_grad_()
    kd.reference.distillation_loss(exact, teacher[:checked_rows].double(), divergence=case.divergence).backward()
    assert few.grad is not None
    assert exact.grad is not None
    return float((few.grad.double() - exact.grad).norm() / exact.grad.norm())


def run(device: str, rows: int, width: int, rounds: int) -> dict[str, Any]:
    """All cases, with what they were measured on."""
    results = []
    for case in cases(rows, width):
        print(f"measuring {case.divergence}, {case.dtype}, {case.rows} × {case.width} …", flush=True)
        torch._dynamo.reset()
        results.append(measure(case, device, rounds))
    add_limits(results)
    return {"benchmark": "rows", "environment": describe(device), "rounds": rounds, "results": results}
