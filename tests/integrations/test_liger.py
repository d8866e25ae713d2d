"""Liger Kernel's distillation losses against its own, whose Triton kernels run interpreted where there is no GPU."""

from functools import partial

import pytest
import torch
from checks import assert_near
from checks import logits_pair as cpu_logits_pair
from frameworks import import_quietly
from originals import agree, compiles, in_bfloat16, outcome

from kdkernels.integrations import liger

jsd_original = import_quietly("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD
chunked_original = import_quietly("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
kl_div_original = import_quietly("liger_kernel.transformers.kl_div").LigerKLDIVLoss


# Triton's interpreter computes masked lanes with NumPy, which warns of -inf less -inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class Scalar(float):
    """A number as a compiled kernel gets one; Triton's interpreter passes Python's, which has no ``to``."""

    def to(self, dtype):
        return self


def kl_original(**options):
    return kl_div_original(1e-10 if DEVICE == "cuda" else Scalar(1e-10), **options)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as tests/conftest.py chooses for Triton
LABELS = torch.tensor([3, -100, 0, 66, 1, -100, 5], device=DEVICE)
TOKENS, VOCABULARY = len(LABELS), 67


def logits_pair(*shape):
    return [logits.to(DEVICE) for logits in cpu_logits_pair(*shape)]


def states(dtype=torch.float32, teacher_vocabulary=VOCABULARY):
    """Hidden states and weight of student (hidden 5) and teacher (hidden 9), biases."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    student = (normal(TOKENS, 5), normal(VOCABULARY, 5), normal(VOCABULARY))
    return student, (normal(TOKENS, 9), normal(teacher_vocabulary, 9), normal(teacher_vocabulary))


# ---- LigerFusedLinearJSD


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["no labels", "labels"])
def test_fused_linear_jsd(beta, temperature, labels):
    (hidden, weight, _), (teacher_hidden, teacher_weight, _) = states()

    def of(make):
        loss = make(jsd_beta=beta, temperature=temperature)
        return lambda h, w: loss(h, w, teacher_hidden, teacher_weight, labels)

    agree(of(liger.LigerFusedLinearJSD), of(jsd_original), hidden, weight)


def test_fused_linear_jsd_settings():
    (hidden, weight, _), (teacher_hidden, teacher_weight, _) = states()
    call = (teacher_hidden, teacher_weight, LABELS.clamp(min=0))
    for options in ({"ignore_index": 5}, {"accum_dtype": torch.float32}):
        ours, theirs = liger.LigerFusedLinearJSD(**options), jsd_original(**options)
        agree(lambda h, w, f=ours: f(h, w, *call), lambda h, w, f=theirs: f(h, w, *call), hidden, weight)


def test_fused_linear_jsd_no_label_counts():
    (hidden, weight, _), (teacher_hidden, teacher_weight, _) = states()
    labels = torch.full_like(LABELS, -100)
    ours = liger.LigerFusedLinearJSD()
    loss, *gradients = outcome(lambda h, w: ours(h, w, teacher_hidden, teacher_weight, labels), hidden, weight)
    assert float(loss) == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_fused_linear_jsd_bfloat16():
    (hidden, weight, _), (teacher_hidden, teacher_weight, _) = states(torch.bfloat16)
    ours, theirs = (make(0.3, temperature=2.0) for make in (liger.LigerFusedLinearJSD, jsd_original))
    in_bfloat16(
        lambda h, w: ours(h, w, teacher_hidden, teacher_weight, LABELS),
        lambda h, w: theirs(h.float(), w.float(), teacher_hidden.float(), teacher_weight.float(), LABELS),
        hidden,
        weight,
        gradient_bound=2**-8,
    )


# ---- LigerFusedLinearJSDLoss


def chunked(make, labels=LABELS, teacher=None, **options):
    _, of_teacher = states() if teacher is None else (None, teacher)
    loss = make(compiled=False, **options)

    def call(hidden, weight, bias=None):
        result = loss(hidden, weight, *of_teacher[:2], labels, bias, of_teacher[2])
        return result[0] if isinstance(result, tuple) else result

    return call


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 0.8), (1.3, 0.0)], ids=str)
def test_chunked_jsd(beta, temperature, weights):
    (hidden, weight, bias), _ = states()
    options = {
        "beta": beta,
        "temperature": temperature,
        "weight_hard_loss": weights[0],
        "weight_soft_loss": weights[1],
    }
    ours, theirs = (chunked(make, **options) for make in (liger.LigerFusedLinearJSDLoss, chunked_original))
    agree(ours, theirs, hidden, weight, bias)
    agree(ours, theirs, hidden, weight)


def test_chunked_jsd_settings():
    (hidden, weight, bias), _ = states()
    for options in ({"ignore_index": 5, "labels": LABELS.clamp(min=0)}, {"chunk_size": 2}):
        ours, theirs = (chunked(make, **options) for make in (liger.LigerFusedLinearJSDLoss, chunked_original))
        agree(ours, theirs, hidden, weight, bias)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 0.8), (1.3, 0.0), (0.0, 0.0)], ids=str)
def test_soft_and_hard_loss(weights):
    (hidden, weight, bias), teacher = states()
    options = {"weight_hard_loss": weights[0], "weight_soft_loss": weights[1], "temperature": 2.0, "beta": 0.3}
    results = []
    for make in (liger.LigerFusedLinearJSDLoss, chunked_original):
        loss = make(compiled=False, return_soft_hard_loss=True, **options)
        leaf = hidden.clone().requires_grad_()
        results.append((leaf, loss(leaf, weight, *teacher[:2], LABELS, bias, teacher[2])))
    (_, ours), (leaf, theirs) = results
    for name, actual, expected in zip(("loss", "soft", "hard"), ours, theirs, strict=True):
        assert_near(name, actual, expected, 2e-6)
    assert not ours[1].requires_grad
    assert not ours[2].requires_grad
    # Theirs has a gradient, of 0, which is none of the soft loss.
    theirs[1].backward()
    assert (leaf.grad == 0).all()
    assert all(
        float(loss) == 0
        for loss in liger.LigerFusedLinearJSDLoss(return_soft_hard_loss=True, **options)(
            hidden, weight, *teacher[:2], torch.full_like(LABELS, -100)
        )
    )


def test_chunked_jsd_no_label_counts():
    (hidden, weight, bias), _ = states()
    loss, *gradients = outcome(
        chunked(liger.LigerFusedLinearJSDLoss, torch.full_like(LABELS, -100)), hidden, weight, bias
    )
    assert float(loss) == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_chunked_jsd_bfloat16():
    (hidden, weight, bias), teacher = states(torch.bfloat16)
    options = {"temperature": 2.0, "beta": 0.3}
    theirs = chunked(chunked_original, teacher=[x.float() for x in teacher], **options)
    in_bfloat16(
        chunked(liger.LigerFusedLinearJSDLoss, teacher=teacher, **options),
        lambda h, w, b: theirs(h.float(), w.float(), b.float()),
        hidden,
        weight,
        bias,
        gradient_bound=2**-8,
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_with_more_tokens(beta):
    """Its further columns are padding: as if they were not there. The original gives the student tokens for them."""
    (hidden, weight, bias), teacher = states(teacher_vocabulary=VOCABULARY + 5)
    cut = (teacher[0], teacher[1][:VOCABULARY], teacher[2][:VOCABULARY])
    options = {"beta": beta, "temperature": 2.0}
    ours = chunked(liger.LigerFusedLinearJSDLoss, teacher=teacher, **options)
    agree(ours, chunked(chunked_original, teacher=cut, **options), hidden, weight, bias)

    def phantom(h, w, b):
        z = torch.cat([(h @ w.T + b) / 2.0, torch.zeros(TOKENS, 5, device=DEVICE)], -1)
        log_q, log_p = z.log_softmax(-1), ((teacher[0] @ teacher[1].T + teacher[2]) / 2.0).log_softmax(-1)
        log_m = torch.logaddexp(log_p + torch.tensor(beta).log(), log_q + torch.tensor(1 - beta).log())
        to_p, to_q = (log_p, log_q) if beta in (0.0, 1.0) else (log_m, log_m)
        kl = (log_p.exp() * (log_p - to_q)).sum(-1), (log_q.exp() * (log_q - to_p)).sum(-1)
        soft = kl[int(beta)] if beta in (0.0, 1.0) else beta * kl[0] + (1 - beta) * kl[1]
        hard = torch.nn.functional.cross_entropy(h @ w.T + b, LABELS)
        return (hard + soft[LABELS != -100].mean()) / 2

    theirs = chunked(chunked_original, teacher=teacher, **options)
    agree(phantom, theirs, hidden, weight, bias)
    assert abs(float(theirs(hidden, weight, bias) - ours(hidden, weight, bias))) > 1e-3


def test_a_student_with_more_tokens():
    (hidden, weight, bias), teacher = states(teacher_vocabulary=VOCABULARY - 5)
    with pytest.raises(ValueError, match="teacher_weight must have at least the 67 rows"):
        chunked(liger.LigerFusedLinearJSDLoss, teacher=teacher)(hidden, weight, bias)
    with pytest.raises(ValueError, match="vocabulary of 67"):
        liger.LigerFusedLinearJSD()(hidden, weight, *teacher[:2], LABELS)


# ---- LigerKLDIVLoss

KL = [(reduction, log_target) for reduction in ("mean", "batchmean", "sum") for log_target in (False, True)]


@pytest.mark.parametrize(("reduction", "log_target"), KL)
def test_kl_div(reduction, log_target):
    student, teacher = logits_pair(7, 101)
    target = teacher.log_softmax(-1) if log_target else teacher.softmax(-1)
    ours, theirs = (make(reduction=reduction, log_target=log_target) for make in (liger.LigerKLDIVLoss, kl_original))
    agree(
        lambda logits: ours(logits.log_softmax(-1), target),
        lambda logits: theirs(logits.log_softmax(-1), target),
        student,
    )
    # The log_softmax may as well be left out.
    agree(lambda logits: ours(logits, target), lambda logits: theirs(logits.log_softmax(-1), target), student)
    if log_target:
        assert_near("loss", ours(student, teacher), ours(student.log_softmax(-1), target), 2e-6)


def test_kl_div_gradient_of_log_probabilities():
    student, teacher = logits_pair(7, 101)
    log_q, p = student.log_softmax(-1), teacher.softmax(-1)
    _, ours = outcome(lambda x: liger.LigerKLDIVLoss(reduction="sum")(x, p), log_q)
    _, theirs = outcome(lambda x: kl_original(reduction="sum")(x, p), log_q)
    assert_near("ours", ours, log_q.exp() - p, 2e-6)
    assert_near("theirs", theirs, -p, 2e-6)


def test_kl_div_probabilities_of_0():
    student, teacher = logits_pair(7, 101)
    teacher[:, [3, 50]] = -torch.inf
    for log_target in (False, True):
        target = teacher.log_softmax(-1) if log_target else teacher.softmax(-1)
        loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=log_target)
        value, gradient = outcome(lambda x, f=loss, t=target: f(x.log_softmax(-1), t), student)
        expected, wanted = outcome(
            lambda x: kl_original(reduction="batchmean")(x.log_softmax(-1), teacher.softmax(-1)), student
        )
        assert_near("loss", value, expected, 2e-6)
        assert_near("gradient", gradient, wanted, 2e-6)
    log_q = student.log_softmax(-1)
    assert kl_original(log_target=True)(log_q, teacher.log_softmax(-1)).isnan()
    empty = torch.zeros_like(log_q)
    assert liger.LigerKLDIVLoss()(log_q, empty).isnan()


def test_kl_div_rows_are_normalised():
    student, teacher = logits_pair(7, 101)
    p = teacher.softmax(-1)
    loss = liger.LigerKLDIVLoss(reduction="sum")
    assert_near("loss", loss(student, 3 * p), loss(student, p), 2e-6)


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_bfloat16(log_target):
    student, teacher = logits_pair(7, 101)
    target = (teacher.log_softmax(-1) if log_target else teacher.softmax(-1)).bfloat16()
    before = target.clone()
    options = {"reduction": "batchmean", "log_target": log_target}

    def exact(x):
        log_p = target.double() if log_target else target.double().log()
        log_p, log_q = log_p.log_softmax(-1), x.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum() / 7

    in_bfloat16(partial(liger.LigerKLDIVLoss(**options), y_true=target), exact, student)
    assert torch.equal(target, before)


def test_kl_div_keeps_its_arguments():
    loss = liger.LigerKLDIVLoss(1e-8, None, None, "batchmean", True)
    assert isinstance(loss, torch.nn.KLDivLoss)
    assert (loss.eps, loss.reduction, loss.log_target) == (1e-8, "batchmean", True)
    student, teacher = logits_pair(2, 3, 101)
    p = teacher.softmax(-1)
    expected = torch.nn.functional.kl_div(student.log_softmax(-1), p, reduction="batchmean")
    assert_near("loss", liger.LigerKLDIVLoss(reduction="batchmean")(student, p), expected, 2e-6)
    p.requires_grad_()
    liger.LigerKLDIVLoss()(student.requires_grad_(), p).backward()
    assert p.grad is None


def test_compiled():
    (hidden, weight, _), teacher = states()
    hidden.requires_grad_()
    compiles(liger.LigerFusedLinearJSD(0.3, temperature=2.5), hidden, weight, *teacher[:2], LABELS)
    loss = liger.LigerFusedLinearJSDLoss(temperature=2.5, return_soft_hard_loss=True)
    compiles(loss, hidden, weight, *teacher[:2], LABELS, None, teacher[2])
    student, target = logits_pair(7, 101)
    compiles(liger.LigerKLDIVLoss(), student.requires_grad_(), target.softmax(-1))


def test_bad_input():
    for make in (liger.LigerFusedLinearJSD, liger.LigerFusedLinearJSDLoss):
        for temperature in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="temperature must be positive"):
                make(temperature=temperature)
    with pytest.raises(ValueError, match="beta must lie"):
        liger.LigerFusedLinearJSD(1.5)
    with pytest.raises(ValueError, match="beta must lie"):
        liger.LigerFusedLinearJSDLoss(beta=-0.1)
    with pytest.raises(ValueError, match="weight_hard_loss must not be negative"):
        liger.LigerFusedLinearJSDLoss(-0.5)
    with pytest.raises(NotImplementedError, match="reduction='none'"):
        liger.LigerKLDIVLoss(reduction="none")
    with pytest.raises(ValueError, match="reduction must be one of"):
        liger.LigerKLDIVLoss(reduction="median")
