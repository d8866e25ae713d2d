"""What a loss reports beside itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowStats(NamedTuple):
    """Per-token numbers of one loss, detached, shape (...), fp32 (fp64 for fp64 students).

    Rows that count for nothing (ignored label, weight 0) are not read and report 0.
    """

    #: logsumexp of the student's transformed logits over the temperature.
    student_lse: Tensor
    #: logsumexp of the teacher's.
    teacher_lse: Tensor
    #: D(p, q), before kd_weight, T² and token weights.
    divergence: Tensor
    #: -log softmax(student)[label] at temperature 1; None where ce_weight is 0.
    cross_entropy: Tensor | None
    #: Of a decoupled divergence, else None: KL([P_S, P_W] || [Q_S, Q_W]) of the sets' masses.
    bcd: Tensor | None = None
    #: KL within the strong set S, before weights and mass; 0 where S holds no teacher mass.
    scd: Tensor | None = None
    #: KL within the weak set W, before weights and mass; 0 where W holds no teacher mass.
    wcd: Tensor | None = None
    #: P_S: what the teacher gives to the strong set.
    strong_mass_teacher: Tensor | None = None
    #: Q_S: what the student gives to it.
    strong_mass_student: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Tensor, with_cross_entropy: bool) -> RowStats:
        """From what a sweep writes, (4 or 9, ...)."""
        return cls(rows[0], rows[1], rows[2], rows[3] if with_cross_entropy else None, *rows[4:])
