"""What the CUDA run measures: which divergence, on which logits, against whom."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.losses import FAMILY, GIVEN_PER_ROW

Kind = Literal["step", "forward", "masked", "view", "small"]
Field = Literal["ours", "eager", "compiled", "kernels", "all"]

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "total_variation",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "alpha_beta",
)
#: Divergences that others compute too.
CONTESTED = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
#: Decoupled losses whose eager form is also compiled, once: that takes longer than the rest of a case.
COMPILED = ("dkd", "decoupled top-k 32", "decoupled top-p 0.5")
CONTESTED_ON_CPU = ("forward_kl", "reverse_kl", "jensen_shannon")
DECOUPLED_ON_CPU = ("decoupled label", "decoupled top-k 32", "decoupled top-p 0.5")
#: What --family selects.
FAMILIES: dict[str, tuple[str, ...]] = {"decoupled": tuple(FAMILY)}
#: The width of the summary, and the first measured.
HEADLINE = 128256
#: Rows by vocabulary size: 1 to 2 GB a matrix in bf16, far more than any cache holds. Rows of 50257 are not aligned to
#: 16 bytes.
ROWS = {HEADLINE: 4096, 32000: 16384, 50257: 16384, 50304: 16384, 151936: 4096, 262144: 2048}

SUFFIXES: dict[Kind, str] = {
    "step": "",
    "forward": ", forward alone",
    "masked": ", half of the rows ignored",
    "view": ", logits[:, :-1]",
    "small": ", small batch",
}
VIEW_BATCH = 8


@dataclass(frozen=True)
class Case:
    """A table: one loss on random normal logits of one shape and dtype.

    Attributes:
        divergence: a name of :mod:`benchmarks.losses`.
        kind: "step": loss and gradient. "forward": the loss under no_grad. "masked": a step where every other row, by
            lot, has the label -100. "view": a step on logits[:, :-1] of (8, S, V) logits. "small": a step of few rows,
            where what Python and the launches take is seen.
        close: the teacher's logits are the student's + 0.05·normal; else both are independent normals.
        peaked: logits as language models give them, a few tokens likely and the two models mostly agreed on which; see
            :func:`benchmarks.inputs.draw`.
        field: who runs. "ours": our two backends. "eager", "compiled": also eager, and torch.compile. "kernels": also
            in place, and Liger. "all": also those that take long to tune or install.
    """

    divergence: str
    rows: int
    width: int
    dtype: str = "bfloat16"
    kind: Kind = "step"
    close: bool = False
    peaked: bool = False
    field: Field = "ours"

    @property
    def title(self) -> str:
        suffix = SUFFIXES[self.kind] + (", close models" if self.close else "") + (", peaked" if self.peaked else "")
        return f"{self.divergence}, {self.dtype}, {self.rows} × {self.width}{suffix}"

    @property
    def bytes(self) -> int:
        """What must move: each counted row of both models read once, each row of the gradient written once.

        And the mask read once where every row has its own; one of a single row stays in the caches.
        """
        matrix = self.rows * self.width * torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()
        mask = self.rows * self.width if self.divergence == GIVEN_PER_ROW else 0
        return {"forward": 2, "masked": 2}.get(self.kind, 3) * matrix + mask

    @property
    def leading(self) -> tuple[int, ...]:
        """The dimensions before the vocabulary."""
        return (VIEW_BATCH, self.rows // VIEW_BATCH) if self.kind == "view" else (self.rows,)


def rows_for(width: int) -> int:
    return ROWS.get(width) or 1 << max(0, round(math.log2(2**29 / width)))


def decoupled() -> list[Case]:
    """The losses over a split vocabulary, but for the forward KL that they are compared with.

    On peaked logits top-p's set is a few tokens; on normal ones 0.5 of the mass takes a sixth of the vocabulary.
    """
    rows, wide = ROWS[HEADLINE], 151936
    return [
        *(Case(name, rows, HEADLINE, field="compiled" if name in COMPILED else "eager") for name in FAMILY),
        *(Case(name, rows, HEADLINE, peaked=True, field="eager") for name in FAMILY),
        *(Case(name, ROWS[wide], wide, field="eager") for name in FAMILY),
    ]


def full() -> list[Case]:
    """Every case of a full run; the headline's first, those that capture CUDA graphs last."""
    rows = ROWS[HEADLINE]
    headline = [
        Case(name, rows, HEADLINE, field="all" if name in CONTESTED else "ours")
        for name in (*CONTESTED, *(name for name in DIVERGENCES if name not in CONTESTED))
    ]
    two = ("forward_kl", "jensen_shannon")
    split = decoupled()
    return [
        *headline,
        *(Case(name, rows, HEADLINE, close=True) for name in two),
        *(Case(name, rows // 2, HEADLINE, dtype="float32") for name in two),
        *(Case(name, rows, HEADLINE, kind="forward", field="compiled") for name in two),
        Case("forward_kl", rows, HEADLINE, kind="masked"),
        Case("forward_kl", rows, HEADLINE, kind="view"),
        Case("forward_kl", rows, HEADLINE, peaked=True, field="eager"),
        *(case for case in split if case.width == HEADLINE),
        *(
            Case(name, count, width, field="kernels" if name == "forward_kl" else "ours")
            for width, count in ROWS.items()
            if width != HEADLINE
            for name in DIVERGENCES
        ),
        *(case for case in split if case.width != HEADLINE),
        *(Case("forward_kl", count, HEADLINE, kind="small", field="compiled") for count in (1, 64)),
    ]


def cpu(rows: int, width: int) -> list[Case]:
    """The cases of a CPU run, where everyone runs."""
    plain = [Case(name, rows, width, dtype) for dtype in ("float32", "bfloat16") for name in CONTESTED_ON_CPU]
    return [*plain, *(Case(name, rows, width, "float32") for name in DECOUPLED_ON_CPU)]


def quick(widths: list[int]) -> list[Case]:
    """Our two backends alone, for tuning."""
    peaked = ("forward_kl", *FAMILY)
    return [
        Case(name, rows_for(width), width, peaked=is_peaked)
        for width in widths
        for is_peaked, names in ((False, (*DIVERGENCES, *FAMILY)), (True, peaked))
        for name in names
    ]


def family(name: str, cases: list[Case]) -> list[Case]:
    """Of these cases, a family's, and the forward KL that each is compared with.

    Args:
        name: one of :data:`FAMILIES`.
    """
    members = [case for case in cases if case.divergence in FAMILIES[name]]
    baselines = {baseline(case).title for case in members}
    return [case for case in cases if case in members or case.title in baselines]


def baseline(case: Case) -> Case:
    """Forward KL on the same logits."""
    return replace(case, divergence="forward_kl")
