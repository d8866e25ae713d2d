"""The comparison that the tests of the loss from hidden states make, and the operands they make it on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from checks import assert_near, assert_rounded, in_double
from sparse_cases import on
from torch import Tensor

import kdkernels as kd

# Norm-relative bounds of the loss and of each gradient, before a 16-bit gradient's own rounding. In fp32 a logit of H
# products is off by some roundings of 2^-24 of its size, and a probability by as much of itself: 5e-7 of the gradient
# for the logits here, which spread by 2, of models that are far apart. The gradient of models that are apart by a share
# of that is smaller by this share, and its error is the same. Products of 16-bit numbers are exact in fp32.
BOUNDS = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 4e-6),
    torch.bfloat16: (2e-6, 4e-6),
    torch.float16: (2e-6, 4e-6),
}
# On a GPU the gradient of the logits of 16-bit operands is rounded to their dtype. Rounding to bfloat16 is an error of
# 0.17 % in norm; sums of many such numbers are off by the same share, and are rounded again themselves: 0.24 % where
# all is well, and an eighth of that in float16 (more where numbers are under its smallest normal one).
OF_16_BIT_LOGITS_GRADIENT = 5e-3
# Of a loss there: sums of products are cut off at fewer bits than fp32 has, not rounded.
IN_TENSOR_CORES = 1e-5

NAMES = ("hidden", "weight", "bias")


class Operands(NamedTuple):
    """A student's hidden states (..., H_s), weight (V_s, H_s) and bias (V_s,) or None, and its teacher."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: kd.LinearTeacher | kd.TopKTeacher | Tensor

    def to(self, how: torch.dtype | str) -> Operands:
        """All of it in this dtype, or on this device; log-probabilities keep their numbers."""
        teacher = self.teacher
        if isinstance(teacher, kd.TopKTeacher):
            teacher = on(how, teacher) if isinstance(how, str) else in_double(teacher)
        elif isinstance(teacher, kd.LinearTeacher):
            teacher = kd.LinearTeacher(*(None if x is None else x.to(how) for x in teacher))
        else:
            teacher = teacher.to(how)
        bias = None if self.bias is None else self.bias.to(how)
        return Operands(self.hidden.to(how), self.weight.to(how), bias, teacher)

    def leaves(self, required: tuple[str, ...] = NAMES) -> Operands:
        """The same numbers; those of the student that are named require grad."""
        student = [None if x is None else x.detach().clone() for x in self[:3]]
        for name, x in zip(NAMES, student, strict=True):
            if x is not None:
                x.requires_grad_(name in required)
        return Operands(*student, self.teacher)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: None if x is None else x.grad for name, x in zip(NAMES, self[:3], strict=True)}


def operands(
    *rows: int,
    width: int = 300,
    hidden: int = 40,
    teacher_width: int | None = None,
    teacher_hidden: int = 24,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    teacher_bias: bool = False,
    teacher_logits: bool = False,
    noise: float | None = None,
    spread: float = 2.0,
    seed: int = 0,
    device: str = "cpu",
) -> Operands:
    """Normal hidden states and weights whose logits spread as given.

    The teacher is another model, of its own hidden size, or with ``noise`` the student with that much relative noise on
    hidden states and weight. ``teacher_logits``: its logits in place of what makes them.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def weight_of(columns: int, size: int) -> Tensor:
        return normal(columns, size) * (spread / max(1, size) ** 0.5)

    student = (normal(*rows, hidden), weight_of(width, hidden), normal(width) if bias else None)
    if noise is None:
        columns = teacher_width or width
        teacher = kd.LinearTeacher(normal(*rows, teacher_hidden), weight_of(columns, teacher_hidden), None)
        if teacher_bias:
            teacher = teacher._replace(bias=normal(columns))
    else:
        teacher = kd.LinearTeacher(*(x + noise * x.std() * normal(*x.shape) for x in student[:2]), student[2])
    if teacher_logits:
        logits = teacher.hidden @ teacher.weight.T
        return Operands(*student, logits if teacher.bias is None else logits + teacher.bias).to(dtype)
    return Operands(*student, teacher).to(dtype)


def losses(
    given: Operands, labels: Tensor | None = None, *, incoming: Tensor | float = 1.0, reference: bool = False, **options
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss, and the gradients of it that ``incoming`` (a number, or one per row) asks for."""
    which = kd.reference.linear_distillation_loss if reference else kd.linear_distillation_loss
    loss = which(given.hidden, given.weight, given.teacher, labels, student_bias=given.bias, **options)
    if loss.requires_grad:
        loss.backward(torch.as_tensor(incoming, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    return loss.detach(), given.gradients()


def assert_gradients(
    actual: dict[str, Tensor | None],
    expected: dict[str, Tensor | None],
    *,
    floor: float = 0.0,
    slack: float = 1.0,
    bound: float | None = None,
) -> None:
    """Each gradient within BOUNDS of the expected one (fp64), or within a norm-relative bound with its own rounding."""
    for name, want in expected.items():
        got = actual[name]
        assert (got is None) == (want is None), f"gradient of {name}: {got} where {want} was expected"
        if got is None or want is None:
            continue
        what = f"gradient of {name}"
        if bound is None and got.is_cuda and got.dtype.itemsize == 2:
            assert_near(what, got, want, slack * OF_16_BIT_LOGITS_GRADIENT, floor)
        elif bound is not None:
            assert_near(what, got, want, bound, floor)
        elif got.dtype.itemsize == 2:
            # A half meets the incoming gradient after it was rounded, and is rounded again unless that is 1.
            twice = 2**-11 if got.dtype == torch.float16 else 0.0
            assert_rounded(what, got, want, slack * BOUNDS[got.dtype][1] + twice, floor)
        else:
            assert_near(what, got, want, slack * BOUNDS[got.dtype][1], floor)


def against_reference(
    given: Operands,
    labels: Tensor | None = None,
    *,
    required: tuple[str, ...] = NAMES,
    floor: float = 0.0,
    slack: float = 1.0,
    bound: float | None = None,
    **options,
) -> None:
    """Loss and gradients against the reference in fp64 on the same numbers.

    ``floor``, ``slack``: as in checks.against_reference. ``bound``: of the gradients, in place of BOUNDS.
    """
    exact, ours = given.to(torch.float64).leaves(required), given.leaves(required)
    expected, expected_gradients = losses(exact, labels, reference=True, **options)
    actual, gradients = losses(ours, labels, **options)
    dtype = torch.float64 if given.hidden.dtype == torch.float64 else torch.float32
    assert actual.dtype == dtype, f"loss is {actual.dtype}"
    in_tensor_cores = given.hidden.is_cuda and given.hidden.dtype.itemsize == 2
    loss_bound = IN_TENSOR_CORES if in_tensor_cores else BOUNDS[given.hidden.dtype][0]
    assert_near("loss", actual, expected, slack * loss_bound, floor)
    for name, gradient in gradients.items():
        operand = getattr(given, name)
        assert gradient is None or gradient.dtype == operand.dtype, f"gradient of {name} is {gradient.dtype}"
    assert_gradients(gradients, expected_gradients, floor=floor, slack=slack, bound=bound)
