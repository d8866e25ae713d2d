"""The reference of the loss from hidden states: against finite differences and against the loss of the logits."""

import warnings

import pytest
import torch
from checks import assert_near, assert_rounded

import kdkernels as kd

ROWS, WIDTH, HIDDEN, TEACHER_HIDDEN = (2, 3), 9, 5, 4
LABELS = torch.tensor([[0, -1, 8], [3, 3, -1]])
OPTIONS = {
    "divergence": "jensen_shannon",
    "temperature": torch.tensor([[1.0, 2.0, 0.5], [1.5, 1.0, 0.7]]).double(),
    "kd_weight": 0.7,
    "ce_weight": 0.3,
    "weight": torch.tensor([[1.0, 2.0, 0.5], [0.0, 3.0, 1.0]]).double(),
    "ignore_index": -1,
    "normalizer": 3.5,
    "student_logit_scale": 1.3,
    "student_softcap": 4.0,
    "teacher_logit_scale": 0.8,
    "teacher_softcap": 5.0,
}


def operands(dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], kd.LinearTeacher]:
    """The student's hidden states, weight and bias, and a teacher of another hidden size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [normal(*ROWS, HIDDEN), normal(WIDTH, HIDDEN), normal(WIDTH)]
    return student, kd.LinearTeacher(normal(*ROWS, TEACHER_HIDDEN), normal(WIDTH, TEACHER_HIDDEN), normal(WIDTH))


def loss_of(hidden, weight, bias, teacher, labels=None, /, **options):
    return kd.reference.linear_distillation_loss(hidden, weight, teacher, labels, student_bias=bias, **options)


@pytest.mark.parametrize(
    ("labels", "options"),
    [(None, {}), (None, {"divergence": "reverse_kl", "reduction": "none", "temperature": 2.0}), (LABELS, OPTIONS)],
    ids=["defaults", "loss per row", "every option"],
)
@pytest.mark.parametrize("from_logits", [False, True])
def test_gradcheck(labels, options, from_logits):
    student, teacher = operands()
    if from_logits:
        teacher = teacher.hidden @ teacher.weight.T + teacher.bias
    leaves = tuple(x.requires_grad_() for x in student)
    assert torch.autograd.gradcheck(lambda *x: loss_of(*x, teacher, labels, **options), leaves, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda *x: loss_of(*x, None, teacher, labels, **options), leaves[:2], fast_mode=True
    )


def test_it_is_the_loss_of_the_logits():
    (hidden, weight, bias), teacher = operands()
    student_logits = hidden @ weight.T + bias
    teacher_logits = teacher.hidden @ teacher.weight.T + teacher.bias
    expected, expected_stats = kd.reference.distillation_loss(
        student_logits, teacher_logits, LABELS, return_stats=True, **OPTIONS
    )
    ignored = {"logits_dtype": torch.float32, "workspace_bytes": 1, "compact": True}
    for kind in (teacher, teacher_logits):
        loss, stats = loss_of(hidden, weight, bias, kind, LABELS, return_stats=True, **ignored, **OPTIONS)
        assert torch.equal(loss, expected)
        for name, actual, want in zip(stats._fields, stats, expected_stats, strict=True):
            assert (actual is None) == (want is None), name
            assert want is None or torch.equal(actual, want), name


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_rounded_to_16_bits(autocast):
    student, teacher = operands(torch.bfloat16)
    exact = [x.double() for x in student], kd.LinearTeacher(*(x.double() for x in teacher))
    for leaf in (*student, *exact[0]):
        leaf.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = loss_of(*student, teacher)
    expected = loss_of(*exact[0], exact[1])
    assert loss.dtype == torch.float32
    assert_near("loss", loss, expected, 1e-6)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(student, exact[0], strict=True):
        assert ours.grad.dtype == torch.bfloat16
        assert_rounded("gradient", ours.grad, theirs.grad, 1e-5)


def test_dtypes():
    student, teacher = operands(torch.float32)
    double = kd.LinearTeacher(*(x.double() for x in teacher))
    loss, stats = loss_of(*student, double, return_stats=True)
    assert loss.dtype == stats.divergence.dtype == torch.float32
    exact = loss_of(*(x.double() for x in student), double)
    assert exact.dtype == torch.float64
    assert torch.equal(loss, exact.float())  # one operand in fp64, and everything is computed in it


def test_the_teacher_gets_no_gradient():
    student, teacher = operands()
    for leaf in (*student, *teacher):
        leaf.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once a process: hidden states that require grad get none
        loss_of(*student, teacher).backward()
    assert all(x.grad is not None for x in student)
    assert all(x.grad is None for x in teacher)


def test_no_rows():
    student, teacher = operands()
    hidden, weight, bias = student[0][:0].requires_grad_(), *(x.requires_grad_() for x in student[1:])
    none = kd.LinearTeacher(teacher.hidden[:0], *teacher[1:])
    loss = loss_of(hidden, weight, bias, none)
    loss.backward()
    assert loss.item() == 0
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()
