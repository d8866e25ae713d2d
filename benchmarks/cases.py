"""What the CUDA run measures: which divergence, on which logits, against whom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["step", "forward", "masked", "view", "small"]
Field = Literal["ours", "compiled", "kernels", "all"]

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
        kind: "step": loss and gradient. "forward": the loss under no_grad. "masked": a step where every other row, by
            lot, has the label -100. "view": a step on logits[:, :-1] of (8, S, V) logits. "small": a step of few rows,
            where what Python and the launches take is seen.
        close: the teacher's logits are the student's + 0.05·normal; else both are independent normals.
        field: who runs. "ours": our two backends. "compiled": also eager and torch.compile. "kernels": also in place,
            and Liger. "all": also those that take long to tune or install.
    """

    divergence: str
    rows: int
    width: int
    dtype: str = "bfloat16"
    kind: Kind = "step"
    close: bool = False
    field: Field = "ours"

    @property
    def title(self) -> str:
        suffix = SUFFIXES[self.kind] + (", close models" if self.close else "")
        return f"{self.divergence}, {self.dtype}, {self.rows} × {self.width}{suffix}"

    @property
    def bytes(self) -> int:
        """What must move: each counted row of both models read once, each row of the gradient written once."""
        matrix = self.rows * self.width * torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()
        return {"forward": 2, "masked": 2}.get(self.kind, 3) * matrix

    @property
    def leading(self) -> tuple[int, ...]:
        """The dimensions before the vocabulary."""
        return (VIEW_BATCH, self.rows // VIEW_BATCH) if self.kind == "view" else (self.rows,)


def rows_for(width: int) -> int:
    return ROWS.get(width) or 1 << max(0, round(math.log2(2**29 / width)))


def full() -> list[Case]:
    """Every case of a full run; the headline's first, those that capture CUDA graphs last."""
    rows = ROWS[HEADLINE]
    headline = [
        Case(name, rows, HEADLINE, field="all" if name in CONTESTED else "ours")
        for name in (*CONTESTED, *(name for name in DIVERGENCES if name not in CONTESTED))
    ]
    two = ("forward_kl", "jensen_shannon")
    return [
        *headline,
        *(Case(name, rows, HEADLINE, close=True) for name in two),
        *(Case(name, rows // 2, HEADLINE, dtype="float32") for name in two),
        *(Case(name, rows, HEADLINE, kind="forward", field="compiled") for name in two),
        Case("forward_kl", rows, HEADLINE, kind="masked"),
        Case("forward_kl", rows, HEADLINE, kind="view"),
        *(
            Case(name, count, width, field="kernels" if name == "forward_kl" else "ours")
            for width, count in ROWS.items()
            if width != HEADLINE
            for name in DIVERGENCES
        ),
        *(Case("forward_kl", count, HEADLINE, kind="small", field="compiled") for count in (1, 64)),
    ]


def quick(widths: list[int]) -> list[Case]:
    """Our two backends alone, for tuning."""
    return [Case(name, rows_for(width), width) for width in widths for name in DIVERGENCES]
