"""What `python -m benchmarks linear` measures: which divergence, on which shapes, against whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import kdkernels as kd

Kind = Literal["loss", "sizes", "accuracy", "ignored", "divergences"]
Field = Literal["ours", "kernels", "all"]

MIB = 2**20
GIB = 2**30
DIVERGENCES: dict[str, kd.Divergence] = {
    "forward_kl": kd.ForwardKL(),
    "jensen_shannon": kd.JensenShannon(),
    "CAKD top-k 32": kd.CAKD(alpha=2.0, beta=0.5, strong=kd.TopK(32)),
}
IGNORED = (0.0, 0.1, 0.25, 0.5, 0.75)
PREFIXES: dict[Kind, str] = {
    "loss": "",
    "sizes": "chunk sizes, ",
    "accuracy": "accuracy, ",
    "ignored": "ignored tokens, ",
    "divergences": "divergences in turns, ",
}


@dataclass(frozen=True)
class Case:
    """A table: hidden states and weights of one shape and dtype in, one loss and the student's gradients out.

    Attributes:
        divergence: a name of :data:`DIVERGENCES`.
        rows, width: N and V.
        student, teacher: the hidden sizes.
        kind: "loss": time, memory and errors of everyone in its field. "sizes": the same for those whose memory can be
            set, at each of ``workspaces`` and ``chunks``. "accuracy": errors alone, at each of ``noises``.
            "ignored": our time with each of ``ignored`` of the tokens' labels ignored, with and without ``compact``.
            "divergences": our time for each of :data:`DIVERGENCES`, measured in turns.
        logits: the dtypes of our logits.
        workspaces: bounds of our workspace in bytes; in a "loss" case besides the default.
        chunks: the peers' rows a chunk.
        noises: how far apart the models' logits are, as standard deviations.
        field: who runs. "ours"; "kernels": also eager and the peers but for torch.compile; "all".
    """

    divergence: str
    rows: int
    width: int
    student: int
    teacher: int
    dtype: str = "bfloat16"
    kind: Kind = "loss"
    logits: tuple[str, ...] = ("float32", "bfloat16")
    workspaces: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    noises: tuple[float, ...] = ()
    ignored: tuple[float, ...] = ()
    field: Field = "all"

    @property
    def shape(self) -> str:
        hidden = f"{self.student}" if self.student == self.teacher else f"{self.student} and {self.teacher}"
        return f"{self.rows} × {self.width}, hidden {hidden}"

    @property
    def title(self) -> str:
        return f"{PREFIXES[self.kind]}{self.divergence}, {self.dtype}, {self.shape}"

    @property
    def flops(self) -> int:
        """Of the four products: both models' logits, and the gradients of the student's hidden states and weight."""
        return 2 * self.rows * self.width * (3 * self.student + self.teacher)


def full() -> list[Case]:
    """Every case of a run on a GPU: first those whose peers must not be left out for want of time."""
    rows, width, student, teacher = 8192, 128256, 2048, 4096
    headline = (rows, width, student, teacher)
    workspaces = tuple(MIB * mebibytes for mebibytes in (256, 512, 1024, 2048, 3072, 4096, 6144))
    return [
        Case("forward_kl", *headline, workspaces=(512 * MIB,)),
        Case("forward_kl", 1024, width, student, teacher),
        accuracy(256, 32000, 1024),
        Case("forward_kl", *headline, kind="ignored", ignored=IGNORED, logits=("float32",), field="ours"),
        Case("forward_kl", *headline, kind="divergences", logits=("float32",), field="ours"),
        Case("forward_kl", rows, 151936, 4096, 4096, field="kernels"),
        Case("jensen_shannon", *headline, logits=("float32",)),
        Case("CAKD top-k 32", *headline, logits=("float32",), field="ours"),
        Case("forward_kl", *headline, kind="sizes", workspaces=workspaces, chunks=(512, 1024, 2048, 4096)),
    ]


def quick() -> list[Case]:
    """The same on small shapes: to see that everything works."""
    headline = (256, 8192, 256, 512)
    return [
        Case("forward_kl", *headline, workspaces=(4 * MIB,)),
        Case("forward_kl", 64, 8192, 256, 256, field="kernels"),
        Case("jensen_shannon", *headline, logits=("float32",), field="kernels"),
        Case("CAKD top-k 32", *headline, logits=("float32",), field="ours"),
        Case("forward_kl", *headline, kind="sizes", workspaces=(2 * MIB, 8 * MIB), chunks=(64,)),
        accuracy(64, 4096, 256),
        Case("forward_kl", *headline, kind="ignored", ignored=IGNORED, logits=("float32",), field="ours"),
        Case("forward_kl", *headline, kind="divergences", logits=("float32",), field="ours"),
    ]


def accuracy(rows: int, width: int, hidden: int) -> Case:
    return Case("forward_kl", rows, width, hidden, hidden, kind="accuracy", noises=(1.0, 0.1, 0.01))


def cpu(rows: int = 512, width: int = 32000, hidden: int = 256) -> list[Case]:
    return [Case("forward_kl", rows, width, hidden, hidden, "float32", logits=("float32",))]


class Named(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def title(self) -> str: ...


Some = TypeVar("Some", bound=Named)


def select(cases: Sequence[Some], words: Sequence[str]) -> list[Some]:
    """The cases that --only names: "plot", or a part of a title. No such word: every case."""
    wanted = [word for word in words if word not in ("ours", "peers")]

    def named(case: Some, word: str) -> bool:
        return case.kind == "sizes" if word == "plot" else word.lower() in case.title.lower()

    return [case for case in cases if not wanted or any(named(case, word) for word in wanted)]
