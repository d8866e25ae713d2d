"""Sparse teachers in the Triton kernels against the reference in fp64, under the interpreter."""

import pytest
import torch
from checks import BOUNDS, assert_near, assert_rounded, gradient_of, in_double, logits_pair
from interpreter import interpreted
from sparse_cases import LOSSES, TAILS, check, check_stats, nearly_all, ragged, repeated, sparse_pair, top_k

import kdkernels as kd
from kdkernels import backends, reference
from kdkernels.backends import triton
from kdkernels.backends.native import RowOptions

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(triton.why_not(CPU) is not None, reason=str(triton.why_not(CPU)))

EACH = pytest.mark.parametrize(("tail", "divergence"), LOSSES.values(), ids=LOSSES)
# One of each way through the kernel: with and without W, and the sums that a slope's own sum takes.
FEW = {name: LOSSES[name] for name in ("bucket", "renormalize_jsd", "teacher")}
A_FEW = pytest.mark.parametrize(("tail", "divergence"), FEW.values(), ids=FEW)
EACH_TAIL = pytest.mark.parametrize("tail", TAILS)


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with interpreted(monkeypatch):
        yield


def sweep(
    student, teacher, gradient=None, *, divergence="forward_kl", parameters=(), labels=None, scale=None, **options
):
    """Loss and statistics straight from the kernel."""
    options = {
        "temperature": 1.0,
        "kd_weight": 1.0,
        "ce_weight": 0.0,
        "vocab_size": student.shape[-1],
        "scale_gradient": True,
        "whole": True,
        **options,
    }
    options = RowOptions(
        divergence=divergence,
        parameters=parameters,
        scale_by_temperature=True,
        student_logit_scale=1.0,
        student_softcap=0.0,
        teacher_logit_scale=teacher.teacher_temperature,
        teacher_softcap=0.0,
        tail=teacher.tail,
        **options,
    )
    rows = student.shape[:-1]
    loss, stats = torch.full(rows, 7.0), torch.full((7, *rows), 7.0)
    scale = torch.ones(rows) if scale is None else scale
    backends.row_loss(
        "triton", student, teacher.logprobs, labels, scale, None, None, teacher.ids, options, gradient, loss, stats
    )
    return loss, stats


# --- Every loss ---


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_loss(tail, divergence, dtype):
    student, teacher = sparse_pair(1, 700, k=20, tail=tail, dtype=dtype)
    check(student, teacher, divergence, reduction="sum")
    check_stats(student, teacher, divergence=divergence)


# 1 and 7: less than a lane's columns; 1024: whole blocks; 1301: neither; as many ids as columns, and more than lanes.
@A_FEW
@pytest.mark.parametrize(
    ("width", "k", "dtype"),
    [(1, 1, torch.float32), (7, 3, torch.bfloat16), (1024, 64, torch.float16), (1301, 1000, torch.bfloat16)],
    ids=str,
)
def test_widths(tail, divergence, width, k, dtype):
    student, teacher = sparse_pair(1, width, k=k, tail=tail, dtype=dtype)
    check(student, teacher, divergence, reduction="sum")


@EACH_TAIL
def test_the_whole_vocabulary_is_given(tail):
    student, dense = logits_pair(1, 300)
    teacher = top_k(dense, 300, tail)
    check(student, teacher)
    loss, gradient = gradient_of(student, teacher)
    expected, expected_gradient = gradient_of(student, dense)
    assert_near("loss", loss, expected, 2e-6)
    assert_near("gradient", gradient, expected_gradient, 2e-6)


def test_a_bucket_is_the_dense_loss_without_its_tails_own():
    student, dense = logits_pair(1, 300)
    loss, gradient = gradient_of(student, top_k(dense, 30))
    expected, expected_gradient = gradient_of(student, dense, divergence=kd.Decoupled(kd.TopK(30), wcd=0.0))
    assert_near("loss", loss, expected, 2e-6)
    assert_near("gradient", gradient, expected_gradient, 4e-6)


@pytest.mark.parametrize("name", ["renormalize", "renormalize_reverse", "renormalize_jsd"])
@pytest.mark.parametrize("noise", [1e-3, 0.05])
def test_models_that_nearly_agree_inside(name, noise):
    tail, divergence = LOSSES[name]
    student, teacher = sparse_pair(1, 300, k=20, tail=tail, noise=noise)
    check(student, teacher, divergence, floor=0.0, slack=2)


def test_a_teacher_that_is_the_student():
    student = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    teacher = kd.TopKTeacher(torch.arange(40).expand(1, 40), student[:, :40], "renormalize")
    loss, gradient = gradient_of(student, teacher)
    assert abs(float(loss)) < 1e-12
    assert float(gradient.abs().max()) < 1e-8
    for tail in TAILS:
        check(student, top_k(student, 40, tail))


@pytest.mark.parametrize(("temperature", "of_teacher"), [(0.3, 1.0), (5.0, 2.0), (torch.tensor([0.5, 7.0]), 0.7)])
@pytest.mark.parametrize("name", ["renormalize_jsd", "teacher"])
def test_temperatures(name, temperature, of_teacher):
    tail, divergence = LOSSES[name]
    student, teacher = sparse_pair(2, 300, k=20, tail=tail, dtype=torch.bfloat16)
    teacher = teacher._replace(teacher_temperature=of_teacher)
    labels = torch.tensor([int(teacher.ids[0, 3]), 7])
    weight = torch.tensor([2.0, 0.5])
    check(student, teacher, divergence, labels, temperature=temperature, kd_weight=0.7, ce_weight=0.3, weight=weight)


@pytest.mark.parametrize("tail", ["bucket", "drop"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_labels_and_a_teachers_own_temperature(tail, temperature):
    student, teacher = sparse_pair(2, 300, k=20, tail=tail)
    teacher = teacher._replace(teacher_temperature=temperature)
    labels = torch.tensor([int(teacher.ids[0, 3]), 7])
    options = {"temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.3, "scale_by_temperature": False}
    check(student, teacher, None, labels, **options)
    check_stats(student, teacher, labels, **options)


# --- Which ids ---


@A_FEW
def test_rows_of_unequal_length_and_repeated_ids(tail, divergence):
    student, teacher = sparse_pair(2, 300, k=20, tail=tail)
    labels = torch.tensor([3, 7])
    for given in (ragged(teacher), repeated(teacher, 3), repeated(ragged(teacher))):
        check(student, given, divergence, labels, ce_weight=0.5)


@EACH_TAIL
def test_ids_that_repeat_alone(tail):
    student, teacher = sparse_pair(1, 300, k=20, tail=tail)
    same = teacher._replace(ids=teacher.ids[:, :1].expand(1, 20))
    check(student, same)
    first = teacher._replace(ids=teacher.ids[:, :1], logprobs=teacher.logprobs[:, :1])
    assert torch.equal(gradient_of(student, same)[1], gradient_of(student, first)[1])


@EACH_TAIL
def test_an_id_out_of_range_is_nan_in_its_row(tail):
    # Ids on the CPU are checked before they come here; a GPU's are not.
    student, teacher = sparse_pair(5, 300, k=20, tail=tail)
    ids = teacher.ids.clone()
    ids[1, 4], ids[3, 19] = 300, 2**40
    gradient = torch.full_like(student, 7.0)
    loss, stats = sweep(student, teacher._replace(ids=ids), gradient)
    wrong = [False, True, False, True, False]
    assert loss.isnan().tolist() == wrong
    assert stats.isnan().all(0).tolist() == wrong
    assert gradient.isnan().all(-1).tolist() == wrong
    good = torch.full_like(student, 7.0)
    expected, _ = sweep(student, teacher, good)
    assert torch.equal(loss[::2], expected[::2])  # a row leaves no marks for the next
    assert torch.equal(gradient[::2], good[::2])


def test_int32_ids_and_log_probabilities_of_every_dtype_and_layout():
    student, teacher = sparse_pair(1, 2, 300, k=20)
    for dtype in (torch.bfloat16, torch.float16):
        check(student, teacher._replace(ids=teacher.ids.int(), logprobs=teacher.logprobs.to(dtype)))
    check(student, teacher._replace(ids=teacher.ids[..., ::2], logprobs=teacher.logprobs[..., ::2]))
    check(student[:, :1].expand(1, 2, 300), teacher, reduction="sum")


# --- What lies outside ---


@pytest.mark.parametrize("gap", [20.7, 60.0, 1000.0])
def test_next_to_nothing_outside_keeps_its_digits(gap):
    student, teacher = nearly_all(1, 600, 20, gap)
    check(student, teacher)
    # What the tail "teacher" gives to the columns outside is the student's own probability.
    leaf = student.double().requires_grad_()
    reference.distillation_loss(leaf, in_double(teacher._replace(tail="teacher")), reduction="sum").backward()
    _, gradient = gradient_of(student, teacher._replace(tail="teacher"), reduction="sum")
    outside = torch.ones_like(student, dtype=torch.bool).scatter_(1, teacher.ids, False)
    # In fp32 there is no e^-1000.
    assert_near("outside", gradient[outside], leaf.grad[outside], 4e-6, floor=1e-30)


@pytest.mark.parametrize("rest", [1e-3, 1e-5, 1e-9, -1e-3])
def test_a_teacher_that_leaves_next_to_nothing_outside(rest):
    """And one that leaves less than nothing, as rounded log-probabilities do."""
    student, teacher = nearly_all(1, 300, 20, 14.0)
    logprobs = teacher.logprobs.double().log_softmax(-1) + torch.tensor(rest).neg().log1p()
    teacher = teacher._replace(logprobs=logprobs.float())
    check(student, teacher)
    leaf = student.double().requires_grad_()
    reference.distillation_loss(leaf, in_double(teacher)).backward()
    outside = torch.ones_like(student, dtype=torch.bool).scatter_(1, teacher.ids, False)
    assert_near("outside", gradient_of(student, teacher)[1][outside], leaf.grad[outside], 1e-5)


def test_a_small_loss_outside_keeps_its_digits():
    """Where the models agree inside S, a student renormalised over the whole vocabulary has -log Q_S left."""
    student, teacher = nearly_all(1, 300, 20, 14.0)
    check(student, teacher._replace(logprobs=student.gather(1, teacher.ids), tail="teacher"), floor=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_outside_far_above_the_rest(dtype):
    # Beyond the range of the first reference: the row is swept again.
    student, teacher = sparse_pair(2, 700, k=20, dtype=dtype)
    student[0, 601], student[1, 601] = 60.0, 400.0
    labels = torch.tensor([601, 5])
    for tail in ("bucket", "teacher"):
        for temperature in (1.0, 2.0):
            here = teacher._replace(tail=tail, teacher_temperature=temperature)
            check(student, here, None, labels, temperature=temperature, ce_weight=0.3)


@EACH
def test_extreme_logits(tail, divergence):
    generator = torch.Generator().manual_seed(0)
    student = 1e4 * (2 * torch.rand(2, 300, generator=generator) - 1)
    ids = torch.stack([torch.randperm(300, generator=generator)[:20] for _ in range(2)])
    logprobs = torch.randn(2, 20, generator=generator).log_softmax(-1)
    logprobs[1] = student[1].log_softmax(-1).gather(-1, ids[1])
    if tail in ("bucket", "drop"):
        logprobs[1] = logprobs[0]
    check(student, kd.TopKTeacher(ids, logprobs, tail), divergence)


# --- What is no number, and what does not count ---


@A_FEW
def test_tokens_without_probability(tail, divergence):
    student, teacher = sparse_pair(1, 300, k=20, tail=tail, dtype=torch.bfloat16)
    some = teacher.ids[:, :5]
    both = teacher._replace(logprobs=teacher.logprobs.index_fill(1, torch.arange(5), -torch.inf))
    check(student, both, divergence)
    check(student.scatter(1, some, -torch.inf), both, divergence)
    outside = torch.ones(1, 300, dtype=torch.bool).scatter_(1, teacher.ids, False)
    outside[:, 200:] = False
    check(student.masked_fill(outside, -torch.inf), teacher, divergence)


@EACH_TAIL
def test_a_set_without_the_teachers_mass(tail):
    student, teacher = sparse_pair(1, 300, k=20, tail=tail)
    nothing = teacher._replace(logprobs=torch.full_like(teacher.logprobs, -torch.inf))
    check(student, nothing)
    check(student, nothing._replace(ids=torch.full_like(teacher.ids, -1)))
    check(student.scatter(1, teacher.ids, -torch.inf), nothing)


@EACH_TAIL
def test_a_student_that_forbids_what_the_teacher_does_is_infinitely_far(tail):
    student, teacher = sparse_pair(1, 300, k=20, tail=tail)
    outside = torch.ones(1, 300, dtype=torch.bool).scatter_(1, teacher.ids, False)
    one, every = student.scatter(1, teacher.ids[:, :1], -torch.inf), student.scatter(1, teacher.ids, -torch.inf)
    inside_alone = student.masked_fill(outside, -torch.inf)
    infinite = [one, every, inside_alone] if tail == "bucket" else [one, every]
    for forbidden in infinite:
        loss, gradient = gradient_of(forbidden, teacher)
        assert loss.item() == torch.inf
        assert torch.isfinite(gradient).all()
    if tail != "bucket":
        check(inside_alone, teacher)
    # With q̃ = 0 the formulas say: in S -p̃ times the share, outside what S has to gain.
    _, gradient = gradient_of(every, teacher, reduction="sum")
    p = teacher.logprobs.double().softmax(-1)
    share = float(teacher.logprobs.double().exp().sum()) if tail in ("bucket", "drop") else 1.0
    assert_near("inside", gradient.gather(1, teacher.ids), -share * p, 2e-6)
    q = every.double().softmax(-1)[outside]
    assert_near("outside", gradient[outside], (tail != "renormalize") * share * q, 2e-6)


@A_FEW
def test_nan_stays_in_its_row(tail, divergence):
    for inside in (True, False):
        student, teacher = sparse_pair(3, 300, k=20, tail=tail, dtype=torch.bfloat16)
        outside = torch.ones(300, dtype=torch.bool).scatter_(0, teacher.ids[1], False).nonzero()[0]
        student[1, teacher.ids[1, 4] if inside else outside] = torch.nan
        options = {"divergence": divergence, "reduction": "none", "ce_weight": 0.5}
        loss, gradient = gradient_of(student, teacher, torch.tensor([3, 299, 7]), **options)
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient.isnan().any(-1).tolist() == [False, True, False]
        assert gradient[1].isnan().all()


@A_FEW
def test_rows_that_do_not_count_are_not_read(tail, divergence):
    student, teacher = sparse_pair(3, 300, k=20, tail=tail)
    student[1], teacher.logprobs[1] = torch.nan, torch.inf
    gradient = torch.full_like(student, 7.0)
    ids = teacher.ids.clone()
    ids[1] = 2**40
    scale = torch.tensor([1.0, 0.0, -0.5])
    name, parameters = divergence.name, divergence.parameters()
    loss, stats = sweep(
        student, teacher._replace(ids=ids), gradient, divergence=name, parameters=parameters, scale=scale
    )
    assert loss[1] == 0
    assert (stats[:, 1] == 0).all()
    assert (gradient[1] == 0).all()
    assert torch.isfinite(gradient).all()
    student[1] = 0.0
    check(student, teacher, divergence, weight=torch.tensor([1.0, 0.0, 3.0]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropy_alone(temperature):
    student, teacher = sparse_pair(2, 300, k=20)
    student[:, teacher.ids[0, 3]] = -torch.inf  # an infinite divergence of which nothing comes through
    labels = torch.tensor([int(teacher.ids[0, 5]), 99])
    for tail in TAILS:
        here = teacher._replace(tail=tail, teacher_temperature=temperature)
        check(student, here, None, labels, kd_weight=0.0, ce_weight=1.0, temperature=temperature)


# --- The other arguments ---


@pytest.mark.parametrize(("tail", "divergence"), [LOSSES["renormalize"], LOSSES["renormalize_jsd"]])
def test_the_columns_of_the_ids_alone(tail, divergence):
    """Without cross-entropy and statistics, a loss inside S reads nothing else."""
    student, teacher = sparse_pair(2, 300, k=20, tail=tail, dtype=torch.bfloat16)
    labels = torch.tensor([3, 7])
    loss, gradient = gradient_of(student, teacher, divergence=divergence, reduction="none")
    leaf = student.clone().requires_grad_()
    whole, _ = kd.distillation_loss(leaf, teacher, divergence=divergence, reduction="none", return_stats=True)
    whole.sum().backward()
    assert torch.equal(loss, whole)
    assert torch.equal(gradient, leaf.grad)
    outside = torch.ones(2, 300, dtype=torch.bool).scatter_(1, teacher.ids, False)
    spoilt, spoilt_gradient = gradient_of(
        student.masked_fill(outside, torch.nan), teacher, divergence=divergence, reduction="none"
    )
    assert torch.equal(spoilt, loss)
    assert torch.equal(spoilt_gradient, gradient)
    check(student, teacher, divergence, labels, ce_weight=0.5, reduction="sum")


def test_statistics():
    student, teacher = sparse_pair(4, 300, k=20, dtype=torch.bfloat16)
    best = teacher.ids.gather(1, teacher.logprobs.argmax(-1, keepdim=True))
    student[0].scatter_(0, best[0], 30.0)
    outside = int(torch.ones(300, dtype=torch.bool).scatter_(0, teacher.ids[1], False).nonzero()[0])
    student[1, outside] = 30.0
    student[2].scatter_(0, teacher.ids[2], 30.0)  # equals are no less likely
    labels = torch.tensor([3, 299, 7, 8])
    for tail in TAILS:
        stats = check_stats(student, teacher._replace(tail=tail), labels, ce_weight=0.5)
        assert stats.top1_agreement[:3].tolist() == [1, 0, 1]
    doubled = repeated(teacher._replace(tail="teacher"))
    check_stats(student, doubled, temperature=torch.tensor([0.5, 1.0, 2.0, 3.0]))


@EACH_TAIL
def test_transforms_of_the_students_logits(tail):
    student, teacher = sparse_pair(1, 300, k=20, tail=tail, dtype=torch.bfloat16)
    labels = teacher.ids[:, 3]
    options = {"student_logit_scale": 2.0, "student_softcap": 5.0, "ce_weight": 0.5}
    check(student, teacher, None, labels, reduction="sum", **options)
    check(student, teacher, None, labels, reduction="sum", student_logit_scale=0.3)


@A_FEW
def test_padding_and_rows_of_any_alignment(tail, divergence):
    student, teacher = sparse_pair(1, 2, 600, k=20, tail=tail, dtype=torch.bfloat16)
    wide = torch.full((1, 2, 611), torch.nan, dtype=torch.bfloat16)  # padding may hold anything at all
    wide[..., :600] = student
    labels = torch.tensor([[599, int(teacher.ids[0, 1, 2])]])
    check(wide, teacher, divergence, labels, vocab_size=600, ce_weight=0.5, reduction="sum")
    assert (gradient_of(wide, teacher, divergence=divergence, vocab_size=600)[1][..., 600:] == 0).all()
    one = teacher._replace(ids=teacher.ids[:, 1:], logprobs=teacher.logprobs[:, 1:])
    check(wide[:, 1:, :600], one, divergence, labels[:, 1:])
    shifted = torch.full((1, 2, 611), torch.nan, dtype=torch.bfloat16)[..., 3:603].copy_(student)
    check(shifted, teacher, divergence, labels, ce_weight=0.5)


@A_FEW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inplace(tail, divergence, dtype):
    student, teacher = sparse_pair(2, 300, k=20, tail=tail, dtype=dtype)
    labels = teacher.ids[:, 3].contiguous()
    options = {"divergence": divergence, "ce_weight": 0.5, "student_softcap": 9.0}
    expected, expected_gradient = gradient_of(student, teacher, labels, **options)
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf * 1, teacher, labels, inplace=True, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(leaf.grad, expected_gradient)


@EACH_TAIL
def test_without_a_gradient(tail):
    student, teacher = sparse_pair(2, 300, k=20, tail=tail)
    loss = kd.distillation_loss(student, teacher)
    assert torch.equal(loss, gradient_of(student, teacher)[0])


@EACH_TAIL
def test_a_16_bit_gradient_of_fp32_logits(tail):
    student, teacher = sparse_pair(2, 300, k=20, tail=tail)
    labels = torch.tensor([3, 7])
    wide, narrow = torch.full_like(student, 7.0), torch.full_like(student, 7.0, dtype=torch.bfloat16)
    options = {"labels": labels, "ce_weight": 0.5}
    losses = [sweep(student, teacher, gradient, **options) for gradient in (wide, narrow)]
    assert torch.equal(narrow, wide.bfloat16())
    assert torch.equal(losses[0][0], losses[1][0])
    exact = student.double().requires_grad_()
    reference.distillation_loss(exact, in_double(teacher), labels, ce_weight=0.5, reduction="sum").backward()
    assert_rounded("gradient", narrow, exact.grad, BOUNDS[torch.bfloat16][1])


def test_a_gradient_of_its_own_scale():
    student, teacher = sparse_pair(2, 300, k=20)
    labels, scale = torch.tensor([3, 7]), torch.tensor([0.25, -2.0])
    gradients = [torch.full_like(student, 7.0) for _ in range(2)]
    for gradient, scale_gradient in zip(gradients, (True, False), strict=True):
        sweep(student, teacher, gradient, labels=labels, scale=scale, ce_weight=0.5, scale_gradient=scale_gradient)
    torch.testing.assert_close(gradients[0], gradients[1] * scale[:, None], rtol=0, atol=0)


def test_more_dimensions_than_a_kernel_counts():
    shape, cut = (3, 3, 3, 3, 3, 20), (slice(None, 2),) * 5
    student = torch.randn(shape, generator=torch.Generator().manual_seed(0))[cut]
    teacher = top_k(torch.randn(shape, generator=torch.Generator().manual_seed(1))[cut], 4)
    weight = torch.zeros(32)
    weight[[0, 5, 30]] = 1.0
    check(student, teacher, weight=weight.view(student.shape[:-1]))


def test_no_rows():
    student, teacher = sparse_pair(2, 300, k=20)
    none = teacher._replace(ids=teacher.ids[:0], logprobs=teacher.logprobs[:0])
    loss, gradient = gradient_of(student[:0], none)
    assert loss.item() == 0
    assert gradient.shape == (0, 300)


def test_what_it_does_not_serve():
    student, teacher = sparse_pair(2, 300, k=20)
    with pytest.raises(RuntimeError, match=r"compute in fp32, but teacher\.logprobs is float64"):
        kd.distillation_loss(student, in_double(teacher))
    with pytest.raises(RuntimeError, match="the gradient of float32 logits is float64"):
        sweep(student, teacher, torch.empty(2, 300, dtype=torch.float64))


def test_the_least_mass_is_the_references():
    from kdkernels.backends import _triton_sparse

    assert _triton_sparse.LEAST_MASS.value == reference.LEAST_MASS
