"""What docs/sparse-teachers.md says of the four tails, by their definition in fp64."""

import itertools
import math

import pytest
import torch

import kdkernels as kd
from kdkernels.teachers import TAILS

VOCABULARY, K = 12, 4
LOSS = kd.reference.distillation_loss


def logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(1, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TEACHER, STUDENT = logits(0), logits(1)
LOGPROBS, IDS = TEACHER.log_softmax(-1).topk(K)
MASS = LOGPROBS.exp().sum().item()


def loss_and_gradient(student: torch.Tensor, teacher, **options) -> tuple[float, torch.Tensor]:
    student = student.clone().requires_grad_()
    loss = LOSS(student, teacher, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.item(), gradient


def of_tail(student: torch.Tensor, tail: str) -> tuple[float, torch.Tensor]:
    return loss_and_gradient(student, kd.TopKTeacher(IDS, LOGPROBS, tail))


def moved_into_s(student: torch.Tensor, by: float) -> torch.Tensor:
    return student.scatter_add(-1, IDS, torch.full((1, K), by, dtype=student.dtype))


def test_bucket_is_forward_kl_without_what_is_inside_the_rest():
    loss, gradient = of_tail(STUDENT, "bucket")
    other = loss_and_gradient(STUDENT, TEACHER, divergence=kd.Decoupled(kd.TopK(K), wcd=0.0))
    assert loss == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(gradient, other[1], rtol=1e-11, atol=1e-14)
    assert 0 < loss < loss_and_gradient(STUDENT, TEACHER)[0]


def test_bucket_is_0_wherever_the_masses_are_the_teachers():
    split_anew = TEACHER.clone()
    outside = torch.ones_like(split_anew, dtype=torch.bool).scatter(-1, IDS, False)
    split_anew[outside] = TEACHER[outside].logsumexp(-1) - math.log(VOCABULARY - K)
    for student in (TEACHER, split_anew):
        loss, gradient = of_tail(student, "bucket")
        assert abs(loss) < 1e-14
        assert gradient.norm() < 1e-14


def test_renormalize_does_not_see_the_mass_of_s():
    loss, gradient = of_tail(STUDENT, "renormalize")
    assert of_tail(moved_into_s(STUDENT, -30), "renormalize")[0] == pytest.approx(loss, rel=1e-10)
    assert gradient.gather(-1, IDS).sum().abs() < 1e-15
    assert gradient.scatter(-1, IDS, 0).abs().max() < 1e-15
    assert abs(of_tail(moved_into_s(TEACHER, -30), "renormalize")[0]) < 1e-14


def test_teacher_and_drop_want_all_mass_inside_s():
    of_teacher, of_drop = (of_tail(TEACHER, tail) for tail in ("teacher", "drop"))
    assert of_teacher[0] == pytest.approx(-math.log(MASS), rel=1e-12)
    assert abs(of_drop[0]) < 1e-14
    for _, gradient in (of_teacher, of_drop):  # a descent moves mass into S
        assert (gradient.gather(-1, IDS) < 0).all()
        assert (gradient.sum() - gradient.gather(-1, IDS).sum()) > 0.01
    surer = moved_into_s(TEACHER, 30)
    assert abs(of_tail(surer, "teacher")[0]) < 1e-10
    assert of_tail(surer, "drop")[0] == pytest.approx(MASS * math.log(MASS), rel=1e-9)


def test_drop_is_teacher_times_the_mass():
    (of_teacher, teacher_gradient), (of_drop, drop_gradient) = (of_tail(STUDENT, tail) for tail in ("teacher", "drop"))
    assert of_drop == pytest.approx(MASS * (of_teacher + math.log(MASS)), rel=1e-12)
    torch.testing.assert_close(drop_gradient, MASS * teacher_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("tail", TAILS)
def test_drawn_tokens_give_forward_kls_gradient_in_expectation(tail):
    """Over all outcomes of two draws, each with its probability."""
    draws = 2
    outcomes = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=draws)))  # (V², 2)
    counts = (outcomes[:, :, None] == outcomes[:, None, :]).sum(-1)
    student = STUDENT.expand(len(outcomes), -1).clone().requires_grad_()
    teacher = kd.TopKTeacher(outcomes, (counts / draws).double().log(), tail)
    losses = LOSS(student, teacher, reduction="none")
    (gradients,) = torch.autograd.grad(losses.sum(), student)
    chance = TEACHER.log_softmax(-1)[0][outcomes].sum(-1).exp()
    expected, wanted = chance @ gradients, loss_and_gradient(STUDENT, TEACHER)
    error = (expected - wanted[1][0]).norm() / wanted[1].norm()
    if tail == "renormalize":
        assert error > 0.1
        assert losses[counts[:, 0] == draws].count_nonzero() == 0  # one token: nothing to renormalise
    else:
        assert error < 1e-6 if tail == "bucket" else error < 1e-12
        assert chance @ losses > wanted[0] + 0.1  # the gradient has no bias, the value does


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_what_rounding_does_to_the_mass(dtype, unit):
    """A probability is off by at most |log p| units, so P_S by at most the given part of the entropy."""
    rows = 3 * torch.randn(200, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = rows.log_softmax(-1).topk(32).values
    rounded = exact.to(dtype).double()
    assert ((rounded - exact).exp() - 1).abs().div(exact.abs() * unit).max() < 1.02
    given_entropy = -(exact.exp() * exact).sum(-1)
    error = (rounded.exp().sum(-1) - exact.exp().sum(-1)).abs()
    assert (error < unit * given_entropy).all()
    assert error.max() > 0.01 * unit
