"""What a teacher can be beside a Tensor of logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: What becomes of the probability that a sparse teacher does not tell: see :class:`TopKTeacher`.
TAILS = ("bucket", "renormalize", "teacher", "drop")
#: The most ids a row may have.
MOST_IDS = 4096


class LinearTeacher(NamedTuple):
    """A teacher by what its logits are made of: logits = hidden @ weight.T + bias, formed a few rows at a time.

    Hidden states and weights of either model may have their own hidden size and dtype. Nothing here gets a gradient.
    """

    #: (..., H_t) the teacher's last hidden states, with the rows of the student's; any of the dtypes of logits.
    hidden: Tensor
    #: (V_t, H_t) its output embedding (``lm_head.weight``), of the dtype of ``hidden``.
    weight: Tensor
    #: (V_t,) or None.
    bias: Tensor | None = None


class TopKTeacher(NamedTuple):
    r"""A teacher by the log-probabilities of a few tokens a row, from a cache or an inference server.

    With S the ids of a row, p the given probabilities and q the student's over the whole vocabulary, P_S and Q_S their
    masses of S, and p̃, q̃ both normalised within S, forward KL becomes, by ``tail``,

    ==============  ==============================================  =========================================
    tail            loss                                            gradient · T
    ==============  ==============================================  =========================================
    "bucket"        KL([P_S, 1-P_S] ‖ [Q_S, 1-Q_S]) + P_S·KL(p̃‖q̃)  q - p in S; q·(P_S - Q_S)/(1 - Q_S) outside
    "renormalize"   KL(p̃ ‖ q̃)                                       q̃ - p̃ in S; 0 outside
    "teacher"       Σ_S p̃ log(p̃/q)                                  q - p̃·[u in S]
    "drop"          Σ_S p log(p/q)                                  P_S·q - p·[u in S]
    ==============  ==============================================  =========================================

    where "bucket" takes no mass outside S for less than 1e-7 (none where S is the whole vocabulary), and a row without
    ids, or (but in "bucket") one whose ids have no mass, has loss 0. docs/sparse-teachers.md says which to choose.

    "renormalize" serves ReverseKL and JensenShannon too, within S; it and "teacher" take any temperature T of the loss:
    the teacher's logits at S are its log-probabilities up to a constant, which p̃ does not see. "bucket" and "drop" need
    the mass itself, which is known at ``teacher_temperature`` alone: T must be that number.
    """

    #: (..., K) int32 or int64, 1 <= K <= 4096, with the rows of the student. Negative: no token (rows of unequal
    #: length); of an id that comes again in its row, the first counts alone.
    ids: Tensor
    #: (..., K) their log-probabilities: float32, bfloat16, float16 or float64; in any order. Where there is no token,
    #: anything.
    logprobs: Tensor
    #: "bucket", "renormalize", "teacher" or "drop".
    tail: str = "bucket"
    #: The temperature of the softmax that gave the log-probabilities.
    teacher_temperature: float = 1.0
