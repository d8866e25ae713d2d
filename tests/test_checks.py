"""The comparison that every kernel test makes can fail."""

import pytest
import torch
from checks import assert_near, assert_rounded, logits_pair

import kdkernels as kd


@pytest.fixture
def gradient() -> torch.Tensor:
    student, teacher = logits_pair(4, 1000)
    student = student.double().requires_grad_()
    kd.reference.distillation_loss(student, teacher.double(), temperature=2.0).backward()
    return student.grad


def test_the_right_gradient_passes(gradient):
    assert_near("gradient", gradient.float(), gradient, 2e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda g: torch.zeros_like(g), id="zero"),
        pytest.param(lambda g: 2 * g, id="off by T"),
        pytest.param(lambda g: 4 * g, id="off by T squared"),
        pytest.param(lambda g: -g, id="sign"),
        pytest.param(lambda g: g * torch.nan, id="nan"),
        pytest.param(lambda g: torch.cat([g[:1] * 0, g[1:]]), id="one row missing"),
        pytest.param(lambda g: g.flip(-1), id="columns reversed"),
    ],
)
@pytest.mark.parametrize("bound", [2e-6, 2.5e-3])
def test_a_wrong_gradient_fails(gradient, wrong, bound):
    with pytest.raises(AssertionError):
        assert_near("gradient", wrong(gradient), gradient, bound)
    with pytest.raises(AssertionError):
        assert_rounded("gradient", wrong(gradient).bfloat16(), gradient, bound)


def test_one_rounding_passes_and_two_do_not(gradient):
    assert_rounded("gradient", gradient.bfloat16(), gradient, 4e-6)
    with pytest.raises(AssertionError):
        assert_rounded("gradient", (3 * (gradient / 3).bfloat16()).bfloat16(), gradient, 4e-6)


def test_zero_is_expected_exactly():
    assert_near("zero", torch.zeros(3), torch.zeros(3), 1e-6)
    with pytest.raises(AssertionError):
        assert_near("zero", torch.full((3,), 1e-9), torch.zeros(3), 1e-6)
