"""The reference against finite differences, other libraries' forms and the definitions' own identities."""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import DIVERGENCES, assert_near, logits_pair

import kdkernels as kd


def doubles(*shape, **how):
    student, teacher = logits_pair(*shape, **how)
    return student.double().requires_grad_(), teacher.double()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradcheck(name, temperature):
    student, teacher = doubles(3, 7, spread=1.0)

    def loss(z):
        return kd.reference.distillation_loss(
            z, teacher, divergence=DIVERGENCES[name], temperature=temperature, reduction="none"
        )

    assert torch.autograd.gradcheck(loss, (student,))


def test_gradcheck_with_every_option():
    student, teacher = doubles(2, 4, 9, spread=1.0)
    labels = torch.tensor([[0, 3, -1, 8], [5, -1, 2, 2]])
    temperature = torch.tensor([[1.0, 2.0, 0.5, 1.5], [1.0, 1.0, 3.0, 0.7]]).double()
    weight = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)).double()

    def loss(z):
        return kd.reference.distillation_loss(
            z,
            teacher,
            labels,
            divergence="jensen_shannon",
            temperature=temperature,
            kd_weight=0.7,
            ce_weight=0.3,
            weight=weight,
            ignore_index=-1,
            vocab_size=9,
            normalizer=3.5,
            student_logit_scale=1.3,
            student_softcap=4.0,
            teacher_logit_scale=0.8,
            teacher_softcap=5.0,
        )

    assert torch.autograd.gradcheck(loss, (student,))


def log_softmaxes(*shape):
    student, teacher = doubles(*shape)
    return F.log_softmax(teacher, -1), F.log_softmax(student.detach(), -1)


def test_kl_agrees_with_torch():
    log_p, log_q = log_softmaxes(5, 100)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    assert_near("forward", kd.reference.divergence(log_p, log_q, "forward_kl"), forward, 1e-14)
    assert_near("reverse", kd.reference.divergence(log_p, log_q, "reverse_kl"), reverse, 1e-14)
    symmetric = kd.reference.divergence(log_p, log_q, kd.SymmetricKL(0.3))
    assert_near("symmetric", symmetric, 0.7 * forward + 0.3 * reverse, 1e-14)


def test_the_definitions_written_out():
    log_p, log_q = log_softmaxes(5, 100)
    p, q = log_p.exp(), log_q.exp()

    def value(divergence):
        return kd.reference.divergence(log_p, log_q, divergence)

    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        expected = (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)
        assert_near("jsd", value(kd.JensenShannon(beta)), expected, 1e-12)
    m = 0.2 * p + 0.8 * q
    assert_near("skew forward", value(kd.SkewForwardKL(0.2)), (p * (p / m).log()).sum(-1), 1e-12)
    m = 0.8 * p + 0.2 * q
    assert_near("skew reverse", value(kd.SkewReverseKL(0.2)), (q * (q / m).log()).sum(-1), 1e-12)
    assert_near("tv", value("total_variation"), (p - q).abs().sum(-1) / 2, 1e-14)
    a, b = 0.3, 0.9
    expected = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)
    assert_near("alpha-beta", value(kd.AlphaBeta(a, b)), expected, 1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.7), (0.7, 0.0), (0.5, -0.5), (0.0, 0.0)])
def test_alpha_beta_limits_are_limits(alpha, beta):
    log_p, log_q = log_softmaxes(5, 20)
    at = kd.reference.divergence(log_p, log_q, kd.AlphaBeta(alpha, beta))
    beside = kd.reference.divergence(log_p, log_q, kd.AlphaBeta(alpha + 1e-5, beta + 2e-5))
    assert_near("limit", beside, at, 1e-3)


def test_special_cases_are_kl():
    log_p, log_q = log_softmaxes(5, 20)
    for forward in (kd.JensenShannon(0.0), kd.AlphaBeta(1.0, 0.0), kd.SkewForwardKL(0.0), kd.SymmetricKL(0.0)):
        assert forward.canonical() == kd.ForwardKL()
    for reverse in (kd.JensenShannon(1.0), kd.AlphaBeta(0.0, 1.0), kd.SkewReverseKL(0.0), kd.SymmetricKL(1.0)):
        assert reverse.canonical() == kd.ReverseKL()
    nearly = kd.reference.divergence(log_p, log_q, kd.AlphaBeta(1.0, 1e-7))
    assert_near("alpha-beta", nearly, kd.reference.divergence(log_p, log_q, kd.ForwardKL()), 1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_at_equality_and_positive_elsewhere(name):
    log_p, log_q = log_softmaxes(50, 20)
    assert kd.reference.divergence(log_p, log_p, DIVERGENCES[name]).abs().max() < 1e-14
    assert (kd.reference.divergence(log_p, log_q, DIVERGENCES[name]) > 0).all()


def test_jensen_shannon_far_apart_is_finite():
    # Formed without a maximum shift, the mixture is log(0) under log-probabilities of -104 in fp32.
    log_p, log_q = torch.tensor([[0.0, -300.0, -400.0]]), torch.tensor([[-300.0, -1e-30, -400.0]])
    value = kd.reference.divergence(log_p, log_q, "jensen_shannon")
    assert_near("jsd", value, torch.tensor([math.log(2)]), 1e-6)


def test_total_is_hinton_s_objective():
    student, teacher = doubles(6, 11)
    labels = torch.arange(6)
    total = kd.reference.distillation_loss(student, teacher, labels, temperature=2.0, kd_weight=0.9, ce_weight=0.1)
    kl = F.kl_div(
        F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), log_target=True, reduction="batchmean"
    )
    expected = 0.9 * 4 * kl + 0.1 * F.cross_entropy(student, labels)
    assert_near("total", total, expected, 1e-14)


def test_softcap_and_scale_are_those_of_the_models():
    student, teacher = doubles(6, 11)
    actual = kd.reference.distillation_loss(student, teacher, student_softcap=3.0, teacher_logit_scale=0.5)
    expected = kd.reference.distillation_loss(3 * torch.tanh(student / 3), 0.5 * teacher)
    assert_near("transform", actual, expected, 1e-15)
