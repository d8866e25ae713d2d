"""What the operators share: their library, how options cross its schema, and scaling by an incoming gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes
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


#: How many these are.
PACKED = 15
#: The fields of RowOptions that are numbers and may change from call to call; its parameters are others.
NUMBERS = (
    "strong_amount",
    "temperature",
    "kd_weight",
    "ce_weight",
    "student_logit_scale",
    "student_softcap",
    "teacher_logit_scale",
    "teacher_softcap",
)

# torch 2.6 has neither.
_has_static_value = getattr(symbolic_shapes, "has_static_value", None)
_cudagraph_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)


def is_changing(*numbers: float) -> bool:
    """Whether torch.compile takes one of these for a number that changes from call to call."""
    if not torch.compiler.is_compiling() or _has_static_value is None or _cudagraph_unsafe is None:
        return False
    return not all(_has_static_value(number) for number in numbers)


def changing_numbers(o: RowOptions) -> Tensor | None:
    """NUMBERS and parameters as a tensor (fp64, on the CPU), where one of them is changing.

    As floats of a schema they would be compiled in, and the graph compiled again for each of their values.
    """
    numbers = [getattr(o, name) for name in NUMBERS] + list(o.parameters)
    if not is_changing(*numbers):
        return None
    one = torch.ones((), dtype=torch.float64, device="cpu")  # the compiler turns a product with a float into tensors'
    return torch.stack([one * number for number in numbers])


def packed(o: RowOptions, changing: Tensor | None = None) -> tuple[Any, ...]:
    """The options in the order of OPTIONS, with 0 for each number that ``changing`` holds."""

    def constant(number: float) -> float:
        return number if changing is None else 0.0

    return (
        o.divergence,
        [constant(number) for number in o.parameters],
        o.strong,
        constant(o.strong_amount),
        constant(o.temperature),
        constant(o.kd_weight),
        constant(o.ce_weight),
        o.scale_by_temperature,
        o.vocab_size,
        constant(o.student_logit_scale),
        constant(o.student_softcap),
        constant(o.teacher_logit_scale),
        constant(o.teacher_softcap),
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


def _with_numbers(arguments: Sequence[Any], first: int, changing: Tensor) -> tuple[Any, ...]:
    """An operator's arguments, those from ``first`` on packed options, with the numbers that it is told."""
    options = unpacked(arguments[first : first + PACKED], scale_gradient=True)
    numbers = changing.tolist()
    fields = dict(zip(NUMBERS, numbers[: len(NUMBERS)], strict=True))
    told = replace(options, **fields, parameters=tuple(numbers[len(NUMBERS) :]))
    return (*arguments[:first], *packed(told), *arguments[first + PACKED :])


def register(
    name: str,
    schema: str,
    compute: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[..., None],  # of ctx, inputs, output, numbers
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    options_at: int,
    tags: Sequence[torch.Tag] = (),
) -> tuple[Any, Any]:
    """Operators ``name``, and ``name``_changing, which is told :func:`changing_numbers` before all else.

    The latter reads them on the CPU as it runs: a CUDA graph would keep what it read.
    """

    def compute_changing(numbers: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return compute(*_with_numbers(arguments, options_at, numbers))

    def fake_changing(numbers: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return fake(*arguments)

    def setup_changing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        setup_context(ctx, inputs[1:], output, inputs[0])

    def backward_changing(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *backward(ctx, *gradients))

    def add(name: str, schema: str, more: Sequence[torch.Tag], *how: Callable[..., Any]) -> Any:
        compute, fake, setup, backward = how
        LIBRARY.define(f"{name}({schema}", tags=(torch.Tag.pt2_compliant_tag, *tags, *more))
        LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kdkernels::{name}", fake, lib=LIBRARY)
        torch.library.register_autograd(f"kdkernels::{name}", backward, setup_context=setup, lib=LIBRARY)
        return getattr(torch.ops.kdkernels, name).default

    changing = (compute_changing, fake_changing, setup_changing, backward_changing)
    unsafe = () if _cudagraph_unsafe is None else (_cudagraph_unsafe,)
    return (
        add(name, schema, (), compute, fake, setup_context, backward),
        add(f"{name}_changing", f"Tensor numbers, {schema}", unsafe, *changing),
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
