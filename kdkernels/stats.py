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
    #: logsumexp of the teacher's; of a sparse teacher's log-probabilities, over the given ids.
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
    #: P_S: what the teacher gives to the strong set, which of a sparse teacher is the given ids.
    strong_mass_teacher: Tensor | None = None
    #: Q_S: what the student gives to it.
    strong_mass_student: Tensor | None = None
    #: Of a sparse teacher, else None: 1 where the student's most likely token is the teacher's, else 0.
    top1_agreement: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Tensor, with_cross_entropy: bool) -> RowStats:
        """From what a sweep writes, (4, 7 or 9, ...); 7: of a sparse teacher."""
        common = (rows[0], rows[1], rows[2], rows[3] if with_cross_entropy else None)
        if rows.shape[0] == 7:
            return cls(*common, strong_mass_teacher=rows[4], strong_mass_student=rows[5], top1_agreement=rows[6])
        return cls(*common, *rows[4:])
