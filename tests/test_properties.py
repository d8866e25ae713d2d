"""Properties that hold for any logits, tried on many."""

import os

import torch
from checks import BOUNDS, DIVERGENCES, against_reference, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd

CALLS = settings(max_examples=int(os.environ.get("KDKERNELS_EXAMPLES", "60")), deadline=None)


@st.composite
def calls(draw):
    rows, width = draw(st.integers(1, 5)), draw(st.integers(2, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.01, 1.0, 5.0]))
    student = spread * torch.randn(rows, width, generator=generator)
    teacher = spread * torch.randn(rows, width, generator=generator)
    labels = torch.randint(0, width, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    options = {
        "divergence": draw(st.sampled_from([d for n, d in DIVERGENCES.items() if n != "alpha_beta_c0"])),
        "temperature": draw(st.sampled_from([0.5, 1.0, 3.0, 10.0])),
        "kd_weight": draw(st.floats(0.1, 2.0)),
        "ce_weight": draw(st.sampled_from([0.0, 0.5])),
        "scale_by_temperature": draw(st.booleans()),
        "weight": torch.rand(rows, generator=generator) if draw(st.booleans()) else None,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "vocab_size": draw(st.one_of(st.none(), st.integers(1, width))),
        "student_softcap": draw(st.sampled_from([None, 30.0])),
    }
    size = options["vocab_size"] or width
    return student, teacher, torch.where(labels >= size, 0, labels), options


# Not in fp64: where the models nearly agree the reference cancels, and is no more exact than the kernels.
@CALLS
@given(calls(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_call_agrees_with_the_reference(call, dtype):
    student, teacher, labels, options = call
    against_reference(student.to(dtype), teacher.to(dtype), labels, floor=1e-2, **options)


@CALLS
@given(calls())
def test_a_divergence_is_not_negative_and_its_gradient_sums_to_zero(call):
    student, teacher, labels, options = call
    options = {**options, "ce_weight": 0.0, "student_softcap": None}
    leaf = student.clone().requires_grad_()
    _, stats = kd.distillation_loss(leaf, teacher, labels, return_stats=True, **options)
    assert (stats.divergence >= 0).all()
    kd.distillation_loss(leaf, teacher, labels, **options).sum().backward()
    size = leaf.grad.double().abs().sum(-1).clamp_min(1e-6)
    assert (leaf.grad.double().sum(-1).abs() / size).max() < 1e-4


@CALLS
@given(calls())
def test_order_of_the_vocabulary_does_not_matter(call):
    student, teacher, labels, options = call
    options = {**options, "vocab_size": None}
    order = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    moved = torch.where(labels < 0, labels, place[labels.clamp_min(0)])
    one = kd.distillation_loss(student, teacher, labels, **options)
    other = kd.distillation_loss(student[:, order], teacher[:, order], moved, **options)
    assert_near("loss", other, one, 2 * BOUNDS[torch.float32][0])


@CALLS
@given(calls())
def test_padding_does_not_matter(call):
    student, teacher, labels, options = call
    width = options["vocab_size"] or student.shape[-1]
    one = kd.distillation_loss(student, teacher, labels, **options)
    padded = [torch.nn.functional.pad(x[:, :width], (0, 37), value=9.0) for x in (student, teacher)]
    other = kd.distillation_loss(*padded, labels, **{**options, "vocab_size": width})
    assert torch.equal(one, other)
