"""Liger Kernel's distillation losses (liger-kernel 0.8.5): two from hidden states, one from log-probabilities.

``liger_kernel.transformers.LigerFusedLinearJSD`` and ``LigerKLDIVLoss``, and
``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``: same constructors, calls and values, on any device. T² is in none
of them. Scalars are float32 (float64 for float64 inputs).

p is the teacher's and q the student's distribution; the generalised Jensen-Shannon divergence is, with
M = beta·p + (1 - beta)·q, beta·KL(p‖M) + (1 - beta)·KL(q‖M), where beta = 0 means KL(p‖q) and beta = 1 KL(q‖p).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.integrations._conventions import require_positive

__all__ = ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss", "LigerKLDIVLoss"]


class LigerFusedLinearJSD(nn.Module):
    """Jensen-Shannon divergence of softmax(z/T), from hidden states and lm_head weights; a mean over tokens.

    The sum over the tokens whose label counts, divided by their number; without labels, by all tokens'. Where none
    counts, loss and gradients are 0. The host does not wait for the device, as the original's forward and backward do.

    Args:
        jsd_beta: beta, in [0, 1]; fixed here.
        ignore_index: the label of tokens that count for nothing.
        temperature: T > 0.
        accum_dtype: without effect: the weight's gradient is summed in fp32 always, and has the weight's dtype.

    Raises:
        ValueError: ``temperature`` or ``jsd_beta`` is out of range.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        self._divergence = kd.JensenShannon(jsd_beta)  # here: torch.compile does not trace its checks
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    @property
    def jsd_beta(self) -> float:
        return self._divergence.beta

    def forward(
        self,
        student_input: Tensor,  # (BT, H)
        student_weight: Tensor,  # (V, H)
        teacher_input: Tensor,  # (BT, H')
        teacher_weight: Tensor,  # (V, H')
        shift_labels: Tensor | None = None,  # (BT,)
    ) -> Tensor:
        """The loss of one batch, a scalar.

        Args:
            student_input: (BT, H) last hidden states, or (..., H).
            student_weight: (V, H) lm_head.weight.
            teacher_input: (BT, H') the teacher's; it and its weight get no gradient.
            teacher_weight: (V, H').
            shift_labels: (BT,) int64, aligned with the hidden states, used as a mask alone; or None.

        Raises:
            ValueError, TypeError: naming the argument, as :func:`kdkernels.linear_distillation_loss` does.
        """
        return kd.linear_distillation_loss(
            student_input,
            student_weight,
            kd.LinearTeacher(teacher_input.detach(), teacher_weight),
            shift_labels,
            divergence=self._divergence,
            temperature=self.temperature,
            scale_by_temperature=False,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return f"jsd_beta={self.jsd_beta}, ignore_index={self.ignore_index}, temperature={self.temperature}"


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss·CE(label, softmax(z)) + weight_soft_loss·JSD of softmax(z/T), from hidden states and weights.

    Both are means over the tokens whose label counts, cross-entropy at temperature 1; where none counts, 0.

    Different on purpose:

    - A teacher with more tokens than the student, as one whose vocabulary is padded: the original gives the student a
      logit of 0 for each of them, tokens that it does not have and that take probability from those it has. Here the
      teacher's columns beyond the student's are padding and have no probability.
    - Logits and their softmax are fp32 and so is the sum of the weight's gradient, where the original's are of the
      inputs' dtype.
    - The soft and the hard loss of ``return_soft_hard_loss`` are detached. The original's seem to belong to the graph,
      and give a gradient of 0.

    Args:
        weight_hard_loss: factor of the cross-entropy, not negative.
        weight_soft_loss: factor of the divergence.
        beta: in [0, 1]; fixed here.
        ignore_index: the label of tokens that count for nothing.
        temperature: T > 0.
        compiled: without effect.
        chunk_size: without effect; chunks are chosen from the sizes (``workspace_bytes`` of
            :func:`kdkernels.linear_distillation_loss`).
        return_soft_hard_loss: return (loss, soft loss, hard loss), the latter two without their weights. From the same
            sweep, but for ``weight_hard_loss=0``, where the hard loss takes another, without gradient.

    Raises:
        ValueError: ``temperature``, ``beta`` or ``weight_hard_loss`` is out of range.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        if not weight_hard_loss >= 0:
            raise ValueError(f"weight_hard_loss must not be negative, got {weight_hard_loss}")
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self._divergence = kd.JensenShannon(beta)
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    @property
    def beta(self) -> float:
        return self._divergence.beta

    def forward(
        self,
        student_input: Tensor,  # (BT, H)
        student_weight: Tensor,  # (V, H)
        teacher_input: Tensor,  # (BT, H')
        teacher_weight: Tensor,  # (V', H')
        true_labels: Tensor,  # (BT,)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V',)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of one batch, a scalar; with ``return_soft_hard_loss``, three.

        Args:
            student_input: (BT, H) last hidden states, or (..., H).
            student_weight: (V, H) lm_head.weight.
            teacher_input: (BT, H') the teacher's; nothing of the teacher gets a gradient.
            teacher_weight: (V', H'), V' >= V.
            true_labels: (BT,) int64, aligned with the hidden states: nothing is shifted.
            student_bias: (V,) or None.
            teacher_bias: (V',) or None.

        Raises:
            ValueError: the student has more tokens than the teacher.
            ValueError, TypeError: naming the argument, as :func:`kdkernels.linear_distillation_loss` does.
        """
        student, teacher = student_weight.shape[0], teacher_weight.shape[0]
        if student > teacher:
            raise ValueError(
                f"teacher_weight must have at least the {student} rows of student_weight, got {teacher}: the student's "
                "other tokens have no teacher"
            )

        def swept(kd_weight: float, ce_weight: float) -> tuple[Tensor, kd.RowStats]:
            return kd.linear_distillation_loss(
                student_input,
                student_weight,
                kd.LinearTeacher(teacher_input.detach(), teacher_weight, teacher_bias),
                true_labels,
                student_bias=student_bias,
                divergence=self._divergence,
                temperature=self.temperature,
                kd_weight=kd_weight,
                ce_weight=ce_weight,
                scale_by_temperature=False,
                ignore_index=self.ignore_index,
                vocab_size=student,
                return_stats=True,
            )

        loss, stats = swept(self.weight_soft_loss, self.weight_hard_loss)
        if not self.return_soft_hard_loss:
            return loss
        count = (true_labels != self.ignore_index).sum().clamp(min=1)
        if stats.cross_entropy is not None:
            return loss, stats.divergence.sum() / count, stats.cross_entropy.sum() / count
        with torch.no_grad():
            return loss, stats.divergence.sum() / count, swept(0.0, 1.0)[0]

    def extra_repr(self) -> str:
        return (
            f"weight_hard_loss={self.weight_hard_loss}, weight_soft_loss={self.weight_soft_loss}, beta={self.beta}, "
            f"ignore_index={self.ignore_index}, temperature={self.temperature}"
        )


_REDUCTIONS = ("mean", "batchmean", "sum")


class LigerKLDIVLoss(nn.KLDivLoss):
    """KL(p‖q) from the student's log-probabilities and the teacher's probabilities or log-probabilities.

    Log-probabilities are logits, and taken as such: each row of either model is normalised, which changes nothing where
    it is a distribution already. So the student's logits may be given as they are, without the log_softmax and its
    memory; and with ``log_target=True`` so may the teacher's.

    The gradient with respect to ``y_pred`` is q - p (over the divisor), where the original's is -p. What comes out of
    the log_softmax before it is the same: its backward takes q·Σ of what comes in away, which is q for -p and 0 for
    q - p. Where ``y_pred`` does not come from a log_softmax, the two differ, and this one is the gradient of KL.

    Probabilities (``log_target=False``, the default) take a copy of ``y_true`` in fp32, its logarithm, until the loss
    is formed; log-probabilities take none.

    Args:
        eps: without effect: 0·log 0 is 0 here. The original takes log(eps) for that of smaller probabilities, which
            adds less than V·eps/e to a row's loss.
        size_average, reduce: torch's deprecated ones.
        reduction: "mean": the sum divided by the number of elements, vocabulary included; "batchmean": by the first
            dimension; "sum".
        log_target: ``y_true`` are log-probabilities.

    Raises:
        NotImplementedError: ``reduction`` is "none", a loss per element of (BT, V); a loss per token is
            :func:`kdkernels.distillation_loss` with ``reduction="none"``.
        ValueError: ``reduction`` is unknown.
    """

    def __init__(
        self,
        eps: float = 1e-10,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__(size_average, reduce, reduction, log_target)
        if self.reduction == "none":
            raise NotImplementedError(
                "reduction='none' is a loss per element, (BT, V), which is never formed; "
                "kd.distillation_loss(..., reduction='none') gives one per token"
            )
        if self.reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {self.reduction!r}")
        self.eps = eps

    def forward(
        self,
        y_pred: Tensor,  # (BT, V)
        y_true: Tensor,  # (BT, V)
    ) -> Tensor:
        """The loss of one batch, a scalar.

        Args:
            y_pred: (BT, V) the student's log-probabilities, or its logits; any dimensions before the last.
            y_true: (BT, V) the teacher's probabilities, or with ``log_target`` log-probabilities; gets no gradient. A
                row of probabilities that are all 0 is NaN.

        Raises:
            ValueError, TypeError: naming the argument, as :func:`kdkernels.distillation_loss` does, which calls them
                student_logits and teacher.
        """
        target = y_true.detach()
        if not self.log_target:
            widened = target.to(torch.promote_types(target.dtype, torch.float32))
            target = widened.log() if widened.dtype == target.dtype else widened.log_()
        divide_by = {"mean": y_pred.numel(), "batchmean": y_pred.shape[0]}.get(self.reduction)
        return kd.distillation_loss(
            y_pred, target, reduction="sum" if divide_by is None else "mean", normalizer=divide_by
        )
