"""The registered operators: what autograd, torch.compile and opcheck ask of them."""

import pytest
import torch
from checks import assert_near, logits_pair

import kdkernels as kd
from kdkernels import ops

LABELS = torch.tensor([0, -100, 7, 3, 99])


def operator_arguments(student, teacher, *, labels=None, form_gradient=True, divergence=None, ce_weight=0.0):
    which = divergence or kd.ForwardKL()
    rows = student.shape[:-1]
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    return (
        student,
        teacher,
        labels,
        scale.double() if student.dtype == torch.float64 else scale,
        None,
        None,
        None,
        "native",
        which.name,
        list(which.parameters()),
        "",
        0.0,
        1.5,
        0.7,
        ce_weight,
        True,
        student.shape[-1],
        1.0,
        0.0,
        1.0,
        0.0,
        "",
        True,
        form_gradient,
        False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("view", [False, True])
def test_opcheck_row_loss(dtype, view):
    student, teacher = logits_pair(2, 5, 100, dtype=dtype)
    if view:
        student, teacher = student[:, :-1], teacher[:, :-1]
    labels = torch.tensor([0, 5, 99, 3, 2]).expand(2, 5)[:, : student.shape[1]]
    torch.library.opcheck(ops.row_loss, operator_arguments(student, teacher, form_gradient=False))
    leaf = student.clone().requires_grad_()
    torch.library.opcheck(ops.row_loss, operator_arguments(leaf, teacher, labels=labels, ce_weight=0.5))


def test_opcheck_scale_rows():
    values = torch.randn(5, 100)
    torch.library.opcheck(torch.ops.kdkernels.scale_rows.default, (values, torch.rand(5), "native"))


# Adaptive KL's weights are constants to the gradient, not to finite differences: see test_decoupled.py.
@pytest.mark.parametrize("name", [name for name in kd.divergences.BY_NAME if name != "adaptive_kl"])
def test_gradcheck_of_the_kernels(name):
    student, teacher = logits_pair(3, 7, dtype=torch.float64)
    labels = torch.tensor([0, -100, 6])

    def loss(z):
        return kd.distillation_loss(
            z, teacher, labels, divergence=name, temperature=1.7, ce_weight=0.3, student_softcap=4.0, reduction="none"
        )

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_twice_gives_the_same_gradient(inplace, dtype):
    student, teacher = logits_pair(5, 100, dtype=dtype)
    leaf = student.requires_grad_()
    loss = 3.0 * kd.distillation_loss(leaf * 1, teacher, LABELS, inplace=inplace)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    first.zero_()  # what a caller does to its gradient is its own affair
    (third,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(second, kept)
    assert torch.equal(third, kept)


def test_different_incoming_gradients_on_one_graph():
    student, teacher = logits_pair(5, 100)
    leaf = student.requires_grad_()
    loss = kd.distillation_loss(leaf * 1, teacher, LABELS)
    (one,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (none,) = torch.autograd.grad(loss, leaf, torch.tensor(0.0), retain_graph=True)
    (four,) = torch.autograd.grad(loss, leaf, torch.tensor(4.0))
    assert (none == 0).all()
    assert torch.equal(four, 4 * one)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0, 0.0])
def test_incoming_gradient_scalar(inplace, factor):
    student, teacher = logits_pair(5, 100)
    one, two = student.clone().requires_grad_(), student.double().requires_grad_()
    (factor * kd.distillation_loss(one * 1, teacher, LABELS, ce_weight=0.5, inplace=inplace)).backward()
    (factor * kd.reference.distillation_loss(two, teacher.double(), LABELS, ce_weight=0.5)).backward()
    assert_near("gradient", one.grad, two.grad, 2e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_incoming_gradient_per_token(inplace, dtype):
    student, teacher = logits_pair(5, 100, dtype=dtype)
    factors = torch.tensor([1.0, 5.0, -2.0, 0.0, 0.5])
    one, two = student.clone().requires_grad_(), student.double().requires_grad_()
    (factors * kd.distillation_loss(one * 1, teacher, LABELS, reduction="none", inplace=inplace)).sum().backward()
    (factors * kd.reference.distillation_loss(two, teacher.double(), LABELS, reduction="none")).sum().backward()
    assert_near("gradient", one.grad, two.grad, 2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("inplace", [False, True])
def test_fp16_gradients_survive_under_a_loss_scale(inplace):
    # 1/65536 of a token's gradient is under the smallest half; under a loss scale of 65536 it must not be.
    student, teacher = logits_pair(64, 5000, dtype=torch.float16)
    one, two = student.clone().requires_grad_(), student.double().requires_grad_()
    normalizer, scale = 65536.0, 65536.0
    (scale * kd.distillation_loss(one * 1, teacher, normalizer=normalizer, inplace=inplace)).backward()
    (scale * kd.reference.distillation_loss(two, teacher.double(), normalizer=normalizer)).backward()
    assert_near("gradient", one.grad, two.grad, 1e-3)


def test_gradient_reaches_what_made_the_logits():
    hidden, weight = torch.randn(6, 8), torch.randn(100, 8)
    results = []
    for inplace in (False, True):
        w = weight.clone().requires_grad_()
        logits = hidden @ w.T
        kd.distillation_loss(
            logits, torch.randn(6, 100, generator=torch.Generator().manual_seed(0)), inplace=inplace
        ).backward()
        results.append(w.grad)
    assert_near("weight gradient", results[0], results[1], 1e-6)


def test_inplace_tells_others_that_saved_the_logits():
    leaf = torch.randn(3, 10, requires_grad=True)
    logits = leaf.exp()  # exp saves its output for backward
    loss = kd.distillation_loss(logits, torch.randn(3, 10), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changed_logits_after_inplace_are_noticed():
    leaf = torch.randn(3, 10, requires_grad=True)
    logits = leaf * 1
    loss = kd.distillation_loss(logits, torch.randn(3, 10), inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_no_memory():
    student, teacher = logits_pair(5, 100)
    with torch.no_grad():
        assert not kd.distillation_loss(student.requires_grad_(), teacher).requires_grad
    assert not kd.distillation_loss(student.detach(), teacher).requires_grad
    _, _, gradient = ops.row_loss(*operator_arguments(student.detach(), teacher, form_gradient=False))
    assert gradient.numel() == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_double_backward_is_a_clear_error(inplace):
    leaf = torch.randn(3, 10, requires_grad=True)
    loss = kd.distillation_loss(leaf * 1, torch.randn(3, 10), inplace=inplace)
    with pytest.raises(RuntimeError, match="no gradient of a gradient"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(dtype, reduction):
    torch._dynamo.reset()
    student, teacher = logits_pair(5, 100, dtype=dtype)

    def step(z, y, labels):
        loss, stats = kd.distillation_loss(
            z * 1, y, labels, divergence=kd.JensenShannon(0.3), temperature=2.0, ce_weight=0.5, reduction=reduction,
            inplace=True, return_stats=True,
        )  # fmt: skip
        return 2 * loss.sum(), stats.divergence

    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected, expected_stat = step(one, teacher, LABELS)
    actual, stat = torch.compile(step, fullgraph=True)(two, teacher, LABELS)
    assert_near("loss", actual, expected, 1e-6)
    assert_near("stat", stat, expected_stat, 1e-6)
    expected.backward()
    actual.backward()
    assert_near("gradient", two.grad, one.grad, 1e-6 if dtype == torch.float32 else 4e-3)


def test_compile_dynamic_shapes():
    torch._dynamo.reset()

    def step(z, y, temperature, kd_weight):
        return kd.distillation_loss(z, y, temperature=temperature, kd_weight=kd_weight)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows, width, *numbers in ((3, 50, 2.0, 1.0), (4, 60, 1.5, 0.5), (7, 33, 0.7, 0.25)):
        student, teacher = logits_pair(rows, width)
        one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
        with torch.compiler.set_stance("default" if rows == 3 else "fail_on_recompile"):
            loss = compiled(one, teacher, *numbers)
        expected = step(two, teacher, *numbers)
        loss.backward()
        expected.backward()
        assert_near("loss", loss, expected, 1e-6)
        assert_near("gradient", one.grad, two.grad, 1e-6)


def test_under_autocast_logits_are_taken_as_they_come():
    student, teacher = logits_pair(5, 100)
    expected = kd.distillation_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kd.distillation_loss(student, teacher), expected)


def test_activation_checkpointing():
    student, teacher = logits_pair(5, 100)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(
        lambda z: kd.distillation_loss(z * 2, teacher), one, use_reentrant=False
    ).backward()
    kd.distillation_loss(two * 2, teacher).backward()
    assert torch.equal(one.grad, two.grad)
