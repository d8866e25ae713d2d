"""The one comparison every kernel test makes, and the cases it is made on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import kdkernels as kd

DIVERGENCES = {
    "forward_kl": kd.ForwardKL(),
    "reverse_kl": kd.ReverseKL(),
    "symmetric_kl": kd.SymmetricKL(0.3),
    "jensen_shannon": kd.JensenShannon(),
    "jensen_shannon_0.1": kd.JensenShannon(0.1),
    "skew_forward_kl": kd.SkewForwardKL(),
    "skew_reverse_kl": kd.SkewReverseKL(),
    "total_variation": kd.TotalVariation(),
    "alpha_beta": kd.AlphaBeta(),
    "alpha_beta_0.2_0.7": kd.AlphaBeta(0.2, 0.7),
    "alpha_beta_a0": kd.AlphaBeta(0.0, 0.6),
    "alpha_beta_b0": kd.AlphaBeta(0.6, 0.0),
    "alpha_beta_c0": kd.AlphaBeta(0.5, -0.5),
    "alpha_beta_00": kd.AlphaBeta(0.0, 0.0),
}

# Of either model's logits.
TRANSFORMS = (
    {"student_logit_scale": 0.3},
    {"teacher_logit_scale": 0.3},
    {"student_softcap": 3.0},
    {"teacher_softcap": 3.0},
    {"student_logit_scale": 2.0, "student_softcap": 5.0, "teacher_logit_scale": 0.5, "teacher_softcap": 30.0},
)

# Norm-relative bounds of loss and gradient. A 16-bit gradient is bounded beyond its own rounding: see assert_rounded.
BOUNDS = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (2e-6, 4e-6),
    torch.float16: (2e-6, 4e-6),
}

# What fp64 itself leaves of a difference that is 0: the reference is no more exact than this.
NOISE = 1e-14


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """‖actual - expected‖ / max(‖expected‖, floor) in fp64, differences under NOISE taken as 0."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error, size = (actual - expected).norm(), expected.norm()
    if error <= NOISE:
        return 0.0
    size = size.clamp_min(floor)
    return float(error / size) if size > 0 else float("inf")


def cosine(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().flatten(), expected.detach().double().flatten()
    return float(actual @ expected / (actual.norm() * expected.norm()).clamp_min(1e-300))


def assert_near(what: str, actual: Tensor, expected: Tensor, bound: float, floor: float = 0.0) -> None:
    """Fails unless actual has expected's shape and lies within a norm-relative bound of it; NaN never passes.

    An expected norm under ``floor`` counts as ``floor``.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(actual, expected, floor)
    assert error <= bound, f"{what}: relative error {error:.2e} exceeds {bound:.0e}"
    if float(expected.detach().double().norm()) > max(NOISE, floor):
        assert cosine(actual, expected) >= 1 - max(bound, 1e-12), f"{what}: cosine {cosine(actual, expected)}"


def assert_rounded(what: str, actual: Tensor, expected: Tensor, bound: float, floor: float = 0.0) -> None:
    """actual is expected (fp64) rounded once to actual's dtype, but for errors before the rounding under ``bound``.

    Elementwise: what is off by more than expected's own rounding is excess, and an error of e before the rounding
    makes an excess of at most 2e (it can send a value near a boundary the other way, never further).
    """
    rounding = (expected.to(actual.dtype).double() - expected).abs()
    excess = ((actual.detach().double() - expected).abs() - rounding).clamp_min(0)
    assert_near(what + " beyond rounding", expected + excess, expected, bound, floor)


def logits_pair(
    *shape: int, dtype: torch.dtype = torch.float32, spread: float = 2.0, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits: normal of the given spread, the teacher off by ``noise`` times as much."""
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(*shape, generator=generator)
    teacher = student + noise * spread * torch.randn(*shape, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def in_double(teacher: Tensor | kd.TopKTeacher) -> Tensor | kd.TopKTeacher:
    if isinstance(teacher, kd.TopKTeacher):
        return teacher._replace(logprobs=teacher.logprobs.double())
    return teacher.double()


def against_reference(
    student: Tensor,
    teacher: Tensor | kd.TopKTeacher,
    labels: Tensor | None = None,
    *,
    floor: float = 0.0,
    slack: float = 1.0,
    **options,
) -> None:
    """Loss and gradient of the fused path against the reference in fp64 on the same inputs, by BOUNDS.

    ``floor``: losses and gradients of a smaller norm are held to that norm (a bounded divergence's gradient vanishes
    where the models share no mass, and its digits with it). ``slack`` multiplies the bounds.
    """
    # Softcapped logits are rounded to fp32 before the temperature magnifies their differences.
    capped = options.get("student_softcap") or options.get("teacher_softcap")
    loss_bound, gradient_bound = (bound * slack * (4 if capped else 1) for bound in BOUNDS[student.dtype])
    exact = student.detach().double().requires_grad_()
    expected = kd.reference.distillation_loss(exact, in_double(teacher), labels, **options)
    ours = student.detach().clone().requires_grad_()
    actual = kd.distillation_loss(ours, teacher, labels, **options)
    assert_near("loss", actual, expected, loss_bound, floor)
    expected.sum().backward()
    actual.sum().backward()
    assert exact.grad is not None
    assert ours.grad is not None
    assert ours.grad.dtype == student.dtype
    if student.dtype in (torch.bfloat16, torch.float16):
        # An fp16 gradient meets its row's scale in backward, rounded for a second time unless that scale is 1.
        scaled = options.get("reduction", "mean") == "mean" or options.get("weight") is not None
        twice = student.dtype == torch.float16 and scaled
        assert_rounded("gradient", ours.grad, exact.grad, 2**-11 if twice else gradient_bound, floor)
    else:
        assert_near("gradient", ours.grad, exact.grad, gradient_bound, floor)


def gradient_of(
    student: Tensor, teacher: Tensor | kd.TopKTeacher, labels: Tensor | None = None, **options
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the gradient of its sum."""
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, labels, **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def masked_pair(
    both: Sequence[int] = (), student_only: Sequence[int] = (), teacher_only: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Logits (4, 1003) that are -inf in these columns of both models, or of one."""
    student, teacher = logits_pair(4, 1003)
    student[:, [*both, *student_only]] = -torch.inf
    teacher[:, [*both, *teacher_only]] = -torch.inf
    return student, teacher
