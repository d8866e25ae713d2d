"""mdistiller's decoupled knowledge distillation (megvii-research/mdistiller, ``mdistiller.distillers.DKD``)."""

from __future__ import annotations

from torch import Tensor

from kdkernels.divergences import DKD
from kdkernels.losses import distillation_loss


def dkd_loss(
    logits_student: Tensor,  # (N, C)
    logits_teacher: Tensor,  # (N, C)
    target: Tensor,  # (N,), or of N elements
    alpha: float | Tensor,
    beta: float | Tensor,
    temperature: float,
) -> Tensor:
    r"""alpha·TCKD + beta·NCKD of a classifier: Zhao et al. 2022, arXiv 2203.08679.

    With p and q the softmax of the teacher's and the student's logits over T, t the row's target,

    .. math::
        \frac{T^2}{N} \sum_{rows} \alpha \, KL([p_t, 1-p_t] ‖ [q_t, 1-q_t])
        + \beta \, KL(\tilde p ‖ \tilde q)

    where p̃, q̃ are p and q over the classes other than t, normalised there: :class:`kdkernels.DKD`. T² is in the loss
    and its gradient; the mean is over all N rows.

    Differences from mdistiller. A student so sure of t, or against it, that a probability underflows has a finite loss
    and gradient (there +inf and NaN): masses are formed as logarithms. The target is kept apart, not lowered by 1000,
    which is too little for logits that lie further apart. No rows: 0 (there NaN).

    Args:
        logits_student: float32, bfloat16, float16 or float64; the last dimension contiguous.
        logits_teacher: of any of these dtypes; gets no gradient.
        target: int64 class of each row.
        alpha, beta: not negative: numbers, or 0-dim float Tensors.
        temperature: T > 0.

    Returns:
        A scalar, float32 (float64 for a float64 student).

    Raises:
        ValueError, TypeError: naming the argument; see :func:`kdkernels.distillation_loss`.
    """
    return distillation_loss(
        logits_student, logits_teacher, target.reshape(-1), divergence=DKD(alpha, beta), temperature=temperature
    )
