"""torchtune's distillation losses: ``torchtune.modules.loss`` (0.6.1), its ``kd_losses.py``.

Same constructors, calls and values: no temperature, a mean over the tokens whose label counts, and labels that are
aligned with the logits already. As there, forward KL is the cross-entropy -Σ p log q: KL(p‖q) plus the teacher's
entropy H(p), which has no gradient. It is taken as log V - KL(p‖uniform) by one more sweep, which reads the teacher and
forms no gradient, and is off by less than about 1e-5; ``teacher_entropy=False`` saves it and returns KL(p‖q) itself.

Different on purpose:

- No label counts: the loss is a 0 that belongs to the graph, its gradient 0. The originals return a detached 0, which
  backward refuses and for which they wait for the device, or 0/0.
- A logit of -inf rules a token out. The originals leave out each token that has one: their reverse KL's gradient is
  NaN then, and their forward KL loses the teacher's probability of a token that the student alone rules out. Here that
  makes forward KL infinite, as it makes reverse KL where the teacher alone does; a token that both rule out counts for
  nothing.
- The teacher gets no gradient.
- Logits are read where they lie, in their dtype, and 3 dimensions need no flattening. The result is float32, or
  float64 for float64 logits, which the originals round to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.integrations._conventions import by_row

__all__ = [
    "ForwardKLLoss",
    "ForwardKLWithChunkedOutputLoss",
    "ReverseKLLoss",
    "ReverseKLWithChunkedOutputLoss",
    "SymmetricKLLoss",
    "SymmetricKLWithChunkedOutputLoss",
]


def _entropy(
    teacher: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    ignore_index: int,
) -> Tensor:  # ()
    """H(p) = log V - KL(p‖uniform), summed over the tokens that count."""
    vocab_size = teacher.shape[-1]
    uniform = teacher.new_zeros(vocab_size).expand_as(teacher)  # one row in memory
    from_uniform = kd.distillation_loss(uniform, teacher, labels, ignore_index=ignore_index, reduction="none")
    return torch.where(labels != ignore_index, math.log(vocab_size) - from_uniform, 0).sum()


class _Loss(nn.Module):
    def __init__(self, ignore_index: int, forward_share: float, teacher_entropy: bool) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.teacher_entropy = teacher_entropy
        self._forward_share = forward_share
        self._divergence = kd.SymmetricKL(1 - forward_share)  # here: torch.compile does not trace its checks

    def _total(
        self, students: Sequence[Tensor], teachers: Sequence[Tensor], labels: Sequence[Tensor], normalize: bool
    ) -> Tensor:
        """share·(KL(p‖q) + H(p)) + (1 - share)·KL(q‖p) over all chunks' tokens; every chunk is swept where it lies."""
        labels = [by_row(label, student) for student, label in zip(students, labels, strict=True)]
        count = torch.stack([(label != self.ignore_index).sum() for label in labels]).sum() if normalize else None
        losses = [
            kd.distillation_loss(
                student,
                teacher,
                label,
                divergence=self._divergence,
                ignore_index=self.ignore_index,
                reduction="sum" if count is None else "mean",
                normalizer=count,
            )
            for student, teacher, label in zip(students, teachers, labels, strict=True)
        ]
        if self.teacher_entropy and self._forward_share:
            entropy = torch.stack(
                [_entropy(teacher, label, self.ignore_index) for teacher, label in zip(teachers, labels, strict=True)]
            ).sum()
            losses.append(self._forward_share * (entropy if count is None else entropy / count.clamp(min=1)))
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, teacher_entropy={self.teacher_entropy}"


class _WholeLoss(_Loss):
    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor,  # (...)
        normalize: bool = True,
    ) -> Tensor:
        """The loss of one batch, a scalar.

        Args:
            student_logits: (..., V), torchtune's (batch·tokens, V) or with any dimensions before the last.
            teacher_logits: (..., V), with the same rows.
            labels: int64, one per row, of that shape or flat; ``ignore_index`` counts for nothing.
            normalize: divide by the number of labels that count; else the sum.

        Raises:
            ValueError, TypeError: naming the argument, as :func:`kdkernels.distillation_loss` does.
        """
        return self._total([student_logits], [teacher_logits], [labels], normalize)


class _ChunkedLoss(_Loss):
    def __init__(self, num_output_chunks: int, ignore_index: int, forward_share: float, teacher_entropy: bool) -> None:
        super().__init__(ignore_index, forward_share, teacher_entropy)
        self.num_output_chunks = num_output_chunks

    def forward(
        self,
        student_logits: list[Tensor],  # chunks (batch, tokens/num_output_chunks, V)
        teacher_logits: list[Tensor],
        labels: Tensor,  # (batch, tokens)
    ) -> Tensor:
        """The loss of one batch, a scalar: a mean over all chunks' labels that count. Chunks are not joined.

        Args:
            student_logits: as ``hidden.chunk(num_output_chunks, dim=1)`` and the output layer give them.
            teacher_logits: likewise.
            labels: (batch, tokens) int64, cut here as ``labels.chunk(num_output_chunks, dim=1)``.

        Raises:
            ValueError: not as many chunks of one model as of the other, or as of the labels (the originals leave out
                what is over); and what :func:`kdkernels.distillation_loss` raises.
        """
        chunks = labels.chunk(self.num_output_chunks, dim=1)
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if len(logits) != len(chunks):
                raise ValueError(
                    f"{name} must have {len(chunks)} chunks, as labels {tuple(labels.shape)} have with "
                    f"num_output_chunks={self.num_output_chunks}, got {len(logits)}"
                )
        return self._total(student_logits, teacher_logits, chunks, True)


def _checked_ratio(sym_kd_ratio: float) -> float:
    if not 0 <= sym_kd_ratio <= 1:
        raise ValueError(f"sym_kd_ratio must be in the range [0, 1], got {sym_kd_ratio}")
    return sym_kd_ratio


class ForwardKLLoss(_WholeLoss):
    """-Σ p log q = KL(p‖q) + H(p), p the teacher's and q the student's distribution; a mean over tokens.

    Args:
        ignore_index: the label of tokens that count for nothing.
        teacher_entropy: False returns KL(p‖q), with the same gradient: not as torchtune, and a sweep less.
    """

    def __init__(self, ignore_index: int = -100, *, teacher_entropy: bool = True) -> None:
        super().__init__(ignore_index, 1.0, teacher_entropy)


class ReverseKLLoss(_WholeLoss):
    """KL(q‖p), p the teacher's and q the student's distribution; a mean over tokens.

    Args:
        ignore_index: the label of tokens that count for nothing.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ignore_index, 0.0, False)


class SymmetricKLLoss(_WholeLoss):
    """sym_kd_ratio·(KL(p‖q) + H(p)) + (1 - sym_kd_ratio)·KL(q‖p); a mean over tokens.

    Args:
        sym_kd_ratio: what forward KL counts for, in [0, 1]; fixed here.
        ignore_index: the label of tokens that count for nothing.
        teacher_entropy: False leaves H(p) out, as in :class:`ForwardKLLoss`.

    Raises:
        ValueError: ``sym_kd_ratio`` is not in [0, 1].
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100, *, teacher_entropy: bool = True) -> None:
        super().__init__(ignore_index, _checked_ratio(sym_kd_ratio), teacher_entropy)

    @property
    def sym_kd_ratio(self) -> float:
        return self._forward_share


class ForwardKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`ForwardKLLoss` of logits in chunks.

    Args:
        num_output_chunks: into how many chunks of tokens the logits are cut.
        ignore_index: the label of tokens that count for nothing.
        teacher_entropy: see :class:`ForwardKLLoss`.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100, *, teacher_entropy: bool = True) -> None:
        super().__init__(num_output_chunks, ignore_index, 1.0, teacher_entropy)


class ReverseKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`ReverseKLLoss` of logits in chunks.

    Args:
        num_output_chunks: into how many chunks of tokens the logits are cut.
        ignore_index: the label of tokens that count for nothing.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index, 0.0, False)


class SymmetricKLWithChunkedOutputLoss(_ChunkedLoss):
    """:class:`SymmetricKLLoss` of logits in chunks.

    Args:
        num_output_chunks: into how many chunks of tokens the logits are cut.
        sym_kd_ratio: what forward KL counts for, in [0, 1]; fixed here.
        ignore_index: the label of tokens that count for nothing.
        teacher_entropy: see :class:`ForwardKLLoss`.

    Raises:
        ValueError: ``sym_kd_ratio`` is not in [0, 1].
    """

    def __init__(
        self,
        num_output_chunks: int = 8,
        sym_kd_ratio: float = 0.5,
        ignore_index: int = -100,
        *,
        teacher_entropy: bool = True,
    ) -> None:
        super().__init__(num_output_chunks, ignore_index, _checked_ratio(sym_kd_ratio), teacher_entropy)

    @property
    def sym_kd_ratio(self) -> float:
        return self._forward_share
