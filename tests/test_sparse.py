"""Sparse teachers: the C++ CPU kernels and the reference, against each other and what is known of the losses."""

import functools
import os

import checks
import pytest
import torch
from checks import BOUNDS, assert_near, assert_rounded, in_double, logits_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import FLOOR, LOSSES, TAILS, check, check_stats, nearly_all, ragged, repeated, sparse_pair, top_k

import kdkernels as kd
from kdkernels import ops
from kdkernels._ids import first_occurrences

pytestmark = pytest.mark.usefixtures("one_thread")

EACH = pytest.mark.parametrize(("tail", "divergence"), LOSSES.values(), ids=LOSSES)
EACH_TAIL = pytest.mark.parametrize("tail", TAILS)
ANY_TEMPERATURE = {name: loss for name, loss in LOSSES.items() if loss[0] in ("renormalize", "teacher")}
EACH_OF_ANY_TEMPERATURE = pytest.mark.parametrize(("tail", "divergence"), ANY_TEMPERATURE.values(), ids=ANY_TEMPERATURE)
EACH_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
TWO_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# A warm fp64 reference keeps 1e-12 of a divergence that is itself small: it is a difference of logarithms.
FP64_SLACK = 10.0


def compare(student, teacher, divergence=None, labels=None, **options):
    slack = options.pop("slack", FP64_SLACK if student.dtype == torch.float64 else 1.0)
    check(student, teacher, divergence, labels, slack=slack, **options)


def temperatures(tail: str, temperature: float) -> dict[str, float]:
    """A temperature for a loss that takes any."""
    return {"temperature": temperature} if tail in ("renormalize", "teacher") else {}


gradient_of = functools.partial(checks.gradient_of, reduction="none")


# 1 and 7: less than a register; 1000: less than a block; 4099: more. 1 id: D within S is 0; 4096: the most allowed.
@EACH
@EACH_DTYPE
@pytest.mark.parametrize(("width", "k"), [(1, 1), (7, 5), (1000, 1), (1000, 64), (4099, 4096)])
def test_widths(tail, divergence, dtype, width, k):
    compare(*sparse_pair(4, width, k=k, tail=tail, dtype=dtype), divergence, reduction="sum")


@EACH
@TWO_DTYPES
def test_many_blocks(capability, tail, divergence, dtype):
    compare(*sparse_pair(2, 32000, k=64, tail=tail, dtype=dtype), divergence, reduction="sum")


@EACH
@EACH_DTYPE
def test_instruction_sets(capability, tail, divergence, dtype):
    student, teacher = sparse_pair(5, 2099, k=37, tail=tail, dtype=dtype)
    options = {"ce_weight": 0.5, "student_softcap": 6.0, "student_logit_scale": 0.8, **temperatures(tail, 1.7)}
    labels = torch.tensor([0, 2098, -100, 17, 5])
    compare(student, ragged(teacher), divergence, labels, reduction="sum", **options)


@EACH_OF_ANY_TEMPERATURE
@TWO_DTYPES
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 20.0])
def test_temperatures(tail, divergence, dtype, temperature):
    compare(*sparse_pair(5, 1501, k=64, tail=tail, dtype=dtype), divergence, temperature=temperature, reduction="sum")


@EACH_OF_ANY_TEMPERATURE
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("scale_by_temperature", [True, False])
def test_temperature_per_row(tail, divergence, ce_weight, scale_by_temperature):
    student, teacher = sparse_pair(3, 4, 1000, k=16, tail=tail)
    options = {"ce_weight": ce_weight, "scale_by_temperature": scale_by_temperature}
    temperature = torch.linspace(0.2, 5.0, 12).view(3, 4)
    compare(student, teacher, divergence, LABELS, temperature=temperature, **options)


@EACH
@pytest.mark.parametrize("given", [0.5, 2.0, 1.7])
def test_teacher_temperature(tail, divergence, given):
    student, teacher = sparse_pair(4, 1000, k=16, tail=tail)
    teacher = teacher._replace(teacher_temperature=given)
    temperature = 3.0 if tail in ("renormalize", "teacher") else given
    compare(student, teacher, divergence, temperature=temperature, reduction="sum")
    check_stats(student, teacher, divergence=divergence, temperature=temperature)


@EACH
@EACH_DTYPE
def test_rows_of_unequal_length(tail, divergence, dtype):
    student, teacher = sparse_pair(6, 1000, k=9, tail=tail, dtype=dtype)
    compare(student, ragged(teacher), divergence, reduction="sum")
    # The last row has no ids: no divergence, and no gradient but that of its cross-entropy.
    loss, gradient = gradient_of(student, ragged(teacher), divergence=divergence)
    assert loss[-1] == 0
    assert (gradient[-1] == 0).all()
    compare(student, ragged(teacher), divergence, torch.arange(6), ce_weight=0.5, reduction="none")


@EACH
def test_of_a_repeated_id_the_first_counts(capability, tail, divergence):
    student, teacher = sparse_pair(4, 5000, k=40, tail=tail)
    for same in (repeated(teacher), ragged(repeated(teacher, 3))):
        compare(student, same, divergence, reduction="sum")
    one, other = (gradient_of(student, t, divergence=divergence) for t in (teacher, repeated(teacher)))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@EACH_TAIL
def test_ids_and_logprobs_of_any_dtype_and_layout(tail):
    student, teacher = sparse_pair(3, 4, 1000, k=16, tail=tail)
    ids, logprobs = teacher.ids, teacher.logprobs
    for dtype in BOUNDS:
        compare(student, teacher._replace(ids=ids.int(), logprobs=logprobs.to(dtype)))
    expected = gradient_of(student, teacher)
    wide = torch.zeros(3, 5, 40, dtype=ids.dtype)
    wide[:, 1:, 7:23] = ids
    layouts = (
        teacher._replace(ids=wide[:, 1:, 7:23]),
        teacher._replace(ids=ids.transpose(0, 1).contiguous().transpose(0, 1)),
        teacher._replace(
            ids=torch.stack([ids, ids], -1)[..., 0], logprobs=torch.stack([logprobs, logprobs], -1)[..., 0]
        ),
    )
    for same in layouts:
        loss, gradient = gradient_of(student, same)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])
    shared = teacher._replace(ids=ids[:1, :1].expand(3, 4, 16), logprobs=logprobs[:1, :1].expand(3, 4, 16))
    compare(student, shared)


@EACH
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
def test_models_that_nearly_agree(tail, divergence, noise):
    compare(*sparse_pair(4, 3000, k=64, tail=tail, noise=noise), divergence, reduction="sum")


@EACH
def test_teacher_is_student(capability, tail, divergence):
    student = logits_pair(3, 3003)[0]
    loss, gradient = gradient_of(student, top_k(student, 50, tail), divergence=divergence)
    if tail in ("renormalize", "bucket"):
        assert loss.abs().max() < 1e-12
        assert gradient.abs().max() < 3e-7  # of the log-probabilities' rounding
    compare(student, top_k(student, 50, tail), divergence, reduction="sum")


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_student_that_gives_the_rest_nearly_nothing(capability, tail, divergence, dtype):
    # 1 - Q_S = 1e-9, which a difference of sums would lose.
    student, teacher = nearly_all(3, 2000, 16)
    compare(student.to(dtype), teacher._replace(tail=tail), divergence, reduction="sum", floor=0.0)


@EACH_TAIL
def test_the_gradient_of_the_rest_keeps_its_digits(capability, tail):
    student, teacher = nearly_all(3, 2000, 16)
    teacher = teacher._replace(tail=tail)
    _, gradient = gradient_of(student, teacher)
    exact = student.double().requires_grad_()
    kd.reference.distillation_loss(exact, in_double(teacher), reduction="sum").backward()
    outside = torch.ones_like(student).scatter(1, teacher.ids, 0)
    assert_near("gradient outside", gradient * outside, exact.grad * outside, 2e-6)


@EACH
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits(capability, tail, divergence, scale):
    generator = torch.Generator().manual_seed(0)
    student = scale * (2 * torch.rand(6, 513, generator=generator) - 1)
    ids = torch.stack([torch.randperm(513, generator=generator)[:9] for _ in range(6)])
    ids[3:, 0] = student[3:].argmax(-1)
    logprobs = 3 * torch.randn(6, 9, generator=generator).log_softmax(-1) - 0.01
    compare(student, kd.TopKTeacher(ids, logprobs, tail), divergence, reduction="sum")


@EACH
@pytest.mark.parametrize("shift", [1000.0, -4096.0])
def test_a_shift_of_all_logits_changes_nothing(tail, divergence, shift):
    student, teacher = sparse_pair(4, 1000, k=32, tail=tail, noise=0.1)
    student = (student * 256).round() / 256  # whole numbers of shift are exact in fp32 here
    compare(student + shift, teacher, divergence, reduction="sum")


@EACH
def test_masked_tokens(capability, tail, divergence):
    student, teacher = sparse_pair(4, 1003, k=16, tail=tail)
    # Outside S: no probability, no gradient.
    masked = torch.ones(4, 1003, dtype=torch.bool).scatter(1, teacher.ids, False)
    masked[:, 500:] = False
    student[masked] = -torch.inf
    compare(student, teacher, divergence, torch.arange(600, 604), ce_weight=0.5)
    _, gradient = gradient_of(student, teacher, divergence=divergence)
    assert (gradient[masked] == 0).all()
    # In S, of no mass in either model.
    student.scatter_(1, teacher.ids[:, 3:5], -torch.inf)
    teacher.logprobs[:, 3:5] = -torch.inf
    compare(student, teacher, divergence)
    # In S, of no mass in the teacher's eyes: reverse KL is infinite there.
    student, teacher = sparse_pair(4, 1003, k=16, tail=tail)
    teacher.logprobs[:, 3:5] = -torch.inf
    if divergence.name == "reverse_kl":
        assert (gradient_of(student, teacher, divergence=divergence)[0] == torch.inf).all()
    else:
        compare(student, teacher, divergence)


@EACH
def test_a_student_that_forbids_what_the_teacher_does_is_infinitely_far(capability, tail, divergence):
    for forbidden in (slice(0, 1), slice(None)):
        student, teacher = sparse_pair(4, 1003, k=16, tail=tail)
        student.scatter_(1, teacher.ids[:, forbidden], -torch.inf)
        loss, gradient = gradient_of(student, teacher, divergence=divergence)
        if divergence.name == "forward_kl" or forbidden == slice(None):
            assert (loss == torch.inf).all()
        else:
            compare(student, teacher, divergence)
        assert torch.isfinite(gradient).all()
        # Nothing of it leaks into the cross-entropy.
        compare(student, teacher, divergence, student.argmax(-1), kd_weight=0.0, ce_weight=1.0)


@EACH
def test_a_student_without_mass_outside_s(capability, tail, divergence):
    student, teacher = sparse_pair(4, 1003, k=16, tail=tail)
    student.masked_fill_(torch.ones(4, 1003, dtype=torch.bool).scatter(1, teacher.ids, False), -torch.inf)
    loss, gradient = gradient_of(student, teacher, divergence=divergence)
    if tail == "bucket":  # the teacher leaves some there
        assert (loss == torch.inf).all()
        assert torch.isfinite(gradient).all()
    else:
        compare(student, teacher, divergence)
    assert (gradient[student == -torch.inf] == 0).all()


@EACH
@pytest.mark.parametrize("student_too", [False, True])
def test_a_teacher_without_mass_in_s(capability, tail, divergence, student_too):
    student, teacher = sparse_pair(4, 1003, k=16, tail=tail)
    teacher = teacher._replace(logprobs=torch.full_like(teacher.logprobs, -torch.inf))
    if student_too:
        student.scatter_(1, teacher.ids, -torch.inf)
    loss, gradient = gradient_of(student, teacher, divergence=divergence)
    if tail == "bucket" and not student_too:
        compare(student, teacher, divergence)
    else:
        assert (loss == 0).all()
        assert (gradient == 0).all()
    compare(student, teacher, divergence, student.argmax(-1), ce_weight=0.5)


@EACH
@pytest.mark.parametrize("k", [1003, 2006])
def test_s_is_the_whole_vocabulary(capability, tail, divergence, k):
    student, other = logits_pair(4, 1003)
    teacher = top_k(other, 1003, tail)
    if k > 1003:
        teacher = repeated(teacher)
    for logprobs in (teacher.logprobs, teacher.logprobs - 0.3):  # which need not add up to 1
        compare(student, teacher._replace(logprobs=logprobs), divergence, student.argmax(-1), ce_weight=0.3)


@EACH
def test_probabilities_that_exceed_1(tail, divergence):
    student, teacher = sparse_pair(4, 1000, k=16, tail=tail)
    teacher = teacher._replace(logprobs=teacher.logprobs - teacher.logprobs.logsumexp(-1, keepdim=True) + 0.1)
    compare(student, teacher, divergence, reduction="sum")


@EACH
def test_nan_stays_in_its_row(capability, tail, divergence):
    labels = torch.tensor([5, 6, 7])
    for value in (torch.nan, torch.inf):
        for at in ("outside", "inside", "everywhere", "teacher", "whole teacher"):
            student, teacher = sparse_pair(3, 3003, k=16, tail=tail)
            outside = int(torch.ones(3003).scatter(0, teacher.ids[1], 0).argmax())
            if at == "outside":
                student[1, outside] = value
            elif at == "inside":
                student[1, teacher.ids[1, 7]] = value
            elif at == "everywhere":
                student[1] = value
            else:
                teacher.logprobs[1, slice(None) if at == "whole teacher" else 7] = value
            leaf = student.clone().requires_grad_()
            loss, stats = kd.distillation_loss(
                leaf, teacher, labels, divergence=divergence, ce_weight=0.5, reduction="none", return_stats=True
            )
            loss.sum().backward()
            assert loss.isnan().tolist() == [False, True, False]
            assert leaf.grad[1].isnan().all()
            assert not leaf.grad[[0, 2]].isnan().any()
            for stat in stats:
                assert stat is None or stat.isnan().tolist() == [False, True, False]


def test_a_student_without_any_mass_is_nan():
    student, teacher = sparse_pair(2, 100, k=5)
    student[0] = -torch.inf
    for tail in TAILS:
        loss, _ = gradient_of(student, teacher._replace(tail=tail))
        assert loss.isnan().tolist() == [tail != "renormalize", False]


@EACH
def test_renormalised_losses_read_the_ids_alone(capability, tail, divergence):
    student, teacher = sparse_pair(4, 3000, k=16, tail=tail)
    outside = torch.ones_like(student, dtype=torch.bool).scatter(1, teacher.ids, False)
    loss, gradient = gradient_of(student, teacher, divergence=divergence)
    if tail != "renormalize":
        assert (gradient[outside] != 0).all()
        return
    assert (gradient[outside] == 0).all()
    assert (gradient_of(student, teacher, divergence=divergence, student_softcap=9.0)[1][outside] == 0).all()
    poisoned = student.masked_fill(outside, torch.nan)
    for options in ({}, {"inplace": True}):
        leaf = poisoned.clone().requires_grad_()
        same = kd.distillation_loss(leaf * 1, teacher, divergence=divergence, reduction="none", **options)
        same.sum().backward()
        assert torch.equal(same, loss)
        assert torch.equal(leaf.grad, gradient)
    # Statistics are of the whole vocabulary; asking for them changes neither.
    leaf = student.clone().requires_grad_()
    with_stats, _ = kd.distillation_loss(leaf, teacher, divergence=divergence, reduction="none", return_stats=True)
    with_stats.sum().backward()
    assert torch.equal(with_stats, loss)
    assert torch.equal(leaf.grad, gradient)


LABELS = torch.tensor([[3, -100, 0, 999], [-100, 5, 5, -100], [17, 2, -100, 1]])
WEIGHT = torch.tensor([[1.0, 2.0, 0.5, 0.0], [1.0, 0.0, 3.0, 1.0], [0.25, 1.0, 1.0, 1.0]])


@EACH
@TWO_DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_weights_and_reductions(tail, divergence, dtype, reduction):
    student, teacher = sparse_pair(3, 4, 1000, k=16, tail=tail, dtype=dtype)
    options = {"reduction": reduction, **temperatures(tail, 2.5)}
    compare(student, teacher, divergence, LABELS, kd_weight=0.7, ce_weight=0.3, **options)
    compare(student, teacher, divergence, LABELS, weight=WEIGHT, **options)


@EACH
@EACH_DTYPE
def test_cross_entropy(capability, tail, divergence, dtype):
    # With a softmax of its own, and with the divergence's; the label within S, and outside.
    student, teacher = sparse_pair(4, 2048, k=16, tail=tail, dtype=dtype)
    labels = torch.tensor([5, 2047, int(teacher.ids[2, 3]), -100])
    for temperature in {1.0, *temperatures(tail, 2.0).values()}:
        for kd_weight in (0.0, 0.7):
            options = {"temperature": temperature, "kd_weight": kd_weight, "ce_weight": 0.5}
            compare(student, teacher, divergence, labels, reduction="sum", **options)


@EACH
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_rows_that_do_not_count_are_not_read(capability, tail, divergence, ce_weight):
    student, teacher = sparse_pair(3, 4, 1000, k=16, tail=tail)
    gone = LABELS == -100
    student[gone] = torch.nan
    teacher.logprobs[gone] = torch.nan
    compare(student, teacher, divergence, LABELS, ce_weight=ce_weight)
    compare(student, teacher, divergence, weight=(~gone).float())
    loss, gradient = gradient_of(student, teacher, torch.full_like(LABELS, -100), divergence=divergence)
    assert (loss == 0).all()
    assert (gradient == 0).all()


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("width", [1000, 1024])
def test_vocab_size(tail, divergence, dtype, width):
    student, _ = logits_pair(5, width, dtype=dtype)
    teacher = top_k(logits_pair(5, 1000, seed=1)[1], 16, tail)
    student[:, 1000:] = torch.nan
    labels = torch.tensor([0, 999, -100, 5, 5])
    compare(student, teacher, divergence, labels, vocab_size=1000, ce_weight=0.5, reduction="sum")
    _, gradient = gradient_of(student, teacher, divergence=divergence, vocab_size=1000)
    assert (gradient[:, 1000:] == 0).all()


@EACH
@EACH_DTYPE
def test_logit_transforms(tail, divergence, dtype):
    student, teacher = sparse_pair(3, 4, 1003, k=16, tail=tail, dtype=dtype)
    for options in ({"student_logit_scale": 0.3}, {"student_logit_scale": 2.0, "student_softcap": 5.0}):
        compare(student, teacher, divergence, reduction="sum", **options)
        compare(student, teacher, divergence, LABELS, ce_weight=0.5, reduction="sum", **options)


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "transposed rows": lambda x: x.transpose(0, 1),
    "narrowed columns": lambda x: x[..., 3:1001],
    "rows backwards in memory": lambda x: x.permute(1, 0, 2)[1:, 1:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@EACH
def test_views_are_read_where_they_lie(view, tail, divergence):
    student, other = (view(x) for x in logits_pair(3, 5, 1003))
    labels = torch.randint(0, 998, student.shape[:-1], generator=torch.Generator().manual_seed(1))
    compare(student, top_k(other, 16, tail), divergence, reduction="sum")
    compare(student, top_k(other, 16, tail), divergence, labels, ce_weight=0.5, reduction="sum")


def test_more_runs_of_rows_than_the_kernels_count():
    cut = (slice(None, 2),) * 5
    student, other = logits_pair(3, 3, 3, 3, 3, 20)
    compare(student[cut], top_k(other[cut], 4))
    base, leaf = student.clone().requires_grad_(), student.clone().requires_grad_()
    kd.distillation_loss((base * 1)[cut], top_k(other[cut], 4), inplace=True).backward()
    kd.distillation_loss(leaf[cut], top_k(other[cut], 4)).backward()
    assert torch.equal(base.grad, leaf.grad)


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("width", [1003, 2048])
def test_inplace_gives_the_same_gradient(tail, divergence, dtype, width):
    student, teacher = sparse_pair(3, 4, width, k=16, tail=tail, dtype=dtype)
    for options in ({}, {"ce_weight": 0.5}, {"ce_weight": 0.5, **temperatures(tail, 2.0)}, {"student_softcap": 9.0}):
        one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
        expected = kd.distillation_loss(one, teacher, LABELS, divergence=divergence, **options)
        actual = kd.distillation_loss(two * 1, teacher, LABELS, divergence=divergence, inplace=True, **options)
        expected.backward()
        actual.backward()
        assert torch.equal(actual, expected)
        assert torch.equal(two.grad, one.grad)


@EACH
@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100)])
def test_no_rows(tail, divergence, shape):
    leaf = torch.empty(shape, requires_grad=True)
    ids = torch.empty(*shape[:-1], 5, dtype=torch.int64)
    teacher = kd.TopKTeacher(ids, torch.empty(ids.shape), tail)
    loss = kd.distillation_loss(leaf * 1, teacher, divergence=divergence)
    loss.backward()
    assert loss == 0
    assert leaf.grad.shape == shape


def test_one_dimension_is_one_row():
    compare(*sparse_pair(1000, k=16), None, torch.tensor(5), ce_weight=0.5, reduction="none")


@EACH_TAIL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_twice_gives_the_same_gradient(tail, dtype, inplace):
    student, teacher = sparse_pair(3, 4, 100, k=16, tail=tail, dtype=dtype)
    leaf = student.requires_grad_()
    loss = 3.0 * kd.distillation_loss(leaf * 1, teacher, LABELS.clamp(max=99), inplace=inplace)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(second, kept)


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("form_gradient", [False, True])
def test_stats(tail, divergence, dtype, form_gradient):
    student, teacher = sparse_pair(3, 4, 1000, k=16, tail=tail, dtype=dtype, noise=0.3)
    student[0, 0, teacher.ids[0, 0]] = student[0, 0].max()  # where another token has the same largest logit
    options = {"divergence": divergence, "ce_weight": 0.5, "kd_weight": 3.0, **temperatures(tail, 2.0)}
    labels = LABELS.clone()
    labels[-1, -1] = -100  # all padding: see below
    for same in (teacher, ragged(teacher)):
        stats = check_stats(student.clone().requires_grad_(form_gradient), same, labels, **options)
        for stat in stats:
            assert stat is None or (stat[labels == -100] == 0).all()
    assert stats.top1_agreement.unique().tolist() == [0, 1]
    assert check_stats(student, teacher, divergence=divergence).cross_entropy is None


@EACH
def test_stats_of_a_row_without_ids(tail, divergence):
    student, teacher = sparse_pair(2, 1000, k=5, tail=tail)
    teacher.ids[1] = -1
    _, stats = kd.distillation_loss(student, teacher, divergence=divergence, return_stats=True)
    assert_near("student_lse", stats.student_lse, student.double().logsumexp(-1), 1e-6)
    assert stats.teacher_lse[1] == -torch.inf
    for stat in (stats.divergence, *stats[7:]):
        assert stat[1] == 0


def test_the_first_of_equal_ids_is_the_teachers_choice():
    student = torch.arange(6.0).repeat(2, 1)
    ids, logprobs = torch.tensor([[5, 0, 3], [0, 5, 3]]), torch.tensor([[-1.0, -1.0, -2.0]] * 2)
    stats = check_stats(student, kd.TopKTeacher(ids, logprobs))
    assert stats.top1_agreement.tolist() == [1, 0]


@EACH_DTYPE
def test_all_ids_are_forward_kl(capability, dtype):
    student, other = logits_pair(4, 1003, dtype=dtype)
    loss, gradient = gradient_of(student, top_k(other, 1003, dtype=torch.float64))
    exact = student.double().requires_grad_()
    expected = kd.reference.distillation_loss(exact, other.double(), reduction="none")
    expected.sum().backward()
    loss_bound, gradient_bound = BOUNDS[dtype]
    assert_near("loss", loss, expected, loss_bound)
    near = assert_rounded if dtype in (torch.bfloat16, torch.float16) else assert_near
    near("gradient", gradient, exact.grad, gradient_bound)


@pytest.mark.parametrize("k", [1, 16, 900])
def test_a_bucket_is_decoupled_without_its_weak_term(capability, k):
    student, other = logits_pair(4, 1003)
    teacher = top_k(other, k, dtype=torch.float64)
    divergence = kd.Decoupled(kd.TopK(k), wcd=0.0)
    one = gradient_of(student, teacher)
    two = gradient_of(student, other, divergence=divergence)
    assert_near("loss", one[0], two[0], 1e-6)
    assert_near("gradient", one[1], two[1], 1e-6)
    _, sparse = kd.distillation_loss(student, teacher, return_stats=True)
    _, dense = kd.distillation_loss(student, other, divergence=divergence, return_stats=True)
    for name in ("student_lse", "divergence", "strong_mass_teacher", "strong_mass_student"):
        assert_near(name, getattr(sparse, name), getattr(dense, name), 1e-6)


@EACH
def test_repeated_runs_agree_bitwise(tail, divergence):
    student, teacher = sparse_pair(16, 4099, k=64, tail=tail)
    labels = torch.arange(16)
    results = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        results.append(gradient_of(student, teacher, labels, divergence=divergence, ce_weight=0.5))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_large_gradients_are_the_same_past_the_caches(capability):
    # As many rows as make a gradient of 16 MiB, which is written another way than a small one.
    student, teacher = sparse_pair(65, 65536, k=8)
    few = gradient_of(student[:3], kd.TopKTeacher(teacher.ids[:3], teacher.logprobs[:3]))
    many = gradient_of(student, teacher)
    assert torch.equal(many[0][:3], few[0])
    assert torch.equal(many[1][:3], few[1])


# The operator's arguments after the tensors: what the public function derives from its own.
def operator_options(width, *, tail="bucket", divergence="forward_kl", ce_weight=0.0, whole=True, form_gradient=True):
    return (
        "native", divergence, [], "", 0.0, 1.0, 0.7, ce_weight, True, width, 1.0, 0.0, 1.0, 0.0, tail, whole,
        form_gradient, False,
    )  # fmt: skip


@EACH_TAIL
def test_an_id_out_of_range_makes_its_row_nan(capability, tail):
    # The public function refuses it on the CPU; the kernel does not read beyond the row.
    student, teacher = sparse_pair(3, 100, k=5, tail=tail)
    teacher.ids[1, 2], teacher.ids[2, 0] = 100, 2**40
    tensors = (student, teacher.logprobs, None, torch.ones(3), None, None, teacher.ids)
    loss, stats, gradient = ops.row_loss(*tensors, *operator_options(100, tail=tail))
    assert loss.isnan().tolist() == [False, True, True]
    assert stats[:, 1:].isnan().all()
    assert gradient[1:].isnan().all()
    assert not gradient[0].isnan().any()


@pytest.mark.parametrize(("tail", "form_gradient"), [("bucket", True), ("renormalize", False)])
def test_opcheck_row_loss(tail, form_gradient):
    student, teacher = sparse_pair(2, 5, 100, k=7, tail=tail)
    labels = torch.tensor([0, 5, 99, 3, 2]).expand(2, 5)
    student.requires_grad_(form_gradient)
    tensors = (student, teacher.logprobs, labels, torch.rand(2, 5), None, None, ragged(teacher).ids)
    options = operator_options(100, tail=tail, ce_weight=0.5, form_gradient=form_gradient)
    torch.library.opcheck(ops.row_loss, (*tensors, *options))


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_compile_fullgraph(tail):
    torch._dynamo.reset()
    student, teacher = sparse_pair(5, 100, k=7, tail=tail)

    def step(z, ids, logprobs):
        loss, stats = kd.distillation_loss(z, kd.TopKTeacher(ids, logprobs, tail), return_stats=True)
        return loss, stats.strong_mass_student

    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    actual = torch.compile(step, fullgraph=True)(one, *teacher[:2])
    expected = step(two, *teacher[:2])
    assert_near("mass", actual[1], expected[1], 1e-6)
    actual[0].backward()
    expected[0].backward()
    assert_near("gradient", one.grad, two.grad, 1e-6)


@EACH
@pytest.mark.parametrize("loss", [kd.distillation_loss, kd.reference.distillation_loss], ids=["fused", "reference"])
def test_gradcheck(loss, tail, divergence):
    student, teacher = sparse_pair(4, 9, k=4, tail=tail, dtype=torch.float64)
    teacher = ragged(in_double(teacher))
    labels = torch.tensor([0, -100, 6, 3])

    def row_losses(z):
        return loss(
            z, teacher, labels, divergence=divergence, ce_weight=0.3, student_softcap=4.0, reduction="none",
            **temperatures(tail, 1.7),
        )  # fmt: skip

    assert torch.autograd.gradcheck(row_losses, (student.requires_grad_(),))


@EACH_TAIL
def test_a_wrong_gradient_of_these_losses_fails(tail):
    options = temperatures(tail, 2.0)
    student, teacher = sparse_pair(4, 1000, k=16, tail=tail)
    _, gradient = gradient_of(student, teacher, **options)
    others = [gradient_of(student, teacher._replace(tail=other))[1] for other in TAILS if other != tail]
    for wrong in (torch.zeros_like(gradient), 2 * gradient, *others):
        with pytest.raises(AssertionError):
            assert_near("gradient", wrong, gradient, 2e-6, FLOOR)


CALLS = settings(max_examples=int(os.environ.get("KDKERNELS_EXAMPLES", "60")), deadline=None)


@st.composite
def calls(draw):
    rows, width = draw(st.integers(1, 5)), draw(st.integers(2, 80))
    k = draw(st.integers(1, 2 * width))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.01, 1.0, 5.0]))
    student = spread * torch.randn(rows, width, generator=generator)
    size = draw(st.one_of(st.none(), st.integers(1, width)))
    ids = torch.randint(-2, size or width, (rows, k), generator=generator)
    logprobs = (spread * torch.randn(rows, k, generator=generator)).log_softmax(-1) + draw(st.floats(-3.0, 0.0))
    labels = torch.randint(0, size or width, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    tail, divergence = draw(st.sampled_from(list(LOSSES.values())))
    temperature = draw(st.sampled_from([0.5, 1.0, 3.0]))
    teacher = kd.TopKTeacher(ids, logprobs, tail, draw(st.sampled_from([1.0, temperature])))
    options = {
        "divergence": divergence,
        "temperature": temperature if tail in ("renormalize", "teacher") else teacher.teacher_temperature,
        "kd_weight": draw(st.floats(0.1, 2.0)),
        "ce_weight": draw(st.sampled_from([0.0, 0.5])),
        "scale_by_temperature": draw(st.booleans()),
        "weight": torch.rand(rows, generator=generator) if draw(st.booleans()) else None,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "vocab_size": size,
        "student_softcap": draw(st.sampled_from([None, 30.0])),
    }
    return student, teacher, labels, options


# Not in fp64: where the models nearly agree the reference cancels, and is no more exact than the kernels.
@CALLS
@given(calls(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_call_agrees_with_the_reference(call, dtype):
    student, teacher, labels, options = call
    compare(student.to(dtype), teacher, options.pop("divergence"), labels, **options)


@CALLS
@given(calls())
def test_the_order_of_the_ids_does_not_matter(call):
    student, teacher, labels, options = call
    order = torch.randperm(teacher.ids.shape[1], generator=torch.Generator().manual_seed(0))
    distinct = teacher._replace(ids=torch.where(first_occurrences(teacher.ids, student.shape[1]), teacher.ids, -1))
    moved = distinct._replace(ids=distinct.ids[:, order], logprobs=distinct.logprobs[:, order])
    one, other = (kd.distillation_loss(student, t, labels, **options) for t in (teacher, moved))
    assert_near("loss", other, one, 2 * BOUNDS[torch.float32][0], FLOOR)


def test_every_field_of_the_statistics_is_compared():
    student, teacher = sparse_pair(3, 100, k=5)
    stats = check_stats(student, teacher, torch.arange(3), ce_weight=0.5)
    assert [name for name, stat in zip(stats._fields, stats, strict=True) if stat is None] == ["bcd", "scd", "wcd"]
