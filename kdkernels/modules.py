"""nn.Module forms: the options at construction, the tensors at call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kdkernels._arguments import LossOptions
from kdkernels.divergences import resolve
from kdkernels.linear import linear_distillation_loss
from kdkernels.losses import distillation_loss
from kdkernels.stats import RowStats
from kdkernels.teachers import LinearTeacher, TopKTeacher

_PER_CALL = ("weight", "normalizer")


def _check_options(module: str, options: LossOptions) -> None:
    unknown = sorted(options.keys() - (LossOptions.__annotations__.keys() - set(_PER_CALL)))
    if unknown:
        hint = "; give it at call" if unknown[0] in _PER_CALL else ""
        raise TypeError(f"{module} got an unexpected keyword argument {unknown[0]!r}{hint}")
    resolve(options.get("divergence", "forward_kl"))


def _for_call(
    options: LossOptions, weight: Tensor | None, normalizer: float | Tensor | None, temperature: float | Tensor | None
) -> LossOptions:
    given: LossOptions = {**options, "weight": weight, "normalizer": normalizer}
    if temperature is not None:
        given["temperature"] = temperature
    return given


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
        _check_options("DistillationLoss", options)
        self.inplace = inplace
        self.return_stats = return_stats
        self.options = options

    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher: Tensor | TopKTeacher,  # (..., V)
        labels: Tensor | None = None,  # (...)
        *,
        weight: Tensor | None = None,  # (...)
        normalizer: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of one batch; ``temperature`` replaces the one given at construction."""
        options = _for_call(self.options, weight, normalizer, temperature)
        call = partial(distillation_loss, student_logits, teacher, labels, inplace=self.inplace, **options)
        return call(return_stats=True) if self.return_stats else call()

    def extra_repr(self) -> str:
        return _shown(self.options, inplace=self.inplace, return_stats=self.return_stats)


class LinearDistillationLoss(nn.Module):
    """:func:`kdkernels.linear_distillation_loss` with its options fixed.

    Args:
        logits_dtype, workspace_bytes, compact, return_stats, **options: the keyword arguments of
            :func:`~kdkernels.linear_distillation_loss`, but ``student_bias``, ``weight`` and ``normalizer``, which are
            given at call.

    Example:
        >>> loss_fn = LinearDistillationLoss(divergence="jensen_shannon", temperature=2.0)
        >>> teacher = LinearTeacher(teacher_hidden, teacher_model.lm_head.weight)  # doctest: +SKIP
        >>> loss = loss_fn(hidden, student_model.lm_head.weight, teacher, labels)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        logits_dtype: torch.dtype = torch.float32,
        workspace_bytes: int | None = None,
        compact: bool = False,
        return_stats: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        _check_options("LinearDistillationLoss", options)
        self.logits_dtype = logits_dtype
        self.workspace_bytes = workspace_bytes
        self.compact = compact
        self.return_stats = return_stats
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,  # (..., H_s)
        student_weight: Tensor,  # (V, H_s)
        teacher: LinearTeacher | TopKTeacher | Tensor,
        labels: Tensor | None = None,  # (...)
        *,
        student_bias: Tensor | None = None,  # (V,)
        weight: Tensor | None = None,  # (...)
        normalizer: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of one batch; ``temperature`` replaces the one given at construction."""
        options = _for_call(self.options, weight, normalizer, temperature)
        call = partial(
            linear_distillation_loss,
            student_hidden,
            student_weight,
            teacher,
            labels,
            student_bias=student_bias,
            logits_dtype=self.logits_dtype,
            workspace_bytes=self.workspace_bytes,
            compact=self.compact,
            **options,
        )
        return call(return_stats=True) if self.return_stats else call()

    def extra_repr(self) -> str:
        own: dict[str, object] = {"logits_dtype": self.logits_dtype, "workspace_bytes": self.workspace_bytes}
        usual = (torch.float32, None)
        set_here = {name: value for name, value in own.items() if value not in usual}
        return _shown({**self.options, **set_here}, compact=self.compact, return_stats=self.return_stats)


def _shown(options: Mapping[str, object], **flags: bool) -> str:
    shown = {**options, **{name: on for name, on in flags.items() if on}}
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())
