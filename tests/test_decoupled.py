"""The decoupled family's definitions: the reference against the papers' formulas, term by term in fp64."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_near, logits_pair
from decoupled_cases import FAMILY, labels_for, light_weak_set, tied

import kdkernels as kd
from kdkernels import reference

ROWS, WIDTH = 5, 37
EACH = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)


def pair(**options):
    return logits_pair(ROWS, WIDTH, dtype=torch.float64, **options)


def loss_of(divergence, student, teacher, labels=None, **options):
    return reference.distillation_loss(student, teacher, labels, divergence=divergence, reduction="none", **options)


@EACH
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradcheck(make, temperature):
    divergence = make(WIDTH)
    if isinstance(divergence, kd.AdaptiveKL):
        pytest.skip("its weights are constants to the gradient, not to finite differences; see below")
    student, teacher = (logits[:2] for logits in pair())  # rows are on their own: finite differences of few of them
    labels = labels_for(2, WIDTH)
    torch.autograd.gradcheck(
        lambda z: loss_of(divergence, z, teacher, labels, temperature=temperature, ce_weight=0.3),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("mu", [0.3, 0.5, 0.9, 1.0])
def test_adaptive_kl_is_a_mix_with_constant_weights(mu):
    student, teacher = pair()
    p, q = teacher.softmax(-1), student.softmax(-1)
    ordered, order = p.sort(-1, descending=True)
    head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered < mu)
    head_gap = ((p - q).abs() * head).sum(-1)
    weight = head_gap / (p - q).abs().sum(-1)

    def mix(z):
        forward = loss_of(kd.ForwardKL(), z, teacher)
        return weight * forward + (1 - weight) * loss_of(kd.ReverseKL(), z, teacher)

    leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss, expected = loss_of(kd.AdaptiveKL(mu), leaf, teacher), mix(other)
    assert_near("loss", loss, expected, 1e-12)
    loss.sum().backward()
    expected.sum().backward()
    assert_near("gradient", leaf.grad, other.grad, 1e-12)
    torch.autograd.gradcheck(mix, student.requires_grad_())


def test_adaptive_kl_of_equal_models_is_zero():
    student, _ = pair()
    leaf = student.clone().requires_grad_()
    loss = loss_of(kd.AdaptiveKL(), leaf, student)
    loss.sum().backward()
    assert loss.abs().max() < 1e-14
    assert leaf.grad.abs().max() < 1e-14


def test_dkd_is_tckd_and_nckd():
    student, teacher = pair()
    labels = labels_for(ROWS, WIDTH)
    temperature, alpha, beta = 2.0, 0.7, 5.0
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    at = F.one_hot(labels, WIDTH).bool()
    p_label, q_label = p[at], q[at]
    tckd = p_label * (p_label / q_label).log() + (1 - p_label) * ((1 - p_label) / (1 - q_label)).log()
    rest_p = p[~at].view(ROWS, -1) / (1 - p_label)[:, None]
    rest_q = q[~at].view(ROWS, -1) / (1 - q_label)[:, None]
    nckd = (rest_p * (rest_p / rest_q).log()).sum(-1)
    actual = loss_of(kd.DKD(alpha, beta), student, teacher, labels, temperature=temperature)
    # 1e-10: the textbook's 1 - p of a likely label loses digits that the sets' own sums keep.
    assert_near("DKD", actual, temperature**2 * (alpha * tckd + beta * nckd), 1e-10)


@pytest.mark.parametrize("name", ["label", "top_5", "top_p_0.5"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_all_weights_one_are_forward_kl(name, temperature):
    student, teacher = pair()
    labels = labels_for(ROWS, WIDTH)
    one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    actual = loss_of(FAMILY[name](WIDTH), one, teacher, labels, temperature=temperature)
    expected = loss_of(kd.ForwardKL(), other, teacher, labels, temperature=temperature)
    actual.sum().backward()
    expected.sum().backward()
    assert_near("loss", actual, expected, 1e-12)
    assert_near("gradient", one.grad, other.grad, 1e-12)


def test_terms_are_reported_before_weights():
    student, teacher = pair()
    labels = labels_for(ROWS, WIDTH)
    labels[2] = -100
    loss, stats = kd.reference.distillation_loss(
        student,
        teacher,
        labels,
        divergence=kd.Decoupled(kd.TopK(4), 0.5, 2.0, 3.0),
        reduction="none",
        return_stats=True,
    )
    weak_mass = 1 - stats.strong_mass_teacher
    total = 0.5 * stats.bcd + 2 * stats.strong_mass_teacher * stats.scd + 3 * weak_mass * stats.wcd
    assert_near("divergence", stats.divergence, torch.where(labels == -100, 0, total), 1e-12)
    assert_near("loss", loss, stats.divergence, 1e-12)
    assert all(float(stat[2]) == 0 for stat in stats if stat is not None)


def test_a_set_without_mass_has_no_term():
    student, teacher = pair()
    for mask in (torch.zeros(WIDTH, dtype=torch.bool), torch.ones(WIDTH, dtype=torch.bool)):
        _, stats = kd.reference.distillation_loss(
            student, teacher, divergence=kd.CAKD(1.0, 1.0, kd.Given(mask)), return_stats=True
        )
        assert (stats.bcd == 0).all()
        assert ((stats.scd if not mask.any() else stats.wcd) == 0).all()


def test_an_infinite_term_is_never_nan():
    student, teacher = pair()
    student = student.index_fill(1, torch.tensor([3]), -torch.inf)
    mask = torch.zeros(WIDTH, dtype=torch.bool)
    mask[3] = True
    leaf = student.clone().requires_grad_()
    loss = loss_of(kd.Decoupled(kd.Given(mask)), leaf, teacher)
    loss.sum().backward()
    assert (loss == torch.inf).all()
    assert not leaf.grad.isnan().any()
    without = loss_of(kd.Decoupled(kd.Given(mask), bcd=0.0, scd=0.0), student, teacher)
    assert without.isfinite().all()


@pytest.mark.parametrize("k", [1, 7, WIDTH])
def test_top_k_takes_ties_as_a_whole(k):
    _, teacher = tied(ROWS, WIDTH)
    strong = reference.strong_tokens(teacher, teacher.log_softmax(-1), kd.TopK(k))
    for row, chosen in zip(teacher, strong, strict=True):
        edge = sorted(row.tolist(), reverse=True)[k - 1]
        assert chosen.tolist() == [logit >= edge for logit in row.tolist()]


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_threshold_set(mass):
    for teacher in (tied(ROWS, WIDTH)[1].double(), pair()[1]):
        p = teacher.softmax(-1)
        strong = reference.strong_tokens(teacher, p.log(), kd.TopP(mass))
        held = (p * strong).sum(-1)
        edge = teacher.masked_fill(~strong, torch.inf).amin(-1, keepdim=True)
        assert (strong == (teacher >= edge)).all()
        assert (held >= mass - 1e-12).all()
        assert (held - (p * (teacher == edge)).sum(-1) < mass).all()


def test_a_light_weak_set_keeps_its_digits():
    student, teacher = light_weak_set(4, 1000, 3)
    mask = torch.arange(1000) < 3
    _, stats = kd.reference.distillation_loss(
        student.double(), teacher.double(), divergence=kd.Decoupled(kd.Given(mask)), return_stats=True
    )
    assert (1 - stats.strong_mass_teacher < 1e-6).all()
    weak_p, weak_q = teacher.double()[:, 3:].log_softmax(-1), student.double()[:, 3:].log_softmax(-1)
    assert_near("wcd", stats.wcd, (weak_p.exp() * (weak_p - weak_q)).sum(-1), 1e-12)


def test_term_weights_may_be_tensors():
    student, teacher = pair()
    numbers = kd.Decoupled(kd.TopK(4), 0.5, 2.0, 3.0)
    tensors = kd.Decoupled(kd.TopK(4), torch.tensor(0.5), 2.0, torch.tensor(3.0))
    assert_near("loss", loss_of(tensors, student, teacher), loss_of(numbers, student, teacher), 1e-15)


STUDENT, TEACHER = logits_pair(3, 10)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: kd.TopK(0), ValueError, "k must be at least 1"),
        (lambda: kd.TopK(2.0), TypeError, "k must be an int"),
        (lambda: kd.TopK(True), TypeError, "k must be an int"),
        (lambda: kd.TopP(0.0), ValueError, r"mass must lie in \(0, 1\]"),
        (lambda: kd.TopP(float("nan")), ValueError, "mass must lie in"),
        (lambda: kd.TopP("half"), TypeError, "mass must be a number"),
        (lambda: kd.Given(torch.ones(10)), TypeError, "boolean"),
        (lambda: kd.Given([True]), TypeError, "boolean"),
        (lambda: kd.Given(torch.tensor(True)), ValueError, "scalar"),
        (lambda: kd.Decoupled(5), TypeError, "strong must be"),
        (lambda: kd.Decoupled(kd.Label), TypeError, "did you mean Label"),
        (lambda: kd.Decoupled(kd.Label(), bcd=-1.0), ValueError, "bcd must not be negative"),
        (lambda: kd.Decoupled(kd.Label(), scd=float("inf")), ValueError, "scd must be finite"),
        (lambda: kd.Decoupled(kd.Label(), wcd=torch.ones(1)), ValueError, "wcd must be a number or a 0-dim"),
        (lambda: kd.Decoupled(kd.Label(), wcd=torch.tensor(1)), ValueError, "wcd must be a number or a 0-dim"),
        (lambda: kd.Decoupled(kd.Label(), wcd=torch.tensor(1.0, requires_grad=True)), ValueError, "detach"),
        (lambda: kd.Decoupled(kd.Label(), mass_weighted=1), TypeError, "mass_weighted"),
        (lambda: kd.DKD(alpha="x"), TypeError, "alpha must be a number"),
        (lambda: kd.CAKD(1.0, 1.0, "label"), TypeError, "strong must be"),
        (lambda: kd.AdaptiveKL(0.0), ValueError, "mu must lie in"),
        (lambda: kd.AdaptiveKL(1.5), ValueError, "mu must lie in"),
    ],
)
def test_bad_divergences(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("divergence", "options", "says"),
    [
        (kd.DKD(), {}, "labels are needed"),
        (kd.Decoupled(kd.TopK(11)), {}, "k must not exceed the vocabulary, 10"),
        (kd.Decoupled(kd.TopK(9)), {"vocab_size": 8}, "k must not exceed the vocabulary, 8"),
        (kd.Decoupled(kd.Given(torch.ones(9, dtype=torch.bool))), {}, r"mask must be \(V,\)"),
        (kd.Decoupled(kd.Given(torch.ones(2, 10, dtype=torch.bool))), {}, r"mask must be \(V,\)"),
        (kd.Decoupled(kd.Given(torch.ones(10, 3, dtype=torch.bool).T)), {}, "contiguous"),
    ],
)
def test_divergences_that_do_not_fit_the_logits(divergence, options, says):
    with pytest.raises(ValueError, match=says):
        kd.distillation_loss(STUDENT, TEACHER, divergence=divergence, **options)
