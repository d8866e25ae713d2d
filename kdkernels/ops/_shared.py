"""What the operators share: their library, how options cross its schema, and scaling by an incoming gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from kdkernels import backends
from kdkernels.backends.native import RowOptions

LIBRARY = Library("kdkernels", "DEF")
LIBRARY.define("scale_rows(Tensor values, Tensor factors, str backend) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

#: RowOptions in a schema, in the order of :func:`packed`.
OPTIONS = (
    "str divergence, float[] parameters, str strong, float strong_amount, float temperature, float kd_weight, "
    "float ce_weight, bool scale_by_temperature, SymInt vocab_size, float student_logit_scale, float student_softcap, "
    "float teacher_logit_scale, float teacher_softcap, str tail, bool whole"
)


def packed(o: RowOptions) -> tuple[Any, ...]:
    return (
        o.divergence,
        list(o.parameters),
        o.strong,
        o.strong_amount,
        o.temperature,
        o.kd_weight,
        o.ce_weight,
        o.scale_by_temperature,
        o.vocab_size,
        o.student_logit_scale,
        o.student_softcap,
        o.teacher_logit_scale,
        o.teacher_softcap,
        o.tail,
        o.whole,
    )


def unpacked(values: Sequence[Any], *, scale_gradient: bool) -> RowOptions:
    divergence, parameters, strong, strong_amount, temperature, kd_weight, ce_weight, *rest = values
    scale_by_temperature, vocab_size, student_scale, student_softcap, teacher_scale, teacher_softcap, *sparse = rest
    tail, whole = sparse
    return RowOptions(
        divergence=divergence,
        parameters=tuple(parameters),
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        scale_by_temperature=scale_by_temperature,
        vocab_size=vocab_size,
        student_logit_scale=student_scale,
        student_softcap=student_softcap,
        teacher_logit_scale=teacher_scale,
        teacher_softcap=teacher_softcap,
        scale_gradient=scale_gradient,
        strong=strong,
        strong_amount=strong_amount,
        tail=tail,
        whole=whole,
    )


def _scale_rows(values: Tensor, factors: Tensor, backend: str) -> Tensor:
    sweep = backends.sweep(backend, values.device)
    out = sweep.empty_gradient(values)
    sweep.scale_rows(values, factors, out)
    return out


def _scale_rows_fake(values: Tensor, factors: Tensor, backend: str) -> Tensor:
    return torch.empty_like(values)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():  # backward runs with gradients enabled under create_graph=True alone
        raise RuntimeError(
            "kdkernels forms no gradient of a gradient (create_graph=True); "
            'use kdkernels.reference.distillation_loss or kdkernels.backends.use("reference") for that'
        )


def scaled(gradient: Tensor, factors: Tensor, backend: str, *, own: bool) -> Tensor:
    """gradient·factors: in the gradient's own memory where nothing else will read it, else in new memory."""
    eager = type(gradient) is Tensor and not torch.compiler.is_compiling()
    if own and eager and not torch._C._autograd._get_current_graph_task_keep_graph():
        backends.sweep(backend, gradient.device).scale_rows(gradient, factors, gradient)
        return gradient
    return torch.ops.kdkernels.scale_rows.default(gradient, factors, backend)


def plain_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks on: no compiler, tensor subclass, dispatch mode or function transform.

    Then an autograd.Function computes the same as the registered operator, with less overhead.
    """
    return (
        not torch.compiler.is_compiling()
        and all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


LIBRARY.impl("scale_rows", _scale_rows, "CompositeExplicitAutograd")
torch.library.register_fake("kdkernels::scale_rows", _scale_rows_fake, lib=LIBRARY)
