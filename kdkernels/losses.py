"""distillation_loss: logits in, loss out, the gradient formed in the same sweep."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from kdkernels import backends, ops, reference
from kdkernels._arguments import Arguments, LossOptions, check
from kdkernels._row_inputs import members, row_options, row_scale, temperatures, term_weights
from kdkernels.divergences import Divergence
from kdkernels.stats import RowStats
from kdkernels.teachers import TopKTeacher


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | TopKTeacher,
    labels: Tensor | None = ...,
    *,
    return_stats: Literal[False] = ...,
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | TopKTeacher,
    labels: Tensor | None = ...,
    *,
    return_stats: Literal[True],
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, RowStats]: ...
def distillation_loss(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | TopKTeacher,  # logits (..., V), or a few log-probabilities a row
    labels: Tensor | None = None,  # (...)
    *,
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
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Distils a teacher's logits into a student's, token by token over the vocabulary.

    Per token (row), with :math:`p = softmax(y/T)` of the teacher's logits y and :math:`q = softmax(z/T)` of the
    student's logits z,

    .. math:: \mathrm{kd\_weight} \cdot T^2 \cdot D(p, q) + \mathrm{ce\_weight} \cdot CE(label, softmax(z))

    (Hinton et al. 2015, arXiv 1503.02531). Where gradients are enabled and ``student_logits`` requires one, it is
    formed here, in the sweep that computes the loss; backward multiplies it by what comes in. Numbers are fp32 inside.

    Args:
        student_logits: (..., V) float32, bfloat16, float16 or float64; the last dimension contiguous, any strides
            before it (``logits[:, :-1]`` is read in place).
        teacher: (..., V) logits on the same device, of any of these dtypes; or a :class:`~kdkernels.TopKTeacher`, the
            log-probabilities of a few tokens a row, with one of the divergences it serves. Gets no gradient.
        labels: (...) int64, aligned with the logits: nothing is shifted. Rows whose label is ``ignore_index`` count
            for nothing and are not read.
        divergence: a :class:`~kdkernels.Divergence`, or the name of one with its default parameters.
        temperature: T > 0, a number, a 0-dim Tensor or one per row (...). A row whose entry is not positive comes out
            as NaN.
        kd_weight: factor of the divergence.
        ce_weight: factor of the cross-entropy with ``labels``, always at temperature 1.
        scale_by_temperature: multiply the divergence by T², in loss and gradient.
        weight: (...) a weight per token; 0 skips the row.
        reduction: "mean": the sum over rows that count, divided by the sum of their weights (their number without
            ``weight``), and 0 where no row counts; "sum"; "none": a loss per token (...).
        normalizer: a number or 0-dim Tensor that replaces the mean's denominator (``num_items_in_batch``).
        ignore_index: the label of rows that count for nothing.
        vocab_size: columns from here on are padding: no probability, gradient exactly 0. Needed where the two models'
            widths differ.
        student_logit_scale, teacher_logit_scale: multiply a model's logits before everything else.
        student_softcap, teacher_softcap: then x = softcap·tanh(x / softcap).
        inplace: the gradient overwrites the memory of ``student_logits``, which must not be used afterwards and must
            be the output of an operation, not a leaf. Under torch.compile and the reference backend it changes nothing.
        return_stats: also return a :class:`~kdkernels.RowStats`.

    Returns:
        The loss: a scalar, or (...) for reduction "none"; float32 (float64 for a float64 student). With
        ``return_stats``, a pair of it and the statistics.

    Raises:
        ValueError, TypeError: naming the argument, before any work: shapes, devices or dtypes that disagree, labels
            out of range (on the CPU; elsewhere such a row is NaN), unknown names, values out of range.
        RuntimeError: a backend asked for by name cannot serve the call.
    """
    arguments = check(
        student_logits,
        teacher,
        labels,
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        scale_by_temperature=scale_by_temperature,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap,
    )
    form_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    if inplace and form_gradient:
        _check_inplace(student_logits)
    backend = backends.choose(student_logits.device, student_logits.dtype, arguments.teacher.dtype)
    if backend == "reference":
        loss, stats = reference.loss_from(arguments)
        return (loss, stats) if return_stats else loss
    backend = backend if backends.asked() else backends.AUTO
    loss, rows = _fused(arguments, backend, form_gradient, inplace, return_stats)
    if not return_stats:
        return loss
    return loss, RowStats.from_rows(rows, arguments.ce_weight > 0)


def _check_inplace(student: Tensor) -> None:
    if student.is_leaf:
        raise ValueError(
            "inplace=True overwrites student_logits with its gradient, but student_logits is a leaf that requires "
            "grad; pass the output of an operation, or inplace=False"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(student.shape, student.stride(), strict=True)):
        raise ValueError("inplace=True cannot write to student_logits: expanded rows share their memory")


def _fused(a: Arguments, backend: str, form_gradient: bool, inplace: bool, return_stats: bool) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the rows' statistics (4, 7 or 9, ...)."""
    scale = row_scale(a)
    options = row_options(a, scale_gradient=not ops.scales_late(a.student), return_stats=return_stats)
    labels = a.labels if options.reads_labels else None
    tensors = (a.student, a.teacher, labels, scale, temperatures(a, scale), term_weights(a, scale), members(a))
    if ops.plain_eager(*tensors):
        loss, stats = ops.eager_row_loss(*tensors, backend, options, form_gradient, inplace)
    else:
        numbers = ops.changing_numbers(options)
        call = ops.row_loss if numbers is None else partial(ops.row_loss_changing, numbers)
        loss, stats, _ = call(*tensors, backend, *ops.packed(options, numbers), form_gradient, True)
    return loss if a.reduction == "none" else loss.sum(), stats
