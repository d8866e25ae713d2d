"""The demo's results: as a table, a plot and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loss_cost import Cost
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from terms import Terms

import kdkernels as kd

HARD_LABELS = "hard labels"

# Okabe and Ito's palette: told apart by colour-blind readers too.
_COLORS = ("#7f7f7f", "#0072b2", "#d55e00", "#cc79a7", "#e69f00")
_EAGER, _OURS = "#bbbbbb", "#009e73"


@dataclass(frozen=True)
class Curve:
    """Held-out loss of a student while it trains, on a part of the held-out text."""

    steps: list[int]
    losses: list[float]

    def add(self, step: int, loss: float) -> None:
        self.steps.append(step)
        self.losses.append(loss)


@dataclass(frozen=True)
class TeacherFile:
    """What the teacher wrote of its distributions, and what all of its logits would have been."""

    name: str
    kind: str  # "top" or "draws"
    tail: str  # what the student made of the tokens that are not in it
    dtype: str
    positions: int
    tokens_per_position: float  # different ones
    mass: float  # what is given as their probability, on average
    megabytes: float
    megabytes_of_logits: float  # of the same positions, in the same dtype

    @classmethod
    def measure(cls, file: kd.TopKCache, kind: str, tail: str) -> TeacherFile:
        tokens, mass = 0, 0.0
        for teacher in file:
            tokens += int((teacher.ids >= 0).sum())
            mass += float(teacher.logprobs.float().exp().sum())
        return cls(
            name=Path(file.path).name,
            kind=kind,
            tail=tail,
            dtype=str(file.dtype).removeprefix("torch."),
            positions=file.tokens,
            tokens_per_position=tokens / file.tokens,
            mass=mass / file.tokens,
            megabytes=Path(file.path).stat().st_size / 1e6,
            megabytes_of_logits=file.tokens * file.vocab_size * file.dtype.itemsize / 1e6,
        )

    def summary(self) -> str:
        what = f"{self.tokens_per_position:.0f} tokens at each of {self.positions:,} positions"
        if self.kind == "draws":
            what = f"{what}, drawn from the teacher."
        else:
            what = f"{what}, {self.mass:.1%} of the teacher's probability; the rest: {self.tail}."
        times = self.megabytes_of_logits / self.megabytes
        return (
            f"{self.name}: {what}\n{self.megabytes:,.1f} MB, where all logits in {self.dtype} take "
            f"{self.megabytes_of_logits:,.1f} MB, {times:.0f} times as much."
        )


@dataclass(frozen=True)
class Results:
    """All that the demo found out."""

    settings: dict[str, object]
    environment: str
    corpus: str
    teacher_parameters: int
    student_parameters: int
    head_parameters: tuple[int, int]  # the teacher's and the student's
    held_out_tokens: int
    teacher_loss: float
    student_losses: dict[str, float]
    curve_tokens: int
    teacher_curve_loss: float  # on the curves' part of the held-out text
    curves: dict[str, Curve]
    terms: Terms
    teacher_file: TeacherFile
    cost_shape: str
    eager_costs: dict[str, Cost]
    fused_costs: dict[str, Cost]
    seconds: dict[str, float]

    def summary(self) -> str:
        """Everything a reader wants on the console."""
        sections = [self.models_table(), self.teacher_file.summary(), self.cost_table(), self.terms.summary()]
        sections += [self.verdict(), self.timing()]
        return "\n\n".join(sections)

    def models_table(self) -> str:
        rows = [["", "parameters", "in the head", "nats/token", "perplexity", "against hard labels"]]
        baseline = self.student_losses[HARD_LABELS]
        models = [("teacher", self.teacher_parameters, self.head_parameters[0], self.teacher_loss)]
        for name, loss in self.student_losses.items():
            models.append((f"student, {name}", self.student_parameters, self.head_parameters[1], loss))
        for name, parameters, head, loss in models:
            difference = "" if loss == baseline else f"{loss - baseline:+.3f}"
            rows.append([name, f"{parameters:,}", f"{head:,}", f"{loss:.3f}", f"{math.exp(loss):.1f}", difference])
        share = self.student_parameters / self.teacher_parameters
        title = (
            f"Cross-entropy on {self.held_out_tokens:,} held-out tokens; students of {share:.1%} of the teacher's size"
        )
        return f"{title}\n{table(rows)}"

    def cost_table(self) -> str:
        rows = [["", "time: eager", "kdkernels", "ratio", "memory: eager", "kdkernels", "ratio"]]
        for name, eager in self.eager_costs.items():
            fused = self.fused_costs[name]
            times, memory = (eager.milliseconds, fused.milliseconds), (eager.peak_mebibytes, fused.peak_mebibytes)
            rows.append([name, *pair(times, "ms"), *pair(memory, "MiB")])
        return (
            "From hidden states to the gradients of hidden states and head weight, forward and backward:\n"
            f"{self.cost_shape}\n{table(rows)}\n"
            f"Time: median of {self.settings['cost_runs']} runs. Memory: peak above the inputs. {self.agreement()}"
        )

    def agreement(self) -> str:
        worst = max(abs(self.fused_costs[name].loss / eager.loss - 1) for name, eager in self.eager_costs.items())
        return f"The losses agree to {worst:.0e}."

    def verdict(self) -> str:
        lines = []
        for name, loss in self.student_losses.items():
            gain = self.student_losses[HARD_LABELS] - loss
            if name == HARD_LABELS:
                continue
            if gain > 0:
                lines.append(f"Distilled by {name}, the student beats hard labels by {gain:.3f} nats per token.")
            else:
                lines.append(f"Distilled by {name}, the student does NOT beat hard labels ({-gain:.3f} nats worse).")
        if self.teacher_loss >= self.student_losses[HARD_LABELS]:
            lines.append("The teacher is no better than the hard-label student: there was nothing to distil.")
        return "\n".join(lines)

    def timing(self) -> str:
        total = sum(self.seconds.values())
        parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.seconds.items())
        return f"Took {int(total // 60)} min {total % 60:.0f} s: {parts}"

    def save_json(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def save_plot(self, path: Path) -> None:
        figure = Figure(figsize=(11, 5.2), layout="constrained", dpi=150)
        share = self.student_parameters / self.teacher_parameters
        figure.suptitle(
            f"Students of {share:.0%} of the size of their {self.teacher_parameters / 1e6:.1f} M parameter teacher",
            fontsize=13,
        )
        grid = figure.add_gridspec(2, 2, width_ratios=(1.8, 1))
        self.plot_curves(figure.add_subplot(grid[:, 0]))
        times, memory = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
        self.plot_costs(times, "milliseconds", "Head, loss, gradients: time (ms)")
        self.plot_costs(memory, "peak_mebibytes", "Head, loss, gradients: peak (MiB)")
        times.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.12))
        memory.set_xlabel(textwrap.fill(self.cost_shape, 44))
        figure.savefig(path)

    def plot_curves(self, axes: Axes) -> None:
        for color, (name, curve) in zip(_COLORS, self.curves.items(), strict=False):
            axes.plot(curve.steps, curve.losses, color=color, marker="o", markersize=4, label=f"student, {name}")
        axes.axhline(self.teacher_curve_loss, color="black", linestyle="--", linewidth=1.2, label="trained teacher")
        axes.set_title(f"Loss on {self.curve_tokens:,} held-out tokens", fontsize=11)
        axes.set_xlabel("training step")
        axes.set_ylabel("cross-entropy (nats per token)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)

    def plot_costs(self, axes: Axes, quantity: str, title: str) -> None:
        height = 0.36
        for offset, label, color, costs in (
            (-height / 2, "eager PyTorch", _EAGER, self.eager_costs),
            (height / 2, "kdkernels", _OURS, self.fused_costs),
        ):
            values: list[float | None] = [getattr(cost, quantity) for cost in costs.values()]
            places = [place + offset for place in range(len(values))]
            bars = axes.barh(places, [value or 0.0 for value in values], height, color=color, label=label)
            numbers = ["n/a" if value is None else f"{value:,.0f}" for value in values]
            axes.bar_label(bars, numbers, padding=3, fontsize=9)
        axes.set_yticks(range(len(self.eager_costs)), [textwrap.fill(name, 18) for name in self.eager_costs])
        axes.invert_yaxis()
        axes.margins(x=0.15)  # room for the numbers
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)


def pair(values: tuple[float | None, float | None], unit: str) -> list[str]:
    """Cells for eager PyTorch's value, ours and the ratio of the two."""
    eager, fused = values
    if eager is None or fused is None:
        return ["n/a", "n/a", "n/a"]
    ratio = f"{eager / fused:.1f}x" if fused > 0 else "n/a"
    return [f"{eager:.1f} {unit}", f"{fused:.1f} {unit}", ratio]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, names to the left and numbers to the right, a line under the first row."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(f"  {line.rstrip()}" for line in lines)
