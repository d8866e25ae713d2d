"""What `python -m benchmarks sparse` measures: which tail, on which logits or hidden states, against whom."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.cases import HEADLINE, ROWS

Kind = Literal["logits", "hidden"]
Field = Literal["ours", "eager", "compiled"]

#: The tails in the order of the tables.
TAILS = ("bucket", "renormalize", "teacher", "drop")
IDS = 64
#: The width beside the headline's.
WIDE = 151936
HIDDEN = 2048


@dataclass(frozen=True)
class Case:
    """A table: the log-probabilities of a few tokens a row in, loss and the student's gradient out.

    Attributes:
        tail: of :class:`kdkernels.TopKTeacher`.
        rows, width: N and V.
        kind: "logits": the student's logits in. "hidden": its hidden states (N, ``hidden``) and lm_head weight in.
        ids: how many a row, K.
        hidden: of the kind "hidden", the hidden size.
        zipf: the ids follow Zipf's law over the vocabulary, as those of text do, so that the commonest are in nearly
            every row; else every token is as likely to be one.
        ce_weight: cross-entropy with labels besides, with this weight.
        logits: of the kind "hidden", the dtypes of our logits.
        field: who runs. "ours"; "eager": also the eager forms; "compiled": also torch.compile.
    """

    tail: str
    rows: int
    width: int
    kind: Kind = "logits"
    ids: int = IDS
    dtype: str = "bfloat16"
    hidden: int = 0
    zipf: bool = False
    ce_weight: float = 0.0
    logits: tuple[str, ...] = ("float32",)
    field: Field = "ours"

    @property
    def shape(self) -> str:
        return f"{self.rows} × {self.width}" + (f", hidden {self.hidden}" if self.kind == "hidden" else "")

    @property
    def name(self) -> str:
        """The loss, without the shape."""
        return (
            self.tail
            + (" + cross-entropy" if self.ce_weight else "")
            + (f", {self.ids} ids" if self.ids != IDS else "")
            + (", Zipfian ids" if self.zipf else "")
        )

    @property
    def title(self) -> str:
        return f"{'from hidden states, ' if self.kind == 'hidden' else ''}{self.name}, {self.dtype}, {self.shape}"

    @property
    def bytes(self) -> int:
        """What must move from logits: the student's row read once, its gradient written once.

        "renormalize" reads no logits but those at the ids: its gradient's zeros alone. The ids and log-probabilities
        are not counted.
        """
        matrix = self.rows * self.width * torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()
        return matrix if self.tail == "renormalize" and not self.ce_weight else 2 * matrix

    @property
    def flops(self) -> int:
        """Of three products from hidden states: the student's logits, and the gradients of its operands."""
        return 2 * self.rows * self.width * 3 * self.hidden


def full() -> list[Case]:
    """Every case of a run on a GPU; first those that others run in, who are left out when the time is up."""
    rows = ROWS[HEADLINE]
    bucket = Case("bucket", 8192, HEADLINE, "hidden", hidden=HIDDEN, field="compiled")
    renormalize = replace(bucket, tail="renormalize")
    return [
        *(Case(tail, rows, HEADLINE, field="compiled") for tail in TAILS),
        Case("bucket", rows, HEADLINE, ce_weight=0.5, field="eager"),
        replace(bucket, logits=("float32", "bfloat16")),
        renormalize,
        replace(renormalize, zipf=True, field="eager"),
        replace(bucket, rows=1024, field="eager"),
        replace(renormalize, rows=1024, field="eager"),
        Case("bucket", rows, HEADLINE, ids=256),
        *(Case(tail, ROWS[WIDE], WIDE) for tail in TAILS),
    ]


def cpu(rows: int = 256, width: int = 32000) -> list[Case]:
    """Every case of a run on a CPU, all from logits."""
    return [
        *(Case(tail, rows, width, dtype="float32", field="eager") for tail in TAILS),
        *(Case(tail, rows, width, dtype="bfloat16", field="eager") for tail in TAILS[:2]),
    ]
