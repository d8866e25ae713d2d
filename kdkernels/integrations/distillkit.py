"""DistillKit's KL losses (arcee-ai/DistillKit, ``distillkit.lossfuncs.kl``).

Its ``KLDLoss`` finds them in that module when it is called, and multiplies by T²/num_items_in_batch itself::

    import distillkit.lossfuncs.kl as distillkit_kl
    from kdkernels.integrations.distillkit import dense_kl_div, sparse_kl_div

    distillkit_kl.sparse_kl_div, distillkit_kl.dense_kl_div = sparse_kl_div, dense_kl_div
"""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

from kdkernels.integrations._conventions import require_positive
from kdkernels.losses import distillation_loss
from kdkernels.teachers import TopKTeacher


def sparse_kl_div(
    logits: Tensor,  # (B, L, V)
    target_ids: Tensor,  # (B, L, K)
    target_values: Tensor,  # (B, L, K)
    mask: Tensor | None = None,  # (B, L) or (B, L, 1)
    eps: float = 1e-6,
    missing: str | Enum = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    r"""KL from the teacher's K values a row to the student, summed over the rows; no T², no mean.

    With q = softmax(logits · T_s/T), S the ids of a row, v its values and a = T_g/T (T the ``temperature``, T_g and T_s
    the generation temperatures),

    - ``missing="zero"``: :math:`\sum_S \tilde p \log(\tilde p / q)`, p̃ = softmax(a·v) over S:
      :class:`~kdkernels.TopKTeacher` with ``tail="teacher"``. Of log-probabilities and of logits alike.
    - ``missing="symmetric_uniform"``: the missing mass m is spread alike in both models, so that only its amount
      matters: :math:`\sum_S p \log(p/q) + m \log(m / (1 - Q_S))`, ``tail="bucket"``. T = T_g: p = e^v and
      m = 1 - Σ p. Else p = e^{av}/Z and m = (1 - Σ e^v)^a / Z, whose sum Z makes 1.

    Differences from DistillKit. The result is fp32 (fp64 of fp64 logits), where a sum over a batch is rounded to the
    logits' dtype there; log-probabilities are not rounded to it either. Under "symmetric_uniform", the student's mass
    outside S is summed there, not subtracted from 1, and has no bound below, so that its gradient does not vanish; the
    teacher's is 1e-7 at least, and p is scaled to 1 - m where rounding made Σ p larger. Rows that the mask leaves out
    may hold NaN. Nothing waits for the device (DistillKit indexes by a boolean mask). Of an id that comes again in its
    row, the first counts.

    Args:
        logits: the student's; float, the last dimension contiguous; read in place.
        target_ids: int32 or int64; negative: no token.
        target_values: float: log-probabilities, or with ``log_target=False`` logits; get no gradient.
        mask: True (or a weight) where a token counts.
        eps: has no effect: see above.
        missing: "zero" or "symmetric_uniform", or DistillKit's enumeration.
        log_target: False: ``target_values`` are logits, which know of no missing mass.
        temperature, target_generation_temperature, student_generation_temperature: T, T_g, T_s > 0.
        chunk_length: has no effect: nothing is chunked.

    Returns:
        A scalar, attached to the logits.

    Raises:
        ValueError: an unknown ``missing``, "symmetric_uniform" of logits, a temperature that is not positive.
        ValueError, TypeError: see :func:`kdkernels.distillation_loss`.
    """
    how = missing.value if isinstance(missing, Enum) else missing
    if how not in ("zero", "symmetric_uniform"):
        raise ValueError(f"missing must be 'zero' or 'symmetric_uniform', got {missing!r}")
    if how == "symmetric_uniform" and not log_target:
        raise ValueError("missing='symmetric_uniform' needs log-probabilities; log_target=False says they are logits")
    for name, value in (
        ("temperature", temperature),
        ("target_generation_temperature", target_generation_temperature),
        ("student_generation_temperature", student_generation_temperature),
    ):
        require_positive(name, value)
    # softmax(logits · T_s/T) is that at temperature T/T_s.
    at = temperature / student_generation_temperature
    if how == "zero":
        given_at = target_generation_temperature / student_generation_temperature
        teacher = TopKTeacher(target_ids, target_values.detach(), "teacher", given_at)
    else:
        values = target_values.detach().masked_fill(target_ids < 0, -torch.inf)
        values = _retempered(values, target_generation_temperature, temperature)
        teacher = TopKTeacher(target_ids, values, "bucket", at)
    return distillation_loss(
        logits, teacher, temperature=at, scale_by_temperature=False, weight=_weight(mask), reduction="sum"
    )


def dense_kl_div(
    logits: Tensor,  # (B, L, V)
    target_logits: Tensor,  # (B, L, V)
    mask: Tensor | None = None,  # (B, L) or (B, L, 1)
    temperature: float = 1.0,
) -> Tensor:
    """KL(p‖q) of softmax(target_logits/T) and softmax(logits/T), summed over the rows; no T², no mean.

    Differences from DistillKit: the result is fp32 (fp64 of fp64 logits); rows that the mask leaves out may hold NaN;
    the teacher gets no gradient.

    Args:
        logits, target_logits: the student's and the teacher's; float, the last dimension contiguous; read in place.
        mask: True (or a weight) where a token counts.
        temperature: T > 0.

    Returns:
        A scalar, attached to the logits.

    Raises:
        ValueError, TypeError: see :func:`kdkernels.distillation_loss`.
    """
    return distillation_loss(
        logits,
        target_logits,
        temperature=temperature,
        scale_by_temperature=False,
        weight=_weight(mask),
        reduction="sum",
    )


def _weight(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    return (mask.squeeze(-1) if mask.dim() == 3 else mask).float()


def _retempered(log_p: Tensor, given_at: float, temperature: float) -> Tensor:  # (..., K)
    """Log-probabilities at another temperature, the missing mass taken for one token more."""
    if math.isclose(given_at, temperature):
        return log_p
    log_p = log_p if log_p.dtype == torch.float64 else log_p.float()
    power = given_at / temperature
    log_missing = (-torch.expm1(log_p.logsumexp(-1, keepdim=True))).clamp(0, 1).log()
    scaled = power * log_p
    return scaled - torch.logaddexp(scaled.logsumexp(-1, keepdim=True), power * log_missing)
