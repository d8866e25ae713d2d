"""``kdkernels::linear_loss``: from hidden states and output embeddings to loss and gradients, in chunks of rows.

A reduced loss forms its gradients in forward, and backward multiplies them by the scalar that comes in. A loss per row
forms none: its backward is the operator once more, with the rows scaled by what comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels import _gathered_rows, _linear_rows
from kdkernels._linear_rows import LinearProblem, Wanted, compacted
from kdkernels.backends.native import number_of_stats
from kdkernels.ops._shared import OPTIONS, plain_eager, refuse_double_backward, register, scaled, unpacked

_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? labels, Tensor row_scale, Tensor? temperatures, Tensor? weights, Tensor? members, str backend, "
    f"{OPTIONS}, ScalarType? compute_dtype, ScalarType logits_dtype, SymInt? workspace_bytes, bool compact, "
    "bool per_row, bool[] gradients, bool own_gradients"
    ") -> (Tensor loss, Tensor stats, Tensor of_hidden, Tensor of_weight, Tensor of_bias)"
)
_OPERANDS = 12  # tensors and backend, before the packed options
_TAIL = _OPERANDS + 13  # where these name a sparse teacher's tail
# In fp16 a token's gradient is formed this many times as large: where models nearly agree, most of it would be too
# small. What is left above is enough for a row's factors (kd_weight, T, the slope of its divergence) up to 256.
FP16_SCALE = 256.0


def gradient_dtype(operand: Tensor) -> torch.dtype:
    """Of an operand's gradient before the incoming one, which fp16 may not hold until then."""
    return torch.float32 if operand.dtype == torch.float16 else operand.dtype


def _outputs_shape(row_scale: Tensor, divergence: str, tail: str, per_row: bool) -> tuple[torch.Size, tuple[int, ...]]:
    rows = row_scale.shape
    return rows if per_row else torch.Size(()), (number_of_stats(divergence, tail), *rows)


def _flat(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.reshape(-1)


def _matrix(states: Tensor) -> Tensor:  # (..., H) -> (N, H)
    return states.reshape(states.shape[:-1].numel(), states.shape[-1])


def _linear_loss(
    hidden: Tensor,  # (..., H_s)
    weight: Tensor,  # (V_s, H_s)
    bias: Tensor | None,  # (V_s,)
    teacher: Tensor,  # (..., H_t); where there is no teacher_weight, logits (..., V_t), or log-probabilities (..., K)
    teacher_weight: Tensor | None,  # (V_t, H_t)
    teacher_bias: Tensor | None,  # (V_t,)
    labels: Tensor | None,  # (...)
    row_scale: Tensor,  # (...)
    temperatures: Tensor | None,  # (...)
    weights: Tensor | None,  # (3,)
    members: Tensor | None,  # (V,) or (..., V) bool; (..., K) ids
    backend: str,
    *rest: Any,  # the packed options, then the settings of the schema
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *packed_options, compute_dtype, logits_dtype, workspace_bytes, compact, per_row, gradients, _ = rest
    options = unpacked(packed_options, scale_gradient=True)

    def operand(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or compute_dtype is None or tensor.dtype == torch.float64:  # which autocast leaves as it is
            return tensor
        return tensor.to(compute_dtype)

    of_hidden, of_weight, of_bias = (wanted and not per_row for wanted in gradients)
    wanted = Wanted(
        gradient_dtype(hidden) if of_hidden else None,
        gradient_dtype(weight) if of_weight else None,
        gradient_dtype(bias) if of_bias and bias is not None else None,
    )
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        x, w = operand(_matrix(hidden)), operand(weight)
        assert x is not None
        assert w is not None
        states = teacher if teacher_weight is None else operand(_matrix(teacher))
        assert states is not None
        problem = LinearProblem(
            hidden=x,
            weight=w,
            bias=bias,
            teacher=states,
            teacher_weight=operand(teacher_weight),
            teacher_bias=teacher_bias,
            labels=_flat(labels),
            row_scale=row_scale.reshape(-1),
            temperatures=_flat(temperatures),
            weights=weights,
            members=members,
            backend=backend,
            options=options,
            logits_dtype=logits_dtype,
            workspace_bytes=workspace_bytes,
        )
        kept = None
        if compact and not (hidden.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            problem, kept = compacted(problem)
        formed = (_linear_rows if options.whole else _gathered_rows).row_losses(problem, wanted)
        loss, stats, x_gradient = formed.loss, formed.stats, formed.hidden
        if kept is not None:
            rows = row_scale.numel()
            loss = loss.new_zeros(rows).index_copy(0, kept, loss)
            stats = stats.new_zeros((stats.shape[0], rows)).index_copy(1, kept, stats)
            if x_gradient is not None:
                x_gradient = x_gradient.new_zeros((rows, x_gradient.shape[1])).index_copy(0, kept, x_gradient)
        loss_shape, stats_shape = _outputs_shape(row_scale, options.divergence, options.tail, per_row)

    def out(gradient: Tensor | None, shape: torch.Size) -> Tensor:
        return row_scale.new_empty(0) if gradient is None else gradient.view(shape)

    return (
        loss.view(loss_shape) if per_row else loss.sum(),
        stats.view(stats_shape),
        out(x_gradient, hidden.shape),
        out(formed.weight, weight.shape),
        out(formed.bias, weight.shape[:1]),
    )


def _linear_loss_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    row_scale, divergence = rest[4], rest[_OPERANDS - 3]
    tail, per_row = rest[_TAIL - 3], rest[-3]
    of_hidden, of_weight, of_bias = (wanted and not per_row for wanted in rest[-2])
    loss_shape, stats_shape = _outputs_shape(row_scale, divergence, tail, per_row)

    def gradient(tensor: Tensor | None, shape: torch.Size, wanted: bool) -> Tensor:
        if tensor is None or not wanted:
            return row_scale.new_empty(0)
        return tensor.new_empty(shape, dtype=gradient_dtype(tensor))

    return (
        row_scale.new_empty(loss_shape),
        row_scale.new_empty(stats_shape),
        gradient(hidden, hidden.shape, of_hidden),
        gradient(weight, weight.shape, of_weight),
        gradient(bias, weight.shape[:1], of_bias),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], numbers: Tensor | None = None
) -> None:
    _, stats, *gradients = output
    per_row, ctx.own_gradients = inputs[-3], inputs[-1]
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.set_materialize_grads(False)
    ctx.backend = inputs[_OPERANDS - 1]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.settings = inputs[_OPERANDS:]
    if per_row:
        # Autograd saves no tensor that was made in inference mode, as a teacher's may be.
        operands = (*inputs[: _OPERANDS - 1], numbers)
        ctx.of_inference = [x if isinstance(x, Tensor) and x.is_inference() else None for x in operands]
        ctx.save_for_backward(
            *(x if kept is None else None for x, kept in zip(operands, ctx.of_inference, strict=True))
        )
    else:
        ctx.save_for_backward(*gradients)
    ctx.per_row = per_row


def _backward(ctx: Any, of_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_OPERANDS - 3 + len(ctx.settings))
    if of_loss is None:
        return (None, None, None, *nothing)
    refuse_double_backward()
    if ctx.per_row:
        gradients, factor = _recomputed(ctx, of_loss)
    else:
        gradients, factor = list(ctx.saved_tensors), of_loss
    found: list[Tensor | None] = []
    for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.settings[-2], strict=True):
        found.append(_times(gradient, factor, dtype, ctx) if wanted else None)
    return (*found, *nothing)


def _times(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype, ctx: Any) -> Tensor:
    if factor is None or gradient.numel() == 0:
        return gradient.to(dtype)
    if gradient.dtype != dtype:
        return (gradient * factor).to(dtype)
    matrix = gradient.detach() if gradient.dim() > 1 else gradient.detach().unsqueeze(0)
    factors = factor.to(torch.float64 if dtype == torch.float64 else torch.float32).expand(matrix.shape[:-1])
    return scaled(matrix, factors, ctx.backend, own=ctx.per_row or ctx.own_gradients).view(gradient.shape)


def _recomputed(ctx: Any, of_loss: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of a loss per row, and the factor that they still lack."""
    operands = [x if kept is None else kept for x, kept in zip(ctx.saved_tensors, ctx.of_inference, strict=True)]
    row_scale = operands[7]
    scale = torch.where(row_scale != 0, of_loss.to(row_scale.dtype) * row_scale, 0)
    *settings, _, gradients, _ = ctx.settings
    *_, compute_dtype, _, _, _ = settings
    operands[7], factor = relative(scale, compute_dtype or ctx.dtypes[0])
    *detached, numbers = (None if operand is None else operand.detach() for operand in operands)
    call: Callable[..., tuple[Tensor, ...]] = _linear_loss if plain_eager(*detached) else linear_loss
    if numbers is not None:
        call = partial(linear_loss_changing, numbers)
    found = call(*detached, ctx.backend, *settings, False, gradients, True)
    return list(found[2:]), factor


def relative(scale: Tensor, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """In fp16, whose range is short: row scales such that the largest is FP16_SCALE, and the factor that they lack."""
    if compute_dtype != torch.float16 or scale.numel() == 0:
        return scale, None
    largest = scale.abs().amax()
    return torch.where(largest == 0, 0, FP16_SCALE * (scale / largest)), largest / FP16_SCALE


#: loss () or (...), stats (4, 7 or 9, ...), and the gradients of hidden, weight and bias or (0,): see the schema above.
#: The second is told changing numbers before all else.
linear_loss, linear_loss_changing = register(
    "linear_loss", _SCHEMA, _linear_loss, _linear_loss_fake, _setup_context, _backward, options_at=_OPERANDS
)


class EagerLinearLoss(torch.autograd.Function):
    """linear_loss for eager mode: the same with less overhead."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _linear_loss(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0], output[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, gradients[0])


def eager_linear_loss(*inputs: Any) -> tuple[Tensor, Tensor]:
    """loss () or (...), and stats (4, 7 or 9, ...)."""
    if any(inputs[-2]):
        loss, stats = EagerLinearLoss.apply(*inputs)
        return loss, stats
    loss, stats, *_ = _linear_loss(*inputs)
    return loss, stats
