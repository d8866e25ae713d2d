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
from benchmarks.guard import release, said
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


def prepare(case: Case, contender: Contender, loss: Loss, data: Data) -> Job:
    """The call to time."""
    student, teacher = data.student, data.teacher
    if case.kind == "forward":
        logits = student.detach()

        @torch.no_grad()
        def forward() -> object:
            return loss(logits, teacher)

        return Job(forward)
    if contender.name == IN_PLACE:
        # The logits of a model are the output of an operation; here that of a view, which costs nothing.
        work = student.detach().clone().requires_grad_()

        @torch.no_grad()
        def restore() -> None:
            work.grad = None
            work.copy_(student)

        def step_in_place() -> None:
            logits = work.view_as(work)
            kd.distillation_loss(logits, teacher, data.labels, divergence=data.divergence, inplace=True).backward()

        return Job(step_in_place, restore, lambda: work.grad)

    def step() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return Job(step, None, lambda: student.grad)


def _loss(contender: Contender, data: Data) -> Loss:
    if contender.make is not None:
        return contender.make(data)
    if contender.backend is None and kd.backends.choose(data.student.device, data.student.dtype) == "reference":
        raise RuntimeError(f"no kernels of kdkernels serve {data.student.device}")
    return lambda student, teacher: kd.distillation_loss(student, teacher, data.labels, divergence=data.divergence)


class Exact:
    """The fp64 gradient of a few rows spread over the batch."""

    def __init__(self, case: Case, data: Data) -> None:
        leading = data.student.shape[:-1]
        rows = torch.linspace(0, case.rows - 1, min(CHECKED_ROWS, case.rows)).long()
        self.index = torch.unravel_index(rows.to(data.student.device), leading)
        few = data.rows(*self.index)
        student = few.student.double().requires_grad_()
        counted = case.rows if data.labels is None else int((data.labels != -100).sum())
        loss = kd.reference.distillation_loss(
            student, few.teacher.double(), few.labels, divergence=few.divergence, reduction="sum"
        )
        self.gradient = torch.autograd.grad(loss, student)[0] / counted

    def error(self, gradient: Tensor) -> float:
        return float((gradient[self.index].double() - self.gradient).norm() / self.gradient.norm())


def exact_loss(case: Case, data: Data) -> float:
    """The loss of the whole batch in fp64, some rows at a time."""
    parts = [data.rows(slice(start, start + 64)) for start in range(0, len(data.student), 64)]
    losses = [
        kd.reference.distillation_loss(
            part.student.double(), part.teacher.double(), part.labels, divergence=part.divergence, reduction="sum"
        )
        for part in parts
    ]
    return float(torch.stack(losses).sum()) / case.rows


def _entrants(case: Case, data: Data, without: tuple[str, ...]) -> list[tuple[str, Contender, Data]]:
    found = [(contender.name, contender, data) for contender in contenders(case, without)]
    if case.kind == "view":
        copy = data.contiguous()
        found += [(f"{name}, contiguous", contender, copy) for name, contender, _ in found]
    return found


def measure(case: Case, device: str, effort: Effort, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """A line per implementation: time, peak memory, error of the gradient; or what kept it from running."""
    data = draw(case, device)
    exact = None if case.kind == "forward" else Exact(case, data)
    value = exact_loss(case, data) if exact is None else math.nan
    lines: list[dict[str, Any]] = []
    jobs: dict[int, tuple[Contender, Job, int]] = {}
    for name, contender, inputs in _entrants(case, data, without):
        line: dict[str, Any] = {"implementation": name, "timed": contender.timed}
        lines.append(line)
        try:
            with contender.context():
                job = prepare(case, contender, _loss(contender, inputs), inputs)
                if contender.name == IN_PLACE:
                    line["backend"] = kd.backends.choose(inputs.student.device, inputs.student.dtype)
                _warm_up(job, device)
                if exact is None:
                    line["loss_error"] = abs(float(job.run()) - value) / abs(value)  # type: ignore[arg-type]
                else:
                    gradient = job.gradient()
                    line["gradient_error"] = math.nan if gradient is None else exact.error(gradient)
                    del gradient
                line["peak_mib"] = _peak_mib(job, inputs, device)
                pace = max(1e-3, statistics.median(queued(job.run, device, 1, job.before)))
            jobs[len(lines) - 1] = contender, job, max(3, min(effort.most, int(1e3 * effort.seconds / pace)))
        except Exception as error:
            line["error"] = said(error)
        inputs.student.grad = None
    _take_turns(jobs, lines, device, effort)
    return lines


def _warm_up(job: Job, device: str) -> None:
    if job.before is not None:
        job.before()
    job.run()
    synchronize(device)


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
        exact = exact or Exact(case, data[0])
        try:
            with contender.context():
                loss = _loss(contender, data[0])
                jobs = [prepare(case, contender, loss, one) for one in data]
                _warm_up(jobs[0], device)
                gradient = jobs[0].gradient()
                line["gradient_error"] = math.nan if gradient is None else exact.error(gradient)
                del gradient
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


def add_limits(result: dict[str, Any]) -> None:
    """The time that the bytes of each case take at the run's best copy speed, and what of it each line reaches."""
    speeds = result["copy"]["bytes_per_second"]
    best = max(speeds) if speeds else math.nan
    for entry in result["results"]:
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

    def time_a_copy() -> None:
        release()
        try:
            result["copy"]["bytes_per_second"].append(copy_speed(device, effort))
        except Exception as error:
            result["copy"]["error"] = said(error)
        release()

    width = None
    for case in cases:
        if case.width != width:
            width = case.width
            time_a_copy()
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
    time_a_copy()
    add_limits(result)
    result["complete"] = True
    result["seconds"] = time.perf_counter() - started
    keep(result)
    return result
