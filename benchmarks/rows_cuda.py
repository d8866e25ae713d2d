"""The rows of a GPU: every case of benchmarks.cases, each implementation guarded so that none ends the run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import Case
from benchmarks.contenders import IN_PLACE, Contender, contenders
from benchmarks.environment import describe
from benchmarks.guard import begin_peer, note_failure, release, said
from benchmarks.inputs import DESCRIPTION, Data, draw
from benchmarks.memory import peak_above_now
from benchmarks.peers import Loss
from benchmarks.timing import Call, captured, queued, synchronize, wall_clock

CHECKED_ROWS = 16
TIMING = (
    "CUDA events around each call, queued without waiting in between; the median over all turns. Turns of the "
    "implementations alternate. Small batches: the host's clock over many calls that wait at the end alone, and the "
    "GPU's time for one of the calls captured together in a CUDA graph, over input sets that no cache holds at once. "
    "Peak memory: the allocator's, above the inputs. Gradient error: ‖gradient - exact‖ / ‖exact‖ over "
    f"{CHECKED_ROWS} rows spread over the batch, from the very call that is timed, against the reference in fp64."
)


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``turns`` turns of each implementation, of about ``seconds``, ``most`` calls at most."""

    turns: int = 3
    seconds: float = 0.15
    most: int = 50
    copy_elements: int = 2**29
    small_bytes: int = 200 * 2**20  # input sets of a small case together: four times an H100's L2


FULL = Effort()
QUICK = Effort(turns=2, seconds=0.03, most=20)


@dataclass(frozen=True)
class Job:
    """One implementation at work on one set of inputs."""

    run: Call
    before: Call | None = None  # untimed, ahead of each run
    gradient: Callable[[], Tensor | None] = lambda: None


def prepare(contender: Contender, loss: Loss, data: Data, forward: bool = False) -> Job:
    """The call to time: a step, or the loss alone."""
    student, teacher = data.student, data.teacher
    if forward:
        logits = student.detach()

        @torch.no_grad()
        def loss_alone() -> object:
            return loss(logits, teacher)

        return Job(loss_alone)
    if contender.name == IN_PLACE:
        # The logits of a model are the output of an operation; here that of a view, which costs nothing.
        work = student.detach().clone().requires_grad_()

        @torch.no_grad()
        def restore() -> None:
            work.grad = None
            work.copy_(student)

        def step_in_place() -> Tensor:
            value = data.ours(work.view_as(work), teacher, inplace=True)
            value.backward()
            return value.detach()

        return Job(step_in_place, restore, lambda: work.grad)

    def step() -> Tensor:
        student.grad = None
        value = loss(student, teacher)
        value.backward()
        return value.detach()

    return Job(step, None, lambda: student.grad)


def _loss(contender: Contender, data: Data) -> Loss:
    if contender.make is not None:
        return contender.make(data)
    if contender.backend is None and kd.backends.choose(data.student.device, data.student.dtype) == "reference":
        raise RuntimeError(f"no kernels of kdkernels serve {data.student.device}")
    return data.ours


class Exact:
    """In fp64: the gradient of a few rows spread over the batch, the loss of all of it, or both."""

    def __init__(self, data: Data, *, loss: bool = False, gradient: bool = True) -> None:
        leading = data.student.shape[:-1]
        counted = leading.numel() if data.labels is None else int((data.labels != -100).sum())
        self.loss = exact_loss(data) / counted if loss else None
        self.gradient = None
        if gradient:
            rows = torch.linspace(0, leading.numel() - 1, min(CHECKED_ROWS, leading.numel())).long()
            self.index = torch.unravel_index(rows.to(data.student.device), leading)
            few = data.rows(*self.index)
            student = few.student.double().requires_grad_()
            self.gradient = torch.autograd.grad(few.exact(student), student)[0] / counted

    def errors(self, loss: object, gradient: Tensor | None) -> dict[str, float]:
        """Relative errors of what was asked for; NaN of a gradient that is not there."""
        found = {}
        if self.loss is not None:
            found["loss_error"] = abs(float(loss) - self.loss) / abs(self.loss)  # type: ignore[arg-type]
        if self.gradient is not None:
            found["gradient_error"] = math.nan
            if gradient is not None:
                error = (gradient[self.index].double() - self.gradient).norm() / self.gradient.norm()
                found["gradient_error"] = float(error)
        return found


def exact_loss(data: Data) -> float:
    """The sum of the losses of the whole batch in fp64, some rows at a time."""
    parts = [data.rows(slice(start, start + 64)) for start in range(0, len(data.student), 64)]
    return float(torch.stack([part.exact(part.student.double()) for part in parts]).sum())


def _entrants(case: Case, data: Data, without: tuple[str, ...]) -> list[tuple[str, Contender, Data]]:
    found = [(contender.name, contender, data) for contender in contenders(case, without)]
    if case.kind == "view":
        copy = data.contiguous()
        found += [(f"{name}, contiguous", contender, copy) for name, contender, _ in found]
    return found


def measure(case: Case, device: str, effort: Effort, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """A line per implementation of the case's field."""
    data = draw(case, device)
    forward = case.kind == "forward"
    exact = Exact(data, loss=forward, gradient=not forward)
    return measure_in_turns(_entrants(case, data, without), exact, device, effort, forward=forward)


def measure_in_turns(
    entrants: Sequence[tuple[str, Contender, Data]],
    exact: Exact,
    device: str,
    effort: Effort,
    *,
    forward: bool = False,
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """A line per implementation: time, peak memory, error of the gradient; or what kept it from running.

    Args:
        entrants: the name of each line, who runs, on what.
        deadline: peers that would begin later are left out.
    """
    lines: list[dict[str, Any]] = []
    jobs: dict[int, tuple[Contender, Job, int]] = {}
    for name, contender, inputs in entrants:
        line: dict[str, Any] = {"implementation": name, "timed": contender.timed}
        lines.append(line)
        try:
            if contender.make is not None:
                begin_peer(deadline)
            with contender.context():
                job = prepare(contender, _loss(contender, inputs), inputs, forward)
                if contender.name == IN_PLACE:
                    line["backend"] = kd.backends.choose(inputs.student.device, inputs.student.dtype)
                line |= exact.errors(_warm_up(job, device), job.gradient())
                line["peak_mib"] = _peak_mib(job, inputs, device)
                pace = max(1e-3, statistics.median(queued(job.run, device, 1, job.before)))
            jobs[len(lines) - 1] = contender, job, max(3, min(effort.most, int(1e3 * effort.seconds / pace)))
        except Exception as error:
            note_failure(line, error)
        inputs.student.grad = None
    _take_turns(jobs, lines, device, effort)
    return lines


def _warm_up(job: Job, device: str) -> object:
    """What the first call returned."""
    if job.before is not None:
        job.before()
    value = job.run()
    synchronize(device)
    return value


def _peak_mib(job: Job, data: Data, device: str) -> float | None:
    data.student.grad = None
    if job.before is not None:
        job.before()
    peak = peak_above_now(job.run, device)
    return None if peak is None else peak / 2**20


def _take_turns(
    jobs: dict[int, tuple[Contender, Job, int]], lines: list[dict[str, Any]], device: str, effort: Effort
) -> None:
    times: dict[int, list[float]] = {number: [] for number in jobs}
    for _ in range(effort.turns):
        for number, (contender, job, count) in jobs.items():
            if "error" in lines[number]:
                continue
            try:
                with contender.context():
                    times[number] += queued(job.run, device, count, job.before)
            except Exception as error:
                lines[number]["error"] = said(error)
    for number, values in times.items():
        if values and "error" not in lines[number]:
            low, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.75])).tolist()
            lines[number] |= {
                "milliseconds": statistics.median(values),
                "quartiles": [low, high],
                "calls": len(values),
            }


def measure_small(case: Case, device: str, effort: Effort, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Few rows: a whole call by the host's clock, and the GPU's part of it under a CUDA graph."""
    sets = max(2, -(-effort.small_bytes // (case.bytes * 2 // 3)))
    drawn = draw(replace(case, rows=case.rows * sets), device)
    exact = None
    lines = []
    for contender in contenders(case, without):
        line: dict[str, Any] = {"implementation": contender.name, "timed": contender.timed, "input_sets": sets}
        lines.append(line)
        data = [
            Data(student.detach().requires_grad_(), teacher, None, drawn.divergence)
            for student, teacher in zip(drawn.student.split(case.rows), drawn.teacher.split(case.rows), strict=True)
        ]
        exact = exact or Exact(data[0])
        try:
            with contender.context():
                loss = _loss(contender, data[0])
                jobs = [prepare(contender, loss, one) for one in data]
                line |= exact.errors(_warm_up(jobs[0], device), jobs[0].gradient())
                line["peak_mib"] = _peak_mib(jobs[0], data[0], device)
                runs = [job.run for job in jobs]
                walls = [wall_clock(runs, device, effort.seconds) for _ in range(effort.turns)]
                line["milliseconds"] = statistics.median(walls)
                line |= _under_a_graph(runs, data, device, effort)
        except Exception as error:
            line["error"] = said(error)
        del data
        release()
    return lines


def _under_a_graph(runs: Sequence[Call], data: Sequence[Data], device: str, effort: Effort) -> dict[str, Any]:
    if torch.device(device).type != "cuda":
        return {"graph_ms": None, "graph_error": f"no CUDA graphs on {device}"}
    for one in data:
        one.student.grad = None
    try:
        return {"graph_ms": captured(runs, effort.most)}
    except Exception as error:
        return {"graph_ms": None, "graph_error": said(error)}


def copy_speed(device: str, effort: Effort) -> float:
    """Bytes read and written in a second by copying one large bf16 tensor over another; a median of many copies."""
    source = torch.randn(effort.copy_elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    times = queued(lambda: target.copy_(source), device, 20)
    return 2 * source.numel() * source.element_size() / (1e-3 * statistics.median(times))


def time_a_copy(copy: dict[str, Any], device: str, effort: Effort) -> None:
    """One more speed of a copy for a result file, or what kept it from being measured."""
    release()
    try:
        copy["bytes_per_second"].append(copy_speed(device, effort))
    except Exception as error:
        copy["error"] = said(error)
    release()


def add_limits(result: dict[str, Any]) -> None:
    """The time that the bytes of each case take at the run's best copy speed, and what of it each line reaches."""
    speeds = result["copy"]["bytes_per_second"]
    best = max(speeds) if speeds else math.nan
    for entry in result["results"]:
        if "bytes" not in entry:
            continue
        entry["limit_ms"] = 1e3 * entry["bytes"] / best
        for line in entry["rows"]:
            spent = line.get("graph_ms") or line.get("milliseconds")
            line["fraction_of_limit"] = None if spent is None else entry["limit_ms"] / spent


def _progress(title: str, entry: dict[str, Any], started: float) -> None:
    def cell(line: dict[str, Any]) -> str:
        said = f"{line['milliseconds']:.3f} ms" if "milliseconds" in line else line.get("error", "nothing")[:60]
        return f"{line['implementation']} {said}"

    text = "; ".join(map(cell, entry["rows"])) or entry.get("error", "")
    print(f"[{time.perf_counter() - started:4.0f} s] {title}: {text}", flush=True)


def run(
    cases: Sequence[Case],
    device: str = "cuda",
    effort: Effort = FULL,
    *,
    without: tuple[str, ...] = (),
    commit: str | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Every case, with what it was measured on. ``keep`` is given the unfinished result after each."""
    started = time.perf_counter()
    result: dict[str, Any] = {
        "benchmark": "rows, CUDA",
        "complete": False,
        "environment": describe(device, commit),
        "inputs": DESCRIPTION,
        "timing": TIMING,
        "effort": asdict(effort),
        "copy": {"bytes_per_second": [], "elements": effort.copy_elements},
        "results": [],
    }

    width = None
    for case in cases:
        if case.width != width:
            width = case.width
            time_a_copy(result["copy"], device, effort)
        entry: dict[str, Any] = {"case": asdict(case), "title": case.title, "bytes": case.bytes, "rows": []}
        result["results"].append(entry)
        try:
            torch._dynamo.reset()
            chosen = measure_small if case.kind == "small" else measure
            entry["rows"] = chosen(case, device, effort, without)
        except Exception as error:
            entry["error"] = said(error)
        release()
        _progress(case.title, entry, started)
        add_limits(result)
        keep(result)
    time_a_copy(result["copy"], device, effort)
    add_limits(result)
    result["complete"] = True
    result["seconds"] = time.perf_counter() - started
    keep(result)
    return result
