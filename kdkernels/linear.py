"""linear_distillation_loss: hidden states in, loss out; the logits of more than a chunk of tokens never exist."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from kdkernels import backends, ops, reference
from kdkernels._arguments import LossOptions
from kdkernels._linear_arguments import LinearArguments, check_linear
from kdkernels._row_inputs import members, row_options, row_scale, temperatures, term_weights
from kdkernels.divergences import Divergence
from kdkernels.stats import RowStats
from kdkernels.teachers import LinearTeacher, TopKTeacher


@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: LinearTeacher | TopKTeacher | Tensor,
    labels: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    logits_dtype: torch.dtype = ...,
    workspace_bytes: int | None = ...,
    compact: bool = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: LinearTeacher | TopKTeacher | Tensor,
    labels: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    logits_dtype: torch.dtype = ...,
    workspace_bytes: int | None = ...,
    compact: bool = ...,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, RowStats]: ...
def linear_distillation_loss(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor,  # (V, H_s)
    teacher: LinearTeacher | TopKTeacher | Tensor,  # or logits (..., V)
    labels: Tensor | None = None,  # (...)
    *,
    student_bias: Tensor | None = None,  # (V,)
    logits_dtype: torch.dtype = torch.float32,
    workspace_bytes: int | None = None,
    compact: bool = False,
    divergence: Divergence | str = "forward_kl",
    temperature: float | Tensor = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    scale_by_temperature: bool = True,
    weight: Tensor | None = None,  # (...)
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Distils over the vocabulary from hidden states: output embedding (lm_head) and loss in one.

    The loss of :func:`kdkernels.distillation_loss` on the logits

    .. math:: z = student\_hidden \cdot student\_weight^\top + student\_bias

    and the teacher's, likewise or as they are given. Logits are formed for a chunk of tokens at a time; their gradient
    goes at once into those of ``student_hidden``, ``student_weight`` and ``student_bias``, of which only those that are
    required are computed: four matrix products in all, or as few as are needed. The weight's gradient is summed in
    fp32. Where ``reduction`` is "none" the forward pass forms no gradient and backward computes the logits again.

    Args:
        student_hidden: (..., H_s) the student's last hidden states: float32, bfloat16, float16 or float64. Finite in
            rows that count for nothing too, unless ``compact``: 0·NaN is NaN in a product.
        student_weight: (V, H_s) its output embedding, of the dtype of ``student_hidden``. Under torch.autocast both
            may have any of them, products are computed in autocast's, and gradients have the dtypes of their tensors.
        teacher: a :class:`~kdkernels.LinearTeacher`, whose hidden size may differ; a Tensor of logits (..., V); or a
            :class:`~kdkernels.TopKTeacher`. Its tail "renormalize" needs the logits of the given ids alone: where
            neither cross-entropy nor statistics are asked for, nothing else is computed. Gets no gradient.
        labels: (...) int64, aligned with the hidden states: nothing is shifted.
        student_bias: (V,) of any float dtype; added in the logits' dtype.
        logits_dtype: float32: logits as the products sum them. The dtype of 16-bit operands: logits rounded to it,
            which takes less time and memory, and destroys the gradient where the models nearly agree (docs/linear.md).
            Operands of float32 and float64 have logits of their own dtype; where the logits of a sparse teacher's ids
            are all there is, they are float32 too.
        workspace_bytes: a bound on what holds the chunk's logits and their gradients; at least one row's are held. The
            gradients that are returned are not part of it, nor is the fp32 sum of the weight's gradient where the
            tokens do not fit at once. None: chosen from measurements (docs/performance.md).
        compact: leave tokens that count for nothing (ignored labels, weight 0) out of the products, not only out of
            the loss. The host waits for the device once, to learn how many there are; under torch.compile and CUDA
            graph capture it changes nothing. docs/linear.md says when it pays.
        return_stats: also return a :class:`~kdkernels.RowStats`.

    All other arguments are those of :func:`kdkernels.distillation_loss`.

    Returns:
        The loss: a scalar, or (...) for reduction "none"; float32 (float64 for float64 hidden states). With
        ``return_stats``, a pair of it and the statistics.

    Raises:
        ValueError, TypeError: naming the argument, before any work: shapes, devices or dtypes that disagree, a DTensor
            (pass the gathered tensor), and all that :func:`kdkernels.distillation_loss` raises.
        RuntimeError: a backend asked for by name cannot serve the call; or a gradient of the gradient is asked for.
    """
    options: LossOptions = {
        "divergence": divergence,
        "temperature": temperature,
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "scale_by_temperature": scale_by_temperature,
        "weight": weight,
        "reduction": reduction,
        "normalizer": normalizer,
        "ignore_index": ignore_index,
        "vocab_size": vocab_size,
        "student_logit_scale": student_logit_scale,
        "student_softcap": student_softcap,
        "teacher_logit_scale": teacher_logit_scale,
        "teacher_softcap": teacher_softcap,
    }
    arguments = check_linear(
        student_hidden, student_weight, teacher, labels, student_bias, logits_dtype, workspace_bytes, **options
    )
    teacher_dtype = arguments.logits_dtype if arguments.teacher_weight is not None else arguments.teacher.dtype
    backend = backends.choose(student_hidden.device, arguments.logits_dtype, teacher_dtype)
    if backend == "reference":
        loss, stats = reference.linear_distillation_loss(
            student_hidden, student_weight, teacher, labels, student_bias=student_bias, return_stats=True, **options
        )
        return (loss, stats) if return_stats else loss
    loss, rows = _fused(arguments, backend if backends.asked() else backends.AUTO, compact, return_stats)
    return (loss, RowStats.from_rows(rows, ce_weight > 0)) if return_stats else loss


def _fused(a: LinearArguments, backend: str, compact: bool, return_stats: bool) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the rows' statistics (4, 7 or 9, ...)."""
    scale = row_scale(a.rows)
    options = row_options(a.rows, scale_gradient=True, return_stats=return_stats)
    per_row = a.rows.reduction == "none"
    factor = None
    if not per_row:
        scale, factor = ops.relative(scale, a.compute_dtype or a.hidden.dtype)
    formed = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (a.hidden, a.weight, a.bias)
    ]
    tensors = (
        a.hidden,
        a.weight,
        a.bias,
        a.teacher,
        a.teacher_weight,
        a.teacher_bias,
        a.rows.labels,
        scale,
        temperatures(a.rows, scale),
        term_weights(a.rows, scale),
        members(a.rows),
    )
    numbers = ops.changing_numbers(options)  # none in eager mode
    settings = (
        backend,
        *ops.packed(options, numbers),
        a.compute_dtype,
        a.logits_dtype,
        a.workspace_bytes,
        compact and not torch.compiler.is_compiling(),
        per_row,
        formed,
        True,
    )
    if ops.plain_eager(*tensors):
        loss, stats = ops.eager_linear_loss(*tensors, *settings)
    else:
        call = ops.linear_loss if numbers is None else partial(ops.linear_loss_changing, numbers)
        loss, stats, *_ = call(*tensors, *settings)
    return loss if factor is None else loss * factor, stats
