"""How the terms of a decoupled divergence move while a student trains: recorded step by step, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import kdkernels as kd

SMOOTHED = 9  # steps of the moving mean that is drawn over the steps' own numbers


@dataclass(frozen=True)
class Terms:
    """Means over the tokens of each training step, the first step first."""

    divergence: str
    bcd: list[float]
    scd: list[float]
    wcd: list[float]
    strong_mass_teacher: list[float]
    strong_mass_student: list[float]

    def summary(self) -> str:
        """The first and the last steps, in a line each."""
        few = max(1, min(SMOOTHED, len(self.bcd) // 2))
        return "\n".join([f"Terms of {self.divergence}:", self._line("first", few), self._line("last", few)])

    def _line(self, which: str, few: int) -> str:
        def mean(values: list[float]) -> float:
            chosen = values[:few] if which == "first" else values[-few:]
            return sum(chosen) / few

        return (
            f"  {which} {few} steps: BCD {mean(self.bcd):.3f}, SCD {mean(self.scd):.3f}, WCD {mean(self.wcd):.3f}; "
            f"strong set: teacher {mean(self.strong_mass_teacher):.3f}, student {mean(self.strong_mass_student):.3f}"
        )

    def save_plot(self, path: Path, made_by: str) -> None:
        """The three terms, and the masses of the strong set. The figure says what it was made from."""
        figure = Figure(figsize=(10, 4), layout="constrained", dpi=130)
        figure.suptitle(f"{self.divergence}: a student's training, means over each step's tokens", fontsize=11)
        terms, masses = figure.subplots(1, 2)
        for label, values, color in (
            ("BCD: which set", self.bcd, "#0072b2"),
            ("SCD: inside the strong set", self.scd, "#d55e00"),
            ("WCD: inside the weak set", self.wcd, "#009e73"),
        ):
            draw(terms, values, label, color)
        terms.set_ylim(bottom=0)
        terms.set_title("The terms, before weights (nats)", fontsize=10)
        draw(masses, self.strong_mass_teacher, "teacher", "#000000")
        draw(masses, self.strong_mass_student, "student", "#cc79a7")
        masses.set_ylim(0, 1)
        masses.set_title("Probability of the strong set", fontsize=10)
        for axes in (terms, masses):
            axes.set_xlabel("training step")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=9)
        figure.supxlabel(f"{made_by}, {len(self.bcd)} steps", fontsize=8)
        figure.savefig(path)


def draw(axes: Axes, values: list[float], label: str, color: str) -> None:
    """A pale line of every step, and its moving mean."""
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, moving_mean(values, SMOOTHED), color=color, linewidth=1.6, label=label)


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Means of up to `width` neighbours around each value; fewer at the ends."""
    half = width // 2
    windows = (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


class TermRecorder:
    """Takes the statistics of each step and keeps their means on their device: nothing waits for them."""

    def __init__(self, divergence: kd.Divergence) -> None:
        self.divergence = divergence
        self._means: list[Tensor] = []

    def record(self, stats: kd.RowStats) -> None:
        """The statistics of one step of a decoupled divergence, every token of which counts."""
        columns = (stats.bcd, stats.scd, stats.wcd, stats.strong_mass_teacher, stats.strong_mass_student)
        self._means.append(torch.stack([column.mean() for column in columns if column is not None]))

    def terms(self) -> Terms:
        return Terms(str(self.divergence), *torch.stack(self._means).T.tolist())
