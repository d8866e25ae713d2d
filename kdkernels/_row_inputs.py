"""What a checked call becomes for the row sweeps: a scale per row, and the options that kernels are told."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._arguments import RowArguments
from kdkernels.backends.native import RowOptions
from kdkernels.divergences import Decoupled
from kdkernels.ops import is_changing
from kdkernels.strong_sets import Given


def row_options(a: RowArguments, *, scale_gradient: bool, return_stats: bool = True) -> RowOptions:
    strong = a.divergence.strong_set()
    sparse = a.sparse
    # Renormalised within the given ids, neither loss nor gradient knows of another column; statistics do.
    whole = sparse is None or sparse.tail != "renormalize" or a.ce_weight > 0 or return_stats
    return RowOptions(
        divergence=a.divergence.name,
        parameters=a.divergence.parameters(),
        temperature=1.0 if isinstance(a.temperature, Tensor) else float(a.temperature),
        kd_weight=float(a.kd_weight),
        ce_weight=float(a.ce_weight),
        scale_by_temperature=a.scale_by_temperature,
        vocab_size=a.vocab_size,
        student_logit_scale=float(a.student_transform.logit_scale),
        student_softcap=float(a.student_transform.softcap or 0),
        # log-probabilities at a temperature of their own, times it, are logits
        teacher_logit_scale=float(a.teacher_transform.logit_scale if sparse is None else sparse.teacher_temperature),
        teacher_softcap=float(a.teacher_transform.softcap or 0),
        scale_gradient=scale_gradient,
        strong="" if strong is None else strong.name,
        strong_amount=0.0 if strong is None else strong.amount,
        tail="" if sparse is None else sparse.tail,
        whole=whole,
    )


def members(a: RowArguments) -> Tensor | None:  # (V,) or (..., V) bool; (..., K) ids
    """What names the tokens of S: the mask of a :class:`Given` set, or the ids of a sparse teacher."""
    strong = a.divergence.strong_set()
    if a.sparse is not None:
        return a.sparse.ids
    return strong.mask if isinstance(strong, Given) else None


def row_scale(a: RowArguments) -> Tensor:  # (...)
    """What a row's loss counts for in the result: its weight over the mean's denominator, 0 where it counts not."""
    dtype = torch.float64 if a.rows.dtype == torch.float64 else torch.float32
    rows = a.rows.shape
    if a.labels is None and a.weight is None and not isinstance(a.normalizer, Tensor):
        by = (rows.numel() if a.normalizer is None else a.normalizer) if a.reduction == "mean" else 1
        if a.normalizer is None or not is_changing(a.normalizer):
            return torch.full(rows, 1 / by if by else 0.0, dtype=dtype, device=a.rows.device)
    scale = torch.ones(rows, dtype=dtype, device=a.rows.device)
    if a.labels is not None:
        scale = (a.labels != a.ignore_index).to(dtype)
    if a.weight is not None:
        scale = torch.where(scale != 0, a.weight.detach().to(dtype), 0)
    if a.reduction != "mean":
        return scale
    if a.normalizer is None:
        denominator = scale.sum()
    elif isinstance(a.normalizer, Tensor):
        denominator = a.normalizer.detach().reshape(()).to(scale)
    elif a.normalizer == 0:
        return torch.zeros_like(scale)
    else:
        return scale / a.normalizer
    return torch.where(denominator != 0, scale / denominator, 0)


def temperatures(a: RowArguments, scale: Tensor) -> Tensor | None:
    if not isinstance(a.temperature, Tensor):
        return None
    return a.temperature.detach().to(scale).expand(scale.shape)


def term_weights(a: RowArguments, scale: Tensor) -> Tensor | None:  # (3,)
    """A decoupled divergence's weights where one of them is a Tensor: on the device, never read back."""
    weights = a.divergence.weights() if isinstance(a.divergence, Decoupled) else ()
    if not any(isinstance(weight, Tensor) for weight in weights):
        return None
    return torch.stack([_scalar(weight, scale) for weight in weights])


def _scalar(number: float | Tensor, like: Tensor) -> Tensor:  # ()
    if isinstance(number, Tensor):
        return number.detach().to(like)
    # Filled in, a number that changes would be compiled in: see ops.changing_numbers.
    return like.new_ones(()) * number if is_changing(number) else like.new_full((), number)
