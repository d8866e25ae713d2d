"""Hidden states and lm_head weights in, loss and gradients out; no implementation that fails ends the run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.environment import describe
from benchmarks.guard import begin_peer, note_failure, release, said
from benchmarks.linear_cases import DIVERGENCES, Case
from benchmarks.linear_inputs import CHECKED_ROWS, CHECKED_TOKENS, DESCRIPTION, Data, Exact, draw
from benchmarks.linear_peers import BARE, BARE_OF_STUDENT, BARE_TIMED, SHORT, Contender, contenders, ours
from benchmarks.memory import peak_above_now
from benchmarks.timing import queued

Line = dict[str, Any]

TIMING = (
    "Forward and backward with the gradients of the student's hidden states and weight, fresh each time. CUDA events "
    "around each call, queued without waiting in between; the median. One implementation after another, all memory "
    "freed in between; the four products alone are timed before each of them, and count with the median of all those "
    "calls; they run for a second and a half before the first, so that nobody is timed on a cool GPU. Peak memory: "
    "the allocator's, above the inputs, so the gradients are in it. Errors: ‖gradient - exact‖ / ‖exact‖ of the first "
    f"call, over {CHECKED_ROWS} rows of dX and {CHECKED_TOKENS} of dW spread over the batch and the vocabulary; for "
    "accuracy over all of both; exact from materialised logits in fp64."
)
TIMING_CPU = (
    "Forward and backward with the gradients of the student's hidden states and weight, fresh each time; medians of "
    "calls in several turns. Peak memory: the process's resident set, above the inputs, so the gradients are in it. "
    f"Errors as ‖gradient - exact‖ / ‖exact‖ over {CHECKED_ROWS} rows of dX and {CHECKED_TOKENS} of dW, exact in fp64."
)


@dataclass(frozen=True)
class Effort:
    """How long to measure: calls for about ``seconds`` a turn, at least ``least``, at most ``most``; peers that would
    begin after ``minutes`` are left out. On a GPU the bare products run for ``warm_seconds`` first."""

    turns: int = 1
    seconds: float = 0.4
    least: int = 5
    most: int = 20
    bare_calls: int = 3
    warm_seconds: float = 1.5
    minutes: float = 4.0

    def count(self, pace_ms: float) -> int:
        return max(self.least, min(self.most, int(1e3 * self.seconds / max(pace_ms, 1e-3))))


FULL = Effort()
DIVERGENCE_TURNS = 5
ON_CPU = Effort(turns=3, seconds=0.5, least=3, most=10)


def bare(data: Data, device: str, calls: int) -> list[float]:
    """Milliseconds of the products alone: both models' logits (the student's where the teacher has none), dX, dW."""
    with torch.no_grad():
        hidden, weight = data.student_hidden.detach(), data.student_weight.detach()
        gradient = torch.randn(len(hidden), len(weight), device=device, dtype=hidden.dtype)
        student = torch.empty_like(gradient)
        teacher = torch.empty_like(gradient) if isinstance(data.teacher, kd.LinearTeacher) else None
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

        def products() -> None:
            torch.mm(hidden, weight.T, out=student)
            if teacher is not None:
                torch.mm(data.teacher_hidden, data.teacher_weight.T, out=teacher)
            torch.mm(gradient, weight, out=hidden_gradient)
            torch.mm(gradient.T, hidden, out=weight_gradient)

        if torch.device(device).type == "cpu":
            products()
        return queued(products, device, calls)


def warm(data: Data, device: str, effort: Effort) -> None:
    """A GPU at work is hotter, and slower, than one that has waited."""
    if torch.device(device).type == "cuda":
        pace = statistics.median(bare(data, device, 3))
        bare(data, device, int(1e3 * effort.warm_seconds / pace))
        release()


@dataclass(frozen=True)
class Job:
    """One implementation at work on one set of inputs, its line of the table and the milliseconds of its calls."""

    line: Line
    step: Callable[[], Tensor]
    times: list[float]


def _step(contender: Contender, data: Data) -> Callable[[], Tensor]:
    loss = contender.make(data)

    def step() -> Tensor:
        data.forget_gradients()
        value = loss()
        value.backward()
        return value.detach()

    return step


def _begin(contender: Contender, deadline: float) -> None:
    if not contender.ours:
        begin_peer(deadline)
    if contender.compiles:
        torch._dynamo.reset()


def _line(contender: Contender) -> Line:
    return {
        "implementation": contender.name,
        "curve": contender.curve,
        "size": contender.size,
        "timed": contender.timed,
        "rounds_logits": contender.rounds,
    }


def measure(
    data: Data, flops: int, field: Sequence[Contender], device: str, effort: Effort, deadline: float
) -> list[Line]:
    """A line per implementation: time, peak memory, errors; or what kept it from running. First the bare products.

    ``flops`` are theirs.
    """
    exact = Exact(data)
    release()
    warm(data, device, effort)
    lines, jobs = [], []
    products: list[float] = []
    for contender in field:
        line = _line(contender)
        lines.append(line)
        try:
            _begin(contender, deadline)
            products += bare(data, device, effort.bare_calls)
            release()
            job = Job(line, _step(contender, data), [])
            line |= exact.errors(data, job.step())
            if contender.ours:
                line["backend"] = kd.backends.choose(data.student_hidden.device, data.student_hidden.dtype)
            data.forget_gradients()
            release()
            peak = peak_above_now(job.step, device)
            line["peak_mib"] = None if peak is None else peak / 2**20
            pace = statistics.median(queued(job.step, device, 1))
            job.times.extend(queued(job.step, device, effort.count(pace)))
            jobs.append(job)
        except Exception as error:
            note_failure(line, error)
        data.forget_gradients()
        release()
    for _ in range(effort.turns - 1):
        _another_turn(jobs, data, device, effort)
        products += bare(data, device, effort.bare_calls)
    name = BARE if isinstance(data.teacher, kd.LinearTeacher) else BARE_OF_STUDENT
    return _with_times(name, flops, lines, jobs, products)


def _another_turn(jobs: Sequence[Job], data: Data, device: str, effort: Effort) -> None:
    for job in jobs:
        try:
            job.step()
            job.times.extend(queued(job.step, device, effort.count(statistics.median(job.times))))
        except Exception as error:
            note_failure(job.line, error)
        data.forget_gradients()
        release()


def _with_times(name: str, flops: int, lines: list[Line], jobs: Sequence[Job], products: list[float]) -> list[Line]:
    found = [(job.line, job.times) for job in jobs if "error" not in job.line]
    if products:
        lines = [{"implementation": name, "curve": name, "size": "", "timed": BARE_TIMED[name]}, *lines]
        found.append((lines[0], products))
    for line, times in found:
        spent = statistics.median(times)
        low, high = torch.tensor(times).quantile(torch.tensor([0.25, 0.75])).tolist()
        line |= {"milliseconds": spent, "quartiles": [low, high], "calls": len(times)}
        line |= {"teraflops": flops / spent / 1e9, "over_bare": spent / statistics.median(products)}
    return lines


def measure_accuracy(case: Case, field: Sequence[Contender], device: str, deadline: float) -> list[Line]:
    """A line per implementation: its errors by the noise between the models. First the exact gradients' rounding."""
    drawn = {f"{noise:g}": draw(case, device, noise) for noise in case.noises}
    exact = {noise: Exact(data, rows=None, tokens=None) for noise, data in drawn.items()}
    dtype = getattr(torch, case.dtype)
    lines: list[Line] = [
        {
            "implementation": f"exact, rounded to {SHORT[case.dtype]}",
            "timed": "not timed: the exact gradients rounded to the operands' dtype",
            "errors": {noise: gradients.rounded(dtype) for noise, gradients in exact.items()},
        }
    ]
    for contender in field:
        line = _line(contender)
        lines.append(line)
        try:
            _begin(contender, deadline)
            errors = {noise: exact[noise].errors(data, _step(contender, data)()) for noise, data in drawn.items()}
            line["errors"] = errors
        except Exception as error:
            note_failure(line, error)
        for data in drawn.values():
            data.forget_gradients()
        release()
    return lines


def measure_divergences(case: Case, device: str, effort: Effort) -> list[Line]:
    """Our milliseconds for every divergence, in turns."""
    data = draw(case, device)
    warm(data, device, effort)
    times: dict[str, list[float]] = {name: [] for name in DIVERGENCES}
    for _ in range(DIVERGENCE_TURNS):
        for name, divergence in DIVERGENCES.items():
            step = _step(ours(case.logits[0]), replace(data, divergence=divergence))
            step()
            times[name] += queued(step, device, effort.bare_calls)
    medians = {name: statistics.median(of_name) for name, of_name in times.items()}
    return [
        {
            "implementation": name,
            "timed": "kd.linear_distillation_loss, the default workspace; all divergences in turns",
            "divergence_ms": spent,
            "over_forward_kl": spent / medians["forward_kl"],
        }
        for name, spent in medians.items()
    ]


def measure_ignored(case: Case, device: str, effort: Effort) -> list[Line]:
    """Our milliseconds by the part of the tokens that counts for nothing: all rows multiplied, and those that count."""
    data = draw(case, device)
    lines: list[Line] = []
    for compact in (False, True):
        timed = f"kd.linear_distillation_loss(compact={compact}), labels ignored at random"
        line: Line = {"implementation": f"compact={compact}", "timed": timed, "by_ignored": {}}
        lines.append(line)
        for part in case.ignored:
            ignored = torch.rand(case.rows, generator=torch.Generator().manual_seed(1)) < part
            labels = torch.where(ignored, -100, 0).to(device)
            step = _step(ours(case.logits[0], labels=labels, compact=compact), data)
            step()
            line["by_ignored"][f"{part:g}"] = statistics.median(queued(step, device, effort.most))
        data.forget_gradients()
        release()
    return lines


def _cells(entry: dict[str, Any]) -> Iterator[str]:
    for line in entry["rows"]:
        if "milliseconds" in line:
            peak = f", {line['peak_mib']:.0f} MiB" if line.get("peak_mib") is not None else ""
            errors = f", {line['hidden_error']:.1e} {line['weight_error']:.1e}" if "hidden_error" in line else ""
            yield f"{line['implementation']} {line['milliseconds']:.2f} ms{peak}{errors}"
        elif "error" in line:
            yield f"{line['implementation']}: {line['error'][:100]}"
        elif "divergence_ms" in line:
            yield f"{line['implementation']}: {line['divergence_ms']:.2f} ms, {line['over_forward_kl']:.3f}"
        elif "by_ignored" in line:
            yield f"{line['implementation']}: {' '.join(f'{ms:.2f}' for ms in line['by_ignored'].values())} ms"
        else:
            errors = " ".join(f"{at['hidden_error']:.1e}" for at in line["errors"].values())
            yield f"{line['implementation']}: {errors}"
    if "error" in entry:
        yield entry["error"]


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
        "benchmark": "linear",
        "complete": False,
        "environment": describe(device, commit),
        "inputs": DESCRIPTION,
        "timing": TIMING_CPU if torch.device(device).type == "cpu" else TIMING,
        "results": [],
    }
    for case in cases:
        entry: dict[str, Any] = {"case": asdict(case), "title": case.title, "rows": []}
        result["results"].append(entry)
        field = contenders(case, device, words, without)
        try:
            if case.kind == "divergences":
                entry["rows"] = measure_divergences(case, device, effort)
            elif case.kind == "ignored":
                entry["rows"] = measure_ignored(case, device, effort)
            elif case.kind == "accuracy":
                entry["rows"] = measure_accuracy(case, field, device, deadline)
            else:
                entry["rows"] = measure(draw(case, device), case.flops, field, device, effort, deadline)
        except Exception as error:
            entry["error"] = said(error)
        release()
        print(f"[{time.perf_counter() - started:4.0f} s] {case.title}", *_cells(entry), sep="\n    ", flush=True)
        keep(result)
    result["complete"] = True
    result["seconds"] = time.perf_counter() - started
    keep(result)
    return result
