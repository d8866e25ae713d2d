"""The registered operators: schema, fake, autograd. The one place that touches torch.library.

``kdkernels::row_loss`` computes loss, statistics and gradient in one sweep; its backward only multiplies the gradient
that forward formed by what comes in (``kdkernels::scale_rows``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from kdkernels import backends
from kdkernels.backends.native import RowOptions, number_of_stats

_LIBRARY = Library("kdkernels", "DEF")
_LIBRARY.define(
    "row_loss("
    "Tensor student, Tensor teacher, Tensor? labels, Tensor row_scale, Tensor? temperatures, "
    "Tensor? weights, Tensor? mask, str backend, str divergence, float[] parameters, str strong, "
    "float strong_amount, float temperature, float kd_weight, float ce_weight, "
    "bool scale_by_temperature, SymInt vocab_size, float student_logit_scale, float student_softcap, "
    "float teacher_logit_scale, float teacher_softcap, bool form_gradient, bool own_gradient"
    ") -> (Tensor loss, Tensor stats, Tensor gradient)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)
_LIBRARY.define("scale_rows(Tensor values, Tensor factors, str backend) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _outputs(row_scale: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    return row_scale.new_empty(row_scale.shape), row_scale.new_empty((number_of_stats(divergence), *row_scale.shape))


def scales_late(student: Tensor) -> bool:
    """Whether row_scale enters the gradient in backward, with the incoming gradient.

    fp16 cannot hold a gradient divided by the number of tokens; under a loss scale it need not.
    """
    return student.dtype == torch.float16


def _row_loss(
    student: Tensor,  # (..., V_s)
    teacher: Tensor,  # (..., V_t)
    labels: Tensor | None,  # (...)
    row_scale: Tensor,  # (...)
    temperatures: Tensor | None,  # (...)
    weights: Tensor | None,  # (3,)
    mask: Tensor | None,  # (V,) or (..., V) bool
    backend: str,
    divergence: str,
    parameters: list[float],
    strong: str,
    strong_amount: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    scale_by_temperature: bool,
    vocab_size: int,
    student_logit_scale: float,
    student_softcap: float,
    teacher_logit_scale: float,
    teacher_softcap: float,
    form_gradient: bool,
    own_gradient: bool,  # the caller drops the third output, so that backward may scale it where it lies
) -> tuple[Tensor, Tensor, Tensor]:
    options = RowOptions(
        divergence,
        tuple(parameters),
        temperature,
        kd_weight,
        ce_weight,
        scale_by_temperature,
        vocab_size,
        student_logit_scale,
        student_softcap,
        teacher_logit_scale,
        teacher_softcap,
        scale_gradient=not scales_late(student),
        strong=strong,
        strong_amount=strong_amount,
    )
    loss, stats = _outputs(row_scale, divergence)
    gradient = backends.sweep(backend, student.device).empty_gradient(student) if form_gradient else None
    backends.row_loss(
        backend, student, teacher, labels, row_scale, temperatures, weights, mask, options, gradient, loss, stats
    )
    return loss, stats, student.new_empty(0) if gradient is None else gradient


def _row_loss_fake(
    student: Tensor, teacher: Tensor, labels: Tensor | None, row_scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    divergence, form_gradient = options[4], options[-2]
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    return (*_outputs(row_scale, divergence), gradient if form_gradient else student.new_empty(0))


def _scale_rows(values: Tensor, factors: Tensor, backend: str) -> Tensor:
    sweep = backends.sweep(backend, values.device)
    out = sweep.empty_gradient(values)
    sweep.scale_rows(values, factors, out)
    return out


def _scale_rows_fake(values: Tensor, factors: Tensor, backend: str) -> Tensor:
    return torch.empty_like(values)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():  # backward runs with gradients enabled under create_graph=True alone
        raise RuntimeError(
            "kdkernels forms no gradient of a gradient (create_graph=True); "
            'use kdkernels.reference.distillation_loss or kdkernels.backends.use("reference") for that'
        )


def _incoming(gradient_of_loss: Tensor, row_scale: Tensor, late: bool) -> Tensor:
    """The factor of each row of a saved gradient."""
    factors = gradient_of_loss.to(row_scale.dtype)
    # A row that counts for nothing stays 0, whatever comes in.
    return torch.where(row_scale != 0, factors * row_scale, 1) if late else factors


def _scaled(gradient: Tensor, factors: Tensor, backend: str, *, own: bool) -> Tensor:
    """gradient·factors: in the gradient's own memory where nothing else will read it, else in new memory."""
    eager = type(gradient) is Tensor and not torch.compiler.is_compiling()
    if own and eager and not torch._C._autograd._get_current_graph_task_keep_graph():
        backends.sweep(backend, gradient.device).scale_rows(gradient, factors, gradient)
        return gradient
    return torch.ops.kdkernels.scale_rows.default(gradient, factors, backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
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
    _refuse_double_backward()
    gradient, row_scale = ctx.saved_tensors
    factors = _incoming(of_loss, row_scale, ctx.late)
    return (_scaled(gradient, factors, ctx.backend, own=ctx.own_gradient), *nothing)


_LIBRARY.impl("row_loss", _row_loss, "CompositeExplicitAutograd")
_LIBRARY.impl("scale_rows", _scale_rows, "CompositeExplicitAutograd")
torch.library.register_fake("kdkernels::row_loss", _row_loss_fake, lib=_LIBRARY)
torch.library.register_fake("kdkernels::scale_rows", _scale_rows_fake, lib=_LIBRARY)
torch.library.register_autograd("kdkernels::row_loss", _backward, setup_context=_setup_context, lib=_LIBRARY)

#: loss (...), stats (4 or 9, ...), gradient (..., V) or (0,): see the schema above.
row_loss = torch.ops.kdkernels.row_loss.default


def plain_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks on: no compiler, tensor subclass, dispatch mode or function transform.

    Then :class:`EagerRowLoss` computes the same as the registered operator, with less overhead.
    """
    return (
        not torch.compiler.is_compiling()
        and all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class EagerRowLoss(torch.autograd.Function):
    """row_loss for eager mode; its gradient is written to new memory, or over the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (..., V_s)
        teacher: Tensor,  # (..., V_t)
        labels: Tensor | None,
        row_scale: Tensor,
        temperatures: Tensor | None,
        weights: Tensor | None,
        mask: Tensor | None,
        backend: str,
        options: RowOptions,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        loss, stats = _outputs(row_scale, options.divergence)
        gradient = student if inplace else backends.sweep(backend, student.device).empty_gradient(student)
        backends.row_loss(
            backend, student, teacher, labels, row_scale, temperatures, weights, mask, options, gradient, loss, stats
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
        _refuse_double_backward()
        gradient, row_scale = ctx.saved_tensors
        factors = _incoming(of_loss, row_scale, ctx.late)
        return (_scaled(gradient.detach(), factors, ctx.backend, own=True), *(None,) * 9)


def eager_row_loss(
    student: Tensor,  # (..., V_s)
    teacher: Tensor,  # (..., V_t)
    labels: Tensor | None,
    row_scale: Tensor,
    temperatures: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    backend: str,
    options: RowOptions,
    form_gradient: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """loss (...) and stats (4 or 9, ...)."""
    others = (teacher, labels, row_scale, temperatures, weights, mask)
    if form_gradient:
        loss, stats = EagerRowLoss.apply(student, *others, backend, options, inplace)
        return loss, stats
    loss, stats = _outputs(row_scale, options.divergence)
    backends.row_loss(backend, student.detach(), *others, options, None, loss, stats)
    return loss, stats
