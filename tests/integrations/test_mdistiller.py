"""mdistiller's DKD against its formula, written here from the paper: mdistiller is not on PyPI."""

import pytest
import torch
from checks import assert_near, assert_rounded, logits_pair
from torch.nn.functional import cross_entropy, one_hot

from kdkernels.integrations.mdistiller import dkd_loss

TARGET = torch.tensor([3, 0, 99, 5, 5, 41])


def published(student, teacher, target, alpha, beta, temperature):
    """Eq. 7 of arXiv 2203.08679: masses and probabilities as they stand there, with T² and the mean over rows."""
    p, q = (x / temperature for x in (teacher, student))
    p, q = p.softmax(-1), q.softmax(-1)
    others = ~one_hot(target, p.shape[-1]).bool()

    def binary(x):
        return torch.stack([x[~others], (x * others).sum(-1)], -1)

    def rest(x):
        return x[others].view(len(x), -1) / (x * others).sum(-1, keepdim=True)

    def kl(a, b):
        return (a * (a / b).log()).sum()

    tckd, nckd = kl(binary(p), binary(q)), kl(rest(p), rest(q))
    return temperature**2 / len(target) * (alpha * tckd + beta * nckd)


def both(student, teacher, *options):
    """Loss and gradient, of the formula in fp64 and of ours."""
    exact, ours = student.double().clone().requires_grad_(), student.clone().requires_grad_()
    expected, actual = published(exact, teacher.double(), *options), dkd_loss(ours, teacher, *options)
    expected.backward()
    actual.backward()
    return expected, exact.grad, actual, ours.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (1.0, 0.0), (0.0, 2.0), (0.5, 0.5)])
def test_value_and_gradient(dtype, temperature, alpha, beta):
    student, teacher = logits_pair(6, 100, dtype=dtype)
    expected, expected_gradient, actual, gradient = both(student, teacher, TARGET, alpha, beta, temperature)
    bound = 1e-11 if dtype == torch.float64 else 2e-6
    assert_near("loss", actual, expected, bound)
    assert_near("gradient", gradient, expected_gradient, bound)
    assert actual.dtype == dtype


def test_bf16():
    student, teacher = logits_pair(6, 100, dtype=torch.bfloat16)
    expected, expected_gradient, actual, gradient = both(student, teacher, TARGET, 1.0, 8.0, 4.0)
    assert_near("loss", actual, expected, 2e-6)
    assert_rounded("gradient", gradient, expected_gradient, 4e-6)


def test_a_target_of_any_shape_and_weights_that_are_tensors():
    student, teacher = logits_pair(6, 100)
    expected = dkd_loss(student, teacher, TARGET, 1.0, 8.0, 4.0)
    weights = torch.tensor(1.0), torch.tensor(8.0)
    assert torch.equal(dkd_loss(student, teacher, TARGET[:, None], 1.0, 8.0, 4.0), expected)
    assert_near("loss", dkd_loss(student, teacher, TARGET, *weights, 4.0), expected, 1e-7)


def test_beside_the_cross_entropy_as_mdistiller_adds_it():
    student, teacher = logits_pair(6, 100)
    student.requires_grad_()
    (cross_entropy(student, TARGET) + 0.5 * dkd_loss(student, teacher, TARGET, 1.0, 8.0, 4.0)).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("logit", [1000.0, -1000.0])
def test_a_student_beyond_what_probabilities_hold(logit):
    """At temperature 4 by e^-250, which fp64 holds and fp32 does not."""
    student, teacher = logits_pair(6, 100)
    student[torch.arange(6), TARGET] = logit
    leaf = student.clone().requires_grad_()
    loss = published(leaf, teacher, TARGET, 1.0, 8.0, 4.0)
    loss.backward()
    assert not loss.isfinite()
    assert not leaf.grad.isfinite().all()

    expected, expected_gradient, actual, gradient = both(student, teacher, TARGET, 1.0, 8.0, 4.0)
    # An fp32 logarithm of 250 is off by 1e-5 at most.
    assert_near("loss", actual, expected, 2e-6)
    assert_near("gradient", gradient, expected_gradient, 1e-5)


def test_no_rows():
    student = torch.empty(0, 100, requires_grad=True)
    loss = dkd_loss(student, torch.empty(0, 100), torch.empty(0, dtype=torch.long), 1.0, 8.0, 4.0)
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 100)


@pytest.mark.parametrize(
    ("changes", "name"), [({"temperature": 0.0}, "temperature"), ({"alpha": -1.0}, "alpha"), ({"beta": -1.0}, "beta")]
)
def test_bad_input(changes, name):
    student, teacher = logits_pair(6, 100)
    with pytest.raises(ValueError, match=name):
        dkd_loss(student, teacher, TARGET, **({"alpha": 1.0, "beta": 8.0, "temperature": 4.0} | changes))
