"""A real distillation, from the text to the table: `python examples/distill.py`.

A byte-pair tokenizer and a Llama teacher are trained on text that every Python ships with. Then students of a quarter
of the teacher's size learn the same text: one from hard labels alone, the others also from the teacher's distribution
over the whole vocabulary. The loss of these is `kdkernels.LinearDistillationLoss`: it takes both models' hidden states
and heads, and forms logits a chunk of tokens at a time. The teacher takes more steps than a student, as teachers do:
part of what it passes on comes from text that no student reads.

One more student learns without a teacher at its side. While the others train, a few tokens of the teacher's
distribution at each position are written to a file: the likeliest, or with --file draws, tokens drawn from it. That
student has nothing but this file and the text.

The students differ in nothing but the loss: same shape, same initial weights, same learning rate, the same batches in
the same order (those with the teacher side by side, so that one pass of the teacher's blocks serves them all). What is
held out are whole documents, and neither the tokenizer nor a model has seen them. The work is counted in steps, not in
minutes, so that a run can be repeated.

At the end: held-out loss of all models, and what head and loss cost in time and memory against eager PyTorch; plots and
the numbers as JSON lie in --output: distillation.png, and decoupled.png with the terms of the decoupled divergence step
by step; so does the teacher's file. On a GPU the same command uses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Corpus, load_corpus
from loss_cost import Cost, Objective, measure
from report import HARD_LABELS, Curve, Results, TeacherFile
from terms import TermRecorder, Terms
from torch import Tensor, nn
from tqdm import tqdm
from training import (
    Batch,
    Loss,
    Rates,
    Shape,
    Trainer,
    build_model,
    compute_hidden,
    count_parameters,
    hard_label_loss,
    head_weight,
    held_out_batches,
    held_out_loss,
    product_dtype,
    random_batches,
)

import kdkernels as kd

TEACHER = Shape(width=256, layers=4, heads=4, mlp_width=768)
STUDENT = Shape(width=96, layers=3, heads=3, mlp_width=256)
TEACHER_RATES = Rates(blocks=2e-3, embedding=1e-2)
STUDENT_RATES = Rates(blocks=4e-3, embedding=8e-3)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and step counts; the defaults take six to seven minutes on two CPU cores."""

    vocab_size: int = 16384
    documents: int | None = None  # only the first so many
    teacher: Shape = TEACHER
    student: Shape = STUDENT
    context: int = 256
    sequences: int = 4
    teacher_steps: int = 320
    steps: int = 180
    teacher_rates: Rates = TEACHER_RATES
    student_rates: Rates = STUDENT_RATES
    curve_points: int = 6
    curve_batches: int = 6
    held_out_batches: int = 32
    cost_runs: int = 5
    seed: int = 0


SMOKE = Settings(
    vocab_size=512,
    documents=40,
    teacher=Shape(width=32, layers=1, heads=2, mlp_width=64),
    student=Shape(width=16, layers=1, heads=1, mlp_width=32),
    context=32,
    sequences=2,
    teacher_steps=4,
    steps=4,
    curve_points=2,
    curve_batches=1,
    held_out_batches=2,
    cost_runs=2,
)

CAKD = "CAKD, top 32"

# Chosen among runs of this demo by the held-out loss that it prints: a demonstration, no comparison of losses. In runs
# this short not every loss beat hard labels: reverse KL, forward KL at temperature 2, Jensen-Shannon alone and skew
# forward KL weighted 0.9 to 0.1 did not; Jensen-Shannon weighted 0.9 to 0.1 hardly did.
# CAKD's weights were the best of four in one shorter run, at a vocabulary of 8192 and 110 steps.
OBJECTIVES = {
    "forward KL": Objective(kd.ForwardKL(), temperature=1.0, kd_weight=0.5, ce_weight=0.5),
    "skew forward KL": Objective(kd.SkewForwardKL(0.1), temperature=1.0, kd_weight=0.5, ce_weight=0.5),
    CAKD: Objective(kd.CAKD(2.0, 0.5, kd.TopK(32)), temperature=1.0, kd_weight=0.5, ce_weight=0.5),
}

FILE_TOKENS = 64  # of a position


@dataclasses.dataclass(frozen=True)
class FileKind:
    """What the teacher writes to its file, and what the student makes of tokens that are not in it."""

    student: str
    choose: Callable[[Tensor], kd.TopKTeacher]  # from logits
    tail: str


FILES = {
    "top": FileKind(
        f"forward KL, top {FILE_TOKENS} from a file", partial(kd.TopKTeacher.from_logits, k=FILE_TOKENS), "bucket"
    ),
    "draws": FileKind(
        f"forward KL, {FILE_TOKENS} draws from a file", partial(kd.TopKTeacher.sample, draws=FILE_TOKENS), "drop"
    ),
}
# Chosen in runs of one seed, too: kd_weight among 0.5, 0.8 and 1, the top's tail among all four (drop at 0.5 alone).
# A third of this teacher's probability is outside its top 64, and at kd_weight 1, without cross-entropy, no student of
# the top came up to hard labels. Draws did better than any of the top, and at all three weights about as well as the
# student beside the whole teacher.
FILE_OBJECTIVE = Objective(kd.ForwardKL(), temperature=1.0, kd_weight=0.8, ce_weight=0.2)


class Stopwatch:
    """Seconds by part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start


def training_batches(
    corpus: Corpus, settings: Settings, steps: int, device: torch.device, title: str
) -> Iterator[tuple[int, Batch, tqdm]]:
    """Steps counted from 1 with their batches, under a progress bar; the order is the same for every model."""
    batches = random_batches(corpus.train, settings.context, settings.sequences, settings.seed)
    with tqdm(range(1, steps + 1), desc=title, unit="step", mininterval=0.5) as bar:
        for step in bar:
            ids, labels = next(batches)
            yield step, (ids.to(device), labels.to(device)), bar


def train_teacher(corpus: Corpus, settings: Settings, device: torch.device) -> nn.Module:
    model = build_model(settings.teacher, corpus.vocab_size, settings.context, settings.seed, device)
    trainer = Trainer(model, settings.teacher_steps, settings.teacher_rates)
    for step, (ids, labels), bar in training_batches(corpus, settings, settings.teacher_steps, device, "teacher"):
        loss = trainer.step(ids, partial(hard_label_loss, labels=labels))
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.2f}")
    return model


def new_student(corpus: Corpus, settings: Settings, device: torch.device) -> Trainer:
    model = build_model(settings.student, corpus.vocab_size, settings.context, settings.seed, device)
    return Trainer(model, settings.steps, settings.student_rates)


def measures_at(step: int, settings: Settings) -> bool:
    """Whether the curves have a point there."""
    return step % max(1, settings.steps // settings.curve_points) == 0 or step == settings.steps


def train_students(
    teacher: nn.Module,
    corpus: Corpus,
    settings: Settings,
    device: torch.device,
    held_out: list[Batch],
    kind: FileKind,
    file: kd.TopKCacheWriter,
) -> tuple[dict[str, nn.Module], dict[str, Curve], Terms]:
    """All students that see the teacher, step by step on the same batches, hard labels first.

    What the file is to hold of the teacher goes there sequence by sequence, in the order of the batches. Returns the
    students, their held-out losses, and the terms of the decoupled divergence at every step.
    """
    objectives: dict[str, Objective | None] = {HARD_LABELS: None, **OBJECTIVES}
    trainers = {name: new_student(corpus, settings, device) for name in objectives}
    curves = {name: Curve([], []) for name in objectives}
    recorder = TermRecorder(OBJECTIVES[CAKD].divergence)
    for step, (ids, labels), bar in training_batches(corpus, settings, settings.steps, device, "students"):
        with torch.no_grad():
            frozen = kd.LinearTeacher(compute_hidden(teacher, ids), head_weight(teacher))
        file.write(kind.choose(teacher_logits(frozen)))
        for name, objective in objectives.items():
            record = recorder.record if name == CAKD else None
            trainers[name].step(ids, student_loss(objective, frozen, labels, record))
        if measures_at(step, settings):
            for name, trainer in trainers.items():
                curves[name].add(step, held_out_loss(trainer.model, held_out, device))
            bar.set_postfix_str("held-out " + " / ".join(f"{curve.losses[-1]:.2f}" for curve in curves.values()))
    return {name: trainer.model for name, trainer in trainers.items()}, curves, recorder.terms()


@torch.no_grad()
def teacher_logits(teacher: kd.LinearTeacher) -> Tensor:
    """(sequences, tokens, vocabulary) in float32: of one batch, and not for long."""
    return F.linear(teacher.hidden.float(), teacher.weight.float())


def train_from_file(
    file: kd.TopKCache, tail: str, corpus: Corpus, settings: Settings, device: torch.device, held_out: list[Batch]
) -> tuple[nn.Module, Curve]:
    """A student like the others that never meets the teacher: sequence i of the file is the i-th of the batches."""
    trainer, curve = new_student(corpus, settings, device), Curve([], [])
    for step, (ids, labels), bar in training_batches(corpus, settings, settings.steps, device, "from the file"):
        last = step * settings.sequences
        teacher = file.batch(range(last - settings.sequences, last), tail=tail, device=device)
        trainer.step(ids, partial(FILE_OBJECTIVE.fused, teacher=teacher, labels=labels))
        if measures_at(step, settings):
            curve.add(step, held_out_loss(trainer.model, held_out, device))
            bar.set_postfix_str(f"held-out {curve.losses[-1]:.2f}")
    return trainer.model, curve


def student_loss(
    objective: Objective | None,
    teacher: kd.LinearTeacher,
    labels: Tensor,
    record: Callable[[kd.RowStats], None] | None = None,
) -> Loss:
    """The loss of the student's hidden states and head; hard labels alone where there is no objective."""
    if objective is None:
        return partial(hard_label_loss, labels=labels)
    return partial(objective.fused, teacher=teacher, labels=labels, record=record)


def measure_costs(
    teacher: nn.Module, student: nn.Module, batch: Batch, kind: FileKind, runs: int, device: torch.device
) -> tuple[str, dict[str, Cost], dict[str, Cost]]:
    """What each objective costs on the hidden states that the trained models give for a batch, eagerly and fused."""
    ids, labels = (tensor.to(device) for tensor in batch)
    with torch.no_grad():
        hidden = compute_hidden(student, ids)
        frozen = kd.LinearTeacher(compute_hidden(teacher, ids), head_weight(teacher))
    weight = head_weight(student)
    cases: dict[str, tuple[Objective, kd.LinearTeacher | kd.TopKTeacher]] = {
        **{name: (objective, frozen) for name, objective in OBJECTIVES.items()},
        kind.student: (FILE_OBJECTIVE, kind.choose(teacher_logits(frozen))),
    }

    def cost(loss: Callable[..., Tensor], teacher: kd.LinearTeacher | kd.TopKTeacher) -> Cost:
        return measure(partial(loss, teacher=teacher, labels=labels), hidden, weight, runs)

    eager = {name: cost(objective.eager, given) for name, (objective, given) in cases.items()}
    fused = {name: cost(objective.fused, given) for name, (objective, given) in cases.items()}
    vocabulary, width = weight.shape
    dtype = str(product_dtype(device)).removeprefix("torch.")
    shape = (
        f"{labels.numel():,} tokens of {width} (teacher: {frozen.weight.shape[1]}) features, "
        f"vocabulary {vocabulary:,}, {dtype}"
    )
    return shape, eager, fused


def describe_environment(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    return f"{device.type}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def run(settings: Settings, device: torch.device, output: Path, file_kind: str) -> Results:
    """The whole demo: text, teacher, students, losses, costs. The teacher's file goes into the folder ``output``."""
    kind = FILES[file_kind]
    stopwatch = Stopwatch()
    environment = describe_environment(device)
    print(environment)
    with stopwatch("text and tokenizer"):
        corpus = load_corpus(settings.vocab_size, settings.documents, settings.seed)
    print(corpus.description)

    held_out = held_out_batches(
        corpus.held_out, settings.context, settings.sequences, settings.held_out_batches, settings.seed
    )
    curve_batches = held_out[: settings.curve_batches]
    with stopwatch("teacher"):
        teacher = train_teacher(corpus, settings, device)
    teacher.requires_grad_(False)
    path = output / f"teacher-{file_kind}-{FILE_TOKENS}.safetensors"
    about = {"teacher": f"Llama, {count_parameters(teacher):,} parameters, seed {settings.seed}"}
    with (
        stopwatch("students"),
        kd.TopKCacheWriter(path, vocab_size=corpus.vocab_size, dtype=torch.bfloat16, metadata=about) as writer,
    ):
        students, curves, terms = train_students(teacher, corpus, settings, device, curve_batches, kind, writer)
    with stopwatch("student from the file"), kd.TopKCache(path) as file:
        student, curve = train_from_file(file, kind.tail, corpus, settings, device, curve_batches)
        students[kind.student], curves[kind.student] = student, curve
        teacher_file = TeacherFile.measure(file, file_kind, kind.tail)
    with stopwatch("held-out losses"):
        models = {"teacher": teacher, **students}
        losses = {
            name: held_out_loss(model, held_out, device)
            for name, model in tqdm(models.items(), desc="held-out losses", unit="model")
        }
        teacher_curve_loss = held_out_loss(teacher, curve_batches, device)
    with stopwatch("costs"):
        student, batch = students[HARD_LABELS], held_out[0]
        shape, eager, fused = measure_costs(teacher, student, batch, kind, settings.cost_runs, device)

    tokens_per_batch = settings.context * settings.sequences
    objectives = {**OBJECTIVES, kind.student: FILE_OBJECTIVE}
    return Results(
        settings={**dataclasses.asdict(settings), "objectives": {name: str(o) for name, o in objectives.items()}},
        environment=environment,
        corpus=corpus.description,
        teacher_parameters=count_parameters(teacher),
        student_parameters=count_parameters(students[HARD_LABELS]),
        head_parameters=(head_weight(teacher).numel(), head_weight(students[HARD_LABELS]).numel()),
        held_out_tokens=tokens_per_batch * len(held_out),
        teacher_loss=losses.pop("teacher"),
        student_losses=losses,
        curve_tokens=tokens_per_batch * len(curve_batches),
        teacher_curve_loss=teacher_curve_loss,
        curves=curves,
        terms=terms,
        teacher_file=teacher_file,
        cost_shape=shape,
        eager_costs=eager,
        fused_costs=fused,
        seconds=stopwatch.seconds,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distil a small language model and compare the losses.")
    parser.add_argument("--steps", type=int, help="training steps of every student")
    parser.add_argument("--teacher-steps", type=int, help="training steps of the teacher")
    parser.add_argument("--seed", type=int, help="of the split, the initial weights and the batches")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--file", choices=FILES, default="top", help="what the teacher writes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all that is written")
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps: does it run at all?")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    chosen = {name: getattr(arguments, name) for name in ("steps", "teacher_steps", "seed")}
    settings = dataclasses.replace(
        SMOKE if arguments.smoke else Settings(), **{name: value for name, value in chosen.items() if value is not None}
    )
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = run(settings, device, arguments.output, arguments.file)
    print(f"\n{results.summary()}")
    results.save_json(arguments.output / "results.json")
    results.save_plot(arguments.output / "distillation.png")
    made_by = f"{' '.join(['python examples/distill.py', *sys.argv[1:]])}: {results.environment}"
    results.terms.save_plot(arguments.output / "decoupled.png", made_by)
    print(f"Plots, numbers and the teacher's file: {arguments.output}/")


if __name__ == "__main__":
    main()
