"""NeMo Automodel's distillation loss: ``nemo_automodel.components.loss.kd_loss.KDLoss`` (0.7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.integrations._conventions import by_row, gathered, require_positive

__all__ = ["KDLoss"]


def _split_vocabulary(logits: Any) -> bool:
    """Whether logits are a DTensor of whose vocabulary each rank has a part."""
    if not hasattr(logits, "placements"):
        return False
    last = (-1, logits.dim() - 1)
    return any(
        getattr(placement, "dim", None) in last and logits.device_mesh.size(axis) > 1
        for axis, placement in enumerate(logits.placements)
    )


def _refuse_group(tp_group: object) -> None:
    if tp_group is not None:
        raise NotImplementedError(
            "tp_group: a vocabulary that is split over ranks is not supported; gather the logits and leave it None"
        )


class KDLoss(nn.Module):
    r"""T²·KL(p‖q), p = softmax(y/T) of the teacher's logits y and q = softmax(z/T) of the student's z.

    Hinton et al. 2015 (arXiv 1503.02531). Summed over the tokens whose label counts, and divided by their number or by
    ``num_batch_labels``.

    Different on purpose: nothing waits for the device, and no logits are copied: tokens that do not count are not read,
    where the original gathers those that do. No label counts: loss and gradient are 0, whatever the logits (the
    original's 0 is NaN where they hold inf). ``num_batch_labels=0`` gives 0. Logits need not be contiguous
    (``logits[:, :-1]``). The teacher gets no gradient. The result is float32, or float64 for float64 logits, which the
    original rounds to float32.

    Args:
        ignore_index: the label of tokens that count for nothing.
        temperature: T > 0.
        fp32_upcast: without effect: numbers are fp32 inside, whatever the logits' dtype.
        tp_group: None. A DTensor of logits is gathered as the original gathers it, unless the student's vocabulary is
            split over ranks.
        chunk_size: without effect: there is nothing to cut.

    Raises:
        NotImplementedError: ``tp_group`` is given.
        ValueError: ``temperature`` is not positive.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: torch.distributed.ProcessGroup | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        _refuse_group(tp_group)
        require_positive("temperature", temperature)
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.fp32_upcast = fp32_upcast
        self.tp_group = tp_group
        self.chunk_size = chunk_size

    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor,  # (...)
        num_batch_labels: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar.

        Args:
            student_logits: (..., V) of any float dtype.
            teacher_logits: (..., V), with the same rows.
            labels: int64, one per row, of that shape or flat; aligned with the logits, nothing is shifted.
            num_batch_labels: what the sum is divided by: the labels that count in all batches of a step; an int or a
                0-dim Tensor, which is not read back. None: the labels that count in this batch.

        Raises:
            NotImplementedError: ``student_logits`` are a DTensor whose vocabulary is split over ranks, or ``tp_group``
                was set.
            ValueError, TypeError: naming the argument, as :func:`kdkernels.distillation_loss` does.
        """
        _refuse_group(self.tp_group)
        if _split_vocabulary(student_logits):
            raise NotImplementedError(
                "student_logits are a DTensor whose vocabulary is split over ranks, which is not supported; pass "
                "student_logits.full_tensor() and teacher_logits.full_tensor()"
            )
        student = gathered(student_logits)
        return kd.distillation_loss(
            student,
            gathered(teacher_logits),
            by_row(gathered(labels), student),
            temperature=self.temperature,
            normalizer=num_batch_labels,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, temperature={self.temperature}"
