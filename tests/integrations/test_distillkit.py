"""DistillKit's KL losses against their definition, written here: DistillKit is not on PyPI.

Read from its source, arcee-ai/DistillKit at 361c7ac (``lossfuncs/kl.py``) and a61c2e7 (``lossfuncs/common.py``).
"""

from enum import Enum

import pytest
import torch
from checks import assert_near, assert_rounded, logits_pair

from kdkernels.integrations.distillkit import dense_kl_div, sparse_kl_div

MASK = torch.tensor([[True, False, True, True, True], [False, True, True, False, True]])


class MissingProbabilityHandling(Enum):  # as in distillkit.missing_probability
    ZERO = "zero"
    SYMMETRIC_UNIFORM = "symmetric_uniform"


def published(
    logits,
    ids,
    values,
    mask=None,
    eps=1e-6,
    missing="zero",
    log_target=True,
    temperature=1.0,
    target_generation_temperature=1.0,
    student_generation_temperature=1.0,
):
    """With the bounds of the source: a mass outside S under eps is not counted."""
    log_q = (logits * student_generation_temperature / temperature).log_softmax(-1).gather(-1, ids)
    power = target_generation_temperature / temperature
    log_p = power * values
    if missing == "zero":
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    elif power != 1:
        outside = (1 - values.exp().sum(-1, keepdim=True)).clamp(0, 1) ** power
        log_p = log_p - (log_p.exp().sum(-1, keepdim=True) + outside).log()
    total = (log_p.exp() * (log_p - log_q)).sum(-1)
    if missing != "zero":
        # the mass outside of either, from no less than about eps on
        p_out, q_out = (-torch.expm1(x.logsumexp(-1).clamp(max=-eps)) for x in (log_p, log_q))
        total = total + torch.where(p_out > eps, p_out * (p_out / q_out).log(), 0)
    return (total if mask is None else total * mask.reshape(total.shape)).sum()


def batch(k=8, vocabulary=300, dtype=torch.float32, generated_at=1.0):
    student, teacher = logits_pair(2, 5, vocabulary, dtype=dtype)
    values, ids = (teacher.double() / generated_at).log_softmax(-1).topk(k)
    return student, ids, values.to(torch.promote_types(dtype, torch.float32))


def both(student, ids, values, mask=None, **options):
    """Loss and gradient, of the definition in fp64 and of ours."""
    exact, ours = student.double().clone().requires_grad_(), student.clone().requires_grad_()
    expected, actual = (
        published(exact, ids, values.double(), mask, **options),
        sparse_kl_div(ours, ids, values, mask, **options),
    )
    (3 * expected).backward()
    (3 * actual).backward()
    return expected, exact.grad, actual, ours.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("missing", ["zero", "symmetric_uniform"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (2.0, 1.0, 1.0), (1.5, 0.7, 1.2)], ids=str)
def test_value_and_gradient(dtype, missing, masked, temperatures):
    temperature, generated_at, student_at = temperatures
    inputs = batch(dtype=dtype, generated_at=generated_at)
    expected, expected_gradient, actual, gradient = both(
        *inputs,
        MASK if masked else None,
        missing=missing,
        temperature=temperature,
        target_generation_temperature=generated_at,
        student_generation_temperature=student_at,
    )
    bound = 1e-11 if dtype == torch.float64 else 2e-6
    assert_near("loss", actual, expected, bound)
    assert_near("gradient", gradient, expected_gradient, bound)
    assert actual.dtype == dtype


@pytest.mark.parametrize("missing", ["zero", "symmetric_uniform"])
def test_bf16(missing):
    expected, expected_gradient, actual, gradient = both(*batch(dtype=torch.bfloat16), MASK, missing=missing)
    assert_near("loss", actual, expected, 2e-6)
    assert actual.dtype == torch.float32  # where DistillKit gives bfloat16
    exact = expected_gradient / 3
    one = gradient.double() / 3  # of 3 times the loss: rounded to bf16 twice
    assert_near("gradient", one, exact, 4e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_that_are_logits(temperature):
    student, ids, values = batch()
    expected = both(student, ids, values, temperature=temperature)
    actual = both(student, ids, values + 7.5, temperature=temperature, log_target=False)
    for one, other in zip(actual, expected, strict=True):
        assert_near("as log-probabilities", one, other, 2e-6)


def test_the_two_ways_differ():
    student, ids, values = batch()
    zero, uniform = (sparse_kl_div(student, ids, values, missing=m) for m in ("zero", "symmetric_uniform"))
    assert values.exp().sum(-1).max() < 0.99
    assert (zero - uniform).abs() > 0.1 * uniform


def test_the_enumeration_and_what_has_no_effect():
    student, ids, values = batch()
    for missing in MissingProbabilityHandling:
        expected = sparse_kl_div(student, ids, values, MASK, missing=missing.value, temperature=2.0)
        options = {"missing": missing, "temperature": 2.0, "eps": 1e-3, "chunk_length": 2}
        assert torch.equal(sparse_kl_div(student, ids, values, MASK.unsqueeze(-1), **options), expected)


def test_a_repeated_id_and_a_negative_one_count_once_and_never():
    student, ids, values = batch(k=3)
    wider = torch.cat([ids, ids[..., :1], torch.full_like(ids[..., :1], -1)], -1)
    more = torch.cat([values, torch.zeros_like(values[..., :2])], -1)
    for missing in ("zero", "symmetric_uniform"):
        expected = sparse_kl_div(student, ids, values, missing=missing)
        assert_near("loss", sparse_kl_div(student, wider, more, missing=missing), expected, 1e-6)
    padded = torch.cat([values, torch.zeros_like(values[..., :1])], -1)
    options = {"missing": "symmetric_uniform", "temperature": 2.0}
    actual = sparse_kl_div(student, wider[..., [0, 1, 2, 4]], padded, **options)
    assert_near("another temperature", actual, sparse_kl_div(student, ids, values, **options), 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_with_nothing_outside(temperature):
    """DistillKit counts the mass that it has there from eps on: too small a loss, and no gradient of that term."""
    student, ids, values = batch()
    student.scatter_add_(-1, ids, torch.full(ids.shape, 25.0 * temperature))
    options = {"missing": "symmetric_uniform", "temperature": temperature}
    bounded, bounded_gradient, actual, gradient = both(student, ids, values, **options)
    expected, expected_gradient, *_ = both(student, ids, values, eps=0.0, **options)
    assert bounded < 0.9 * expected
    assert (bounded_gradient - expected_gradient).norm() > 0.1 * expected_gradient.norm()
    # fp64 has 1 - Q_S to 1e-5 here.
    assert_near("loss", actual, expected, 2e-6)
    assert_near("gradient", gradient, expected_gradient, 2e-5)


def test_a_teacher_with_nothing_outside():
    """Probabilities whose sum rounding made larger than 1: the two differ by no more than that, and by eps."""
    student, ids, values = batch(k=300)
    values = values + 1e-4
    for temperature in (1.0, 2.0):
        options = {"missing": "symmetric_uniform", "temperature": temperature}
        expected, expected_gradient, actual, gradient = both(student, ids, values, **options)
        assert_near("loss", actual, expected, 5e-4)
        assert_near("gradient", gradient, expected_gradient, 5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mask", [None, MASK, MASK.unsqueeze(-1), MASK * 0.5], ids=["", "mask", "column", "weights"])
def test_dense(dtype, temperature, mask):
    student, teacher = logits_pair(2, 6, 300, dtype=dtype)
    exact, ours = student.double().clone().requires_grad_(), student.clone().requires_grad_()
    log_p, log_q = ((x[:, 1:].double() / temperature).log_softmax(-1) for x in (teacher, exact))
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = (rows if mask is None else rows * mask.reshape(rows.shape)).sum()
    actual = dense_kl_div(ours[:, 1:], teacher[:, 1:], mask, temperature)
    expected.backward()
    actual.backward()
    bound = 1e-11 if dtype == torch.float64 else 2e-6
    assert_near("loss", actual, expected, bound)
    assert_near("gradient", ours.grad, exact.grad, bound)


def test_dense_bf16():
    student, teacher = logits_pair(2, 5, 300, dtype=torch.bfloat16)
    ours = student.clone().requires_grad_()
    dense_kl_div(ours, teacher, MASK).backward()
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    assert_rounded("gradient", ours.grad, (q - p) * MASK.unsqueeze(-1), 4e-6)


@pytest.mark.parametrize("missing", ["zero", "symmetric_uniform", None])
def test_no_token_counts(missing):
    student, ids, values = batch()
    student[0], values[0] = torch.nan, torch.nan
    student.requires_grad_()
    none = torch.zeros_like(MASK)
    if missing is None:
        loss = dense_kl_div(student, torch.full_like(student, torch.nan), none)
    else:
        loss = sparse_kl_div(student, ids, values, none, missing=missing, temperature=2.0)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"missing": "uniform"}, "missing"),
        ({"missing": "symmetric_uniform", "log_target": False}, "log_target"),
        ({"temperature": 0.0}, "^temperature"),
        ({"target_generation_temperature": -1.0}, "target_generation_temperature"),
        ({"student_generation_temperature": float("nan")}, "student_generation_temperature"),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(ValueError, match=match):
        sparse_kl_div(*batch(), **options)
