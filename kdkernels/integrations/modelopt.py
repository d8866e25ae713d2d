"""NVIDIA ModelOpt's distillation loss: ``modelopt.torch.distill.LogitsDistillationLoss`` (0.47)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.loss import _Loss

import kdkernels as kd
from kdkernels.integrations._conventions import require_positive

__all__ = ["LogitsDistillationLoss"]

_REDUCTIONS = ("mean", "batchmean", "sum", "none")


class LogitsDistillationLoss(_Loss):
    r"""T²·KL(p‖q), p = softmax(logits_t/T) the teacher's and q = softmax(logits_s/T) the student's distribution.

    Hinton et al. 2015 (arXiv 1503.02531). A criterion for ``modelopt.torch.distill``, which asks for a torch ``_Loss``:
    ``mtd.convert(model, [("kd_loss", {"criterion": LogitsDistillationLoss(), ...})])``.

    The reductions are the original's. Note that "mean" divides by all elements of the logits, the vocabulary included:
    it is a V-th of the mean over tokens, which "batchmean" is for logits (tokens, V).

    Different on purpose: the result is float32 (float64 for float64 logits), where the original's has the logits'
    dtype; a token that both models rule out by -inf counts for nothing, where the original is NaN; logits without
    elements give 0, where the original's means are NaN; a teacher of other leading dimensions is an error, where the
    original broadcasts it.

    Args:
        temperature: T > 0.
        reduction: "mean": the sum over the number of elements of ``logits_s``; "batchmean": over its first dimension;
            "sum"; "none": a loss per token (...), the vocabulary summed.

    Raises:
        ValueError: ``reduction`` is none of these, or ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        require_positive("temperature", temperature)
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        # Named as in the original, where the base class's ``reduction`` stays "mean" whatever is asked for.
        self._temperature = temperature
        self._reduction = reduction

    def forward(
        self,
        logits_s: Tensor,  # (..., V)
        logits_t: Tensor,  # (..., V)
    ) -> Tensor:
        """The loss of one batch: a scalar, or (...) for reduction "none".

        Args:
            logits_s: (..., V) the student's logits, of any float dtype; views are read where they lie.
            logits_t: (..., V) the teacher's; they get no gradient.

        Raises:
            ValueError, TypeError: naming the argument, as :func:`kdkernels.distillation_loss` does, which calls
                ``logits_t`` teacher.
        """
        divide_by = {"mean": logits_s.numel(), "batchmean": logits_s.shape[0]}.get(self._reduction)
        return kd.distillation_loss(
            logits_s,
            logits_t.detach(),
            temperature=self._temperature,
            reduction=self._reduction if divide_by is None else "mean",
            normalizer=divide_by,
        )

    def extra_repr(self) -> str:
        return f"temperature={self._temperature}, reduction={self._reduction!r}"
