"""nn.Module forms: the options at construction, the tensors at call."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from kdkernels._arguments import LossOptions
from kdkernels.divergences import Divergence, resolve
from kdkernels.losses import distillation_loss
from kdkernels.stats import RowStats

_PER_CALL = ("weight", "normalizer")


class DistillationLoss(nn.Module):
    """:func:`kdkernels.distillation_loss` with its options fixed.

    Args:
        inplace, return_stats, **options: the keyword arguments of :func:`~kdkernels.distillation_loss`, but
            ``weight`` and ``normalizer``, which belong to a batch and are given at call.

    Example:
        >>> loss_fn = DistillationLoss(divergence="jensen_shannon", temperature=2.0)
        >>> loss = loss_fn(student_logits, teacher_logits, labels)  # doctest: +SKIP
    """

    def __init__(self, *, inplace: bool = False, return_stats: bool = False, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        unknown = sorted(options.keys() - (LossOptions.__annotations__.keys() - set(_PER_CALL)))
        if unknown:
            hint = "; give it at call" if unknown[0] in _PER_CALL else ""
            raise TypeError(f"DistillationLoss got an unexpected keyword argument {unknown[0]!r}{hint}")
        divergence: Divergence | str = options.get("divergence", "forward_kl")
        resolve(divergence)
        self.inplace = inplace
        self.return_stats = return_stats
        self.options = options

    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher: Tensor,  # (..., V)
        labels: Tensor | None = None,  # (...)
        *,
        weight: Tensor | None = None,  # (...)
        normalizer: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of one batch; ``temperature`` replaces the one given at construction."""
        options: LossOptions = {**self.options, "weight": weight, "normalizer": normalizer}
        if temperature is not None:
            options["temperature"] = temperature
        loss, stats = distillation_loss(
            student_logits, teacher, labels, inplace=self.inplace, return_stats=True, **options
        )
        return (loss, stats) if self.return_stats else loss

    def extra_repr(self) -> str:
        flags = {"inplace": self.inplace, "return_stats": self.return_stats}
        shown = {**self.options, **{name: on for name, on in flags.items() if on}}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
