"""``kdkernels::row_loss``: loss, statistics and gradient in one sweep over logits.

Its backward only multiplies the gradient that forward formed by what comes in (``kdkernels::scale_rows``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.native import RowOptions, number_of_stats
from kdkernels.ops._shared import OPTIONS, refuse_double_backward, register, scaled, unpacked

_SCHEMA = (
    "Tensor student, Tensor teacher, Tensor? labels, Tensor row_scale, Tensor? temperatures, "
    f"Tensor? weights, Tensor? members, str backend, {OPTIONS}, bool form_gradient, bool own_gradient"
    ") -> (Tensor loss, Tensor stats, Tensor gradient)"
)


def _outputs(row_scale: Tensor, divergence: str, tail: str) -> tuple[Tensor, Tensor]:
    stats = (number_of_stats(divergence, tail), *row_scale.shape)
    return row_scale.new_empty(row_scale.shape), row_scale.new_empty(stats)


def scales_late(student: Tensor) -> bool:
    """Whether row_scale enters the gradient in backward, with the incoming gradient.

    fp16 cannot hold a gradient divided by the number of tokens; under a loss scale it need not.
    """
    return student.dtype == torch.float16


def _row_loss(
    student: Tensor,  # (..., V_s)
    teacher: Tensor,  # (..., V_t); a sparse one's log-probabilities (..., K)
    labels: Tensor | None,  # (...)
    row_scale: Tensor,  # (...)
    temperatures: Tensor | None,  # (...)
    weights: Tensor | None,  # (3,)
    members: Tensor | None,  # (V,) or (..., V) bool; (..., K) ids
    backend: str,
    *rest: Any,  # the packed options, form_gradient, own_gradient
) -> tuple[Tensor, Tensor, Tensor]:
    *packed_options, form_gradient, _ = rest
    options = unpacked(packed_options, scale_gradient=not scales_late(student))
    loss, stats = _outputs(row_scale, options.divergence, options.tail)
    gradient = backends.sweep(backend, student.device).empty_gradient(student) if form_gradient else None
    backends.row_loss(
        backend, student, teacher, labels, row_scale, temperatures, weights, members, options, gradient, loss, stats
    )
    return loss, stats, student.new_empty(0) if gradient is None else gradient


def _row_loss_fake(
    student: Tensor, teacher: Tensor, labels: Tensor | None, row_scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    divergence, tail, form_gradient = options[4], options[-4], options[-2]
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    return (*_outputs(row_scale, divergence, tail), gradient if form_gradient else student.new_empty(0))


def _incoming(gradient_of_loss: Tensor, row_scale: Tensor, late: bool) -> Tensor:
    """The factor of each row of a saved gradient."""
    factors = gradient_of_loss.to(row_scale.dtype)
    # A row that counts for nothing stays 0, whatever comes in.
    return torch.where(row_scale != 0, factors * row_scale, 1) if late else factors


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor], numbers: Tensor | None = None
) -> None:
    student, row_scale, backend, own_gradient = inputs[0], inputs[3], inputs[7], inputs[-1]
    _, stats, gradient = output
    ctx.mark_non_differentiable(stats, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, row_scale)
    ctx.late = scales_late(student)
    ctx.backend = backend
    ctx.own_gradient = own_gradient
    ctx.inputs = len(inputs)


def _backward(ctx: Any, of_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.inputs - 1)
    if of_loss is None:
        return (None, *nothing)
    refuse_double_backward()
    gradient, row_scale = ctx.saved_tensors
    factors = _incoming(of_loss, row_scale, ctx.late)
    return (scaled(gradient, factors, ctx.backend, own=ctx.own_gradient), *nothing)


#: loss (...), stats (4, 7 or 9, ...), gradient (..., V) or (0,): see the schema above. The second is told changing
#: numbers before all else.
row_loss, row_loss_changing = register(
    "row_loss",
    _SCHEMA,
    _row_loss,
    _row_loss_fake,
    _setup_context,
    _backward,
    options_at=8,
    tags=(torch.Tag.needs_fixed_stride_order,),
)


class EagerRowLoss(torch.autograd.Function):
    """row_loss for eager mode; its gradient is written to new memory, or over the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V_s)
        teacher: Tensor,  # (..., V_t); a sparse one's log-probabilities (..., K)
        labels: Tensor | None,
        row_scale: Tensor,
        temperatures: Tensor | None,
        weights: Tensor | None,
        members: Tensor | None,
        backend: str,
        options: RowOptions,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        loss, stats = _outputs(row_scale, options.divergence, options.tail)
        gradient = student if inplace else backends.sweep(backend, student.device).empty_gradient(student)
        backends.row_loss(
            backend, student, teacher, labels, row_scale, temperatures, weights, members, options, gradient, loss, stats
        )
        if inplace:  # whoever saved these logits for a backward of its own is told that they are gone
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(gradient, row_scale)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.late = scales_late(student)
        ctx.backend = backend
        return loss, stats

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss = gradients[0]
        if of_loss is None:
            return (None,) * 10
        refuse_double_backward()
        gradient, row_scale = ctx.saved_tensors
        factors = _incoming(of_loss, row_scale, ctx.late)
        return (scaled(gradient.detach(), factors, ctx.backend, own=True), *(None,) * 9)


def eager_row_loss(
    student: Tensor,  # (..., V_s)
    teacher: Tensor,  # (..., V_t); a sparse one's log-probabilities (..., K)
    labels: Tensor | None,
    row_scale: Tensor,
    temperatures: Tensor | None,
    weights: Tensor | None,
    members: Tensor | None,
    backend: str,
    options: RowOptions,
    form_gradient: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """loss (...) and stats (4, 7 or 9, ...)."""
    others = (teacher, labels, row_scale, temperatures, weights, members)
    if form_gradient:
        loss, stats = EagerRowLoss.apply(student, *others, backend, options, inplace)
        return loss, stats
    loss, stats = _outputs(row_scale, options.divergence, options.tail)
    backends.row_loss(backend, student.detach(), *others, options, None, loss, stats)
    return loss, stats
