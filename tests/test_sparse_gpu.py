"""Sparse teachers on a GPU: both backends against the reference in fp64, and what only a GPU can get wrong."""

from __future__ import annotations

import pytest
import sparse_cases
import torch
from checks import BOUNDS, assert_near, assert_rounded, gradient_of, in_double, logits_pair
from gpu_tools import captured, synchronisations
from sparse_cases import LOSSES, TAILS, check_stats, nearly_all, on, ragged, repeated, sparse_pair, top_k
from torch import Tensor

import kdkernels as kd
from kdkernels import backends, reference
from kdkernels.backends.native import RowOptions

pytestmark = pytest.mark.gpu

EACH = pytest.mark.parametrize(("tail", "divergence"), LOSSES.values(), ids=LOSSES)
# One of each way through the kernels: with and without W, and the sums that a slope's own sum takes.
FEW = {name: LOSSES[name] for name in ("bucket", "renormalize_jsd", "teacher")}
A_FEW = pytest.mark.parametrize(("tail", "divergence"), FEW.values(), ids=FEW)
EACH_TAIL = pytest.mark.parametrize("tail", TAILS)
TWO_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def check(
    student: Tensor,
    teacher: kd.TopKTeacher,
    divergence: kd.Divergence | None = None,
    labels: Tensor | None = None,
    **options,
) -> None:
    try:
        sparse_cases.check(student, teacher, divergence, labels, device="cuda", **options)
    except RuntimeError as error:
        if "within 16 bytes" not in str(error):
            raise
        pytest.skip("the CUDA kernels leave these rows to Triton")


def outside(teacher: kd.TopKTeacher, width: int) -> Tensor:
    """Which columns (..., width) no id names."""
    return torch.ones(*teacher.ids.shape[:-1], width, dtype=torch.bool).scatter_(-1, teacher.ids, False)


# --- Every loss ---


# Every kernel takes Triton seconds to compile: no more of them here than tell something.
@EACH
@pytest.mark.parametrize(
    ("dtype", "ce_weight"), [(torch.float32, 0.0), (torch.bfloat16, 0.3), (torch.float16, 0.0)], ids=str
)
def test_every_loss(backend, tail, divergence, dtype, ce_weight):
    for noise in (0.5, 0.01):
        student, teacher = sparse_pair(5, 1008, k=64, tail=tail, dtype=dtype, noise=noise)
        labels = torch.tensor([3, int(teacher.ids[1, 5]), 1007, 0, int(teacher.ids[4, 0])])
        check(student, teacher, divergence, labels, ce_weight=ce_weight, reduction="sum")


@A_FEW
@TWO_DTYPES
@pytest.mark.parametrize("width", [1, 7, 1000, 1008, 32000, 50257, 128256, 151936, 262144])
def test_widths(backend, tail, divergence, dtype, width):
    if dtype == torch.float32 and tail != "bucket":
        pytest.skip("the widths of fp32 are tested with one loss")
    student, teacher = sparse_pair(5 if width <= 1008 else 2, width, k=min(width, 64), tail=tail, dtype=dtype)
    check(student, teacher, divergence, reduction="sum")


@pytest.mark.parametrize("name", ["bucket", "renormalize_jsd"])
@pytest.mark.parametrize("k", [1, 64, 1000, 4096])
@pytest.mark.parametrize("width", [5008, 128256])
def test_numbers_of_ids(backend, name, k, width):
    tail, divergence = LOSSES[name]
    student, teacher = sparse_pair(3, width, k=k, tail=tail, dtype=torch.bfloat16)
    check(student, teacher, divergence, reduction="sum")
    check(student, ragged(repeated(teacher, 2) if k < 4096 else teacher), divergence, reduction="sum")


@pytest.mark.parametrize("width", [1001, 1002, 1003, 1004, 1005, 1006, 1007])
def test_rows_at_every_offset_from_a_boundary(backend, width):
    student, teacher = sparse_pair(17, width, k=64, dtype=torch.bfloat16)
    labels = torch.arange(17) * 50
    check(student, teacher, None, labels, ce_weight=0.5, reduction="sum")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("renormalize", torch.float32),
        ("renormalize_reverse", torch.bfloat16),
        ("renormalize_jsd", torch.float32),
        ("teacher", torch.bfloat16),
    ],
    ids=str,
)
def test_temperatures(backend, name, dtype):
    tail, divergence = LOSSES[name]
    student, teacher = sparse_pair(8, 5008, k=64, tail=tail, dtype=dtype)
    labels = torch.arange(8) * 500
    for temperature, of_teacher in ((0.3, 1.0), (2.0, 2.0), (20.0, 0.7)):
        here = teacher._replace(teacher_temperature=of_teacher)
        check(student, here, divergence, temperature=temperature, slack=2.0 if temperature < 0.5 else 1.0)
        check(student, here, divergence, labels, temperature=temperature, ce_weight=0.3, kd_weight=0.7)
    temperatures = torch.tensor([0.5, 1.0, 2.0, 3.0, 1.0, 20.0, 1.5, 7.0])
    check(student, teacher, divergence, labels, temperature=temperatures, ce_weight=0.3)


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_a_teachers_own_temperature(backend, tail):
    student, teacher = sparse_pair(8, 5008, k=64, tail=tail, dtype=torch.bfloat16)
    labels = torch.arange(8) * 500
    for temperature in (0.5, 2.0):
        here = teacher._replace(teacher_temperature=temperature)
        check(student, here, None, labels, temperature=temperature, ce_weight=0.3, scale_by_temperature=False)


@TWO_DTYPES
def test_the_whole_vocabulary_is_given(backend, dtype):
    student, dense = logits_pair(4, 4096, dtype=dtype)
    teacher = on("cuda", top_k(dense.float(), 4096))
    loss, gradient = gradient_of(student.cuda(), teacher)
    exact = student.double().cuda().requires_grad_()
    expected = reference.distillation_loss(exact, dense.double().cuda())
    expected.backward()
    assert_near("loss", loss, expected, 2e-6)
    (assert_near if dtype == torch.float32 else assert_rounded)("gradient", gradient, exact.grad, 4e-6)
    check(student, top_k(dense.float(), 4096, "teacher"))


def test_a_bucket_is_the_dense_loss_without_its_tails_own(backend):
    student, dense = logits_pair(4, 33008)
    loss, gradient = gradient_of(student.cuda(), on("cuda", top_k(dense, 64)))
    expected, wanted = gradient_of(student.cuda(), dense.cuda(), divergence=kd.Decoupled(kd.TopK(64), wcd=0.0))
    assert_near("loss", loss, expected, 2e-6)
    assert_near("gradient", gradient, wanted, 4e-6)


@pytest.mark.parametrize("noise", [1e-3, 0.05])
@pytest.mark.parametrize("name", ["renormalize", "renormalize_reverse", "renormalize_jsd"])
def test_models_that_nearly_agree_inside(backend, name, noise):
    tail, divergence = LOSSES[name]
    student, teacher = sparse_pair(6, 5008, k=64, tail=tail, noise=noise)
    check(student, teacher, divergence)
    if backend == "triton":
        check(student, teacher, divergence, floor=0.0, slack=2.0)


# --- Which ids ---


@A_FEW
def test_rows_of_unequal_length_and_repeated_ids(backend, tail, divergence):
    student, teacher = sparse_pair(40, 5008, k=64, tail=tail)
    labels = torch.arange(40) * 120
    for given in (ragged(teacher), repeated(teacher, 3), repeated(ragged(teacher))):
        check(student, given, divergence, labels, ce_weight=0.5)
    one = teacher._replace(ids=teacher.ids[:, :1].expand(40, 64))
    check(student, one, divergence)


@EACH_TAIL
def test_an_id_out_of_range_is_nan_in_its_row(backend, tail):
    student, teacher = sparse_pair(400, 5008, k=64, tail=tail)
    ids = teacher.ids.clone()
    ids[1, 4], ids[3, 63], ids[399, 0] = 5008, 2**40, 2**31 + 5
    labels = torch.arange(400).cuda()
    wrong = torch.zeros(400, dtype=torch.bool)
    wrong[[1, 3, 399]] = True
    for options in ({}, {"labels": labels, "ce_weight": 0.5}):
        loss, gradient = gradient_of(student.cuda(), on("cuda", teacher._replace(ids=ids)), reduction="none", **options)
        expected, wanted = gradient_of(student.cuda(), on("cuda", teacher), reduction="none", **options)
        assert torch.equal(loss.isnan().cpu(), wrong)
        assert torch.equal(gradient.isnan().all(-1).cpu(), wrong)
        assert torch.equal(loss[~wrong], expected[~wrong])
        assert torch.equal(gradient[~wrong], wanted[~wrong])


def test_int32_ids_and_log_probabilities_of_every_dtype_and_layout(any_dtypes):
    student, teacher = sparse_pair(2, 3, 5008, k=64)
    check(student, teacher._replace(ids=teacher.ids.int(), logprobs=teacher.logprobs.bfloat16()))
    check(student, teacher._replace(logprobs=teacher.logprobs.half()))
    check(student, teacher._replace(ids=teacher.ids[..., ::2], logprobs=teacher.logprobs[..., ::2]))
    swapped = teacher._replace(ids=teacher.ids.transpose(0, 1), logprobs=teacher.logprobs.transpose(0, 1))
    check(student.transpose(0, 1), swapped)


# --- What lies outside ---


@pytest.mark.parametrize("gap", [20.7, 60.0, 1000.0])
def test_next_to_nothing_outside_keeps_its_digits(backend, gap):
    student, teacher = nearly_all(4, 33008, 64, gap)
    check(student, teacher)
    # What the tail "teacher" gives to the columns outside is the student's own probability.
    teacher = on("cuda", teacher._replace(tail="teacher"))
    leaf = student.double().cuda().requires_grad_()
    reference.distillation_loss(leaf, in_double(teacher), reduction="sum").backward()
    _, gradient = gradient_of(student.cuda(), teacher, reduction="sum")
    weak = outside(on("cpu", teacher), 33008).cuda()
    # In fp32 there is no e^-1000.
    assert_near("outside", gradient[weak], leaf.grad[weak], 4e-6, floor=1e-30)


@pytest.mark.parametrize("rest", [1e-3, 1e-5, 1e-9, -1e-3])
def test_a_teacher_that_leaves_next_to_nothing_outside(backend, rest):
    """And one that leaves less than nothing, as rounded log-probabilities do."""
    student, teacher = nearly_all(4, 33008, 64, 14.0)
    logprobs = teacher.logprobs.double().log_softmax(-1) + torch.tensor(rest).neg().log1p()
    teacher = teacher._replace(logprobs=logprobs.float())
    check(student, teacher)
    weak = outside(teacher, 33008).cuda()
    student, teacher = student.cuda(), on("cuda", teacher)
    leaf = student.double().requires_grad_()
    reference.distillation_loss(leaf, in_double(teacher)).backward()
    assert_near("outside", gradient_of(student, teacher)[1][weak], leaf.grad[weak], 1e-5)


@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.bfloat16, 2.0)], ids=str)
def test_a_token_outside_far_above_the_rest(backend, dtype, temperature):
    student, teacher = sparse_pair(3, 30016, k=64, dtype=dtype)
    student[0, 29000], student[1, 17000], student[2, 5] = 60.0, 400.0, 25.0
    labels = torch.tensor([29000, 5, 77])
    for tail in ("bucket", "teacher"):
        here = teacher._replace(tail=tail, teacher_temperature=temperature)
        check(student, here, None, labels, temperature=temperature, ce_weight=0.3, reduction="none")


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_logits(backend, tail, divergence, dtype):
    generator = torch.Generator().manual_seed(0)
    student = (1e4 * (2 * torch.rand(4, 1008, generator=generator) - 1)).to(dtype)
    ids = torch.stack([torch.randperm(1008, generator=generator)[:64] for _ in range(4)])
    logprobs = torch.randn(4, 64, generator=generator).log_softmax(-1)
    if tail not in ("bucket", "drop"):
        logprobs[2:] = student[2:].float().log_softmax(-1).gather(-1, ids[2:])
    check(student, kd.TopKTeacher(ids, logprobs, tail), divergence, reduction="none")


# --- What is no number, and what does not count ---


@A_FEW
@TWO_DTYPES
def test_tokens_without_probability(backend, tail, divergence, dtype):
    student, teacher = sparse_pair(3, 5008, k=64, tail=tail, dtype=dtype)
    none = teacher._replace(logprobs=teacher.logprobs.index_fill(1, torch.arange(5), -torch.inf))
    check(student, none, divergence)
    check(student.scatter(1, teacher.ids[:, :5], -torch.inf), none, divergence)
    weak = outside(teacher, 5008)
    weak[:, 4900:] = False
    check(student.masked_fill(weak, -torch.inf), teacher, divergence)


@EACH_TAIL
def test_a_set_without_the_teachers_mass(backend, tail):
    student, teacher = sparse_pair(3, 5008, k=64, tail=tail)
    nothing = teacher._replace(logprobs=torch.full_like(teacher.logprobs, -torch.inf))
    labels = torch.tensor([3, 5, 5007])
    check(student, nothing)
    check(student, nothing._replace(ids=torch.full_like(teacher.ids, -1)), None, labels, ce_weight=0.5)
    check(student.scatter(1, teacher.ids, -torch.inf), nothing)


@EACH_TAIL
def test_a_student_that_forbids_what_the_teacher_does_is_infinitely_far(backend, tail):
    student, teacher = sparse_pair(3, 5008, k=64, tail=tail)
    weak = outside(teacher, 5008)
    cases = [student.scatter(1, teacher.ids[:, :1], -torch.inf), student.scatter(1, teacher.ids, -torch.inf)]
    if tail == "bucket":
        cases.append(student.masked_fill(weak, -torch.inf))
    else:
        check(student.masked_fill(weak, -torch.inf), teacher)
    for forbidden in cases:
        loss, gradient = gradient_of(forbidden.cuda(), on("cuda", teacher))
        assert loss.item() == torch.inf
        assert torch.isfinite(gradient).all()


@A_FEW
@TWO_DTYPES
def test_nan_stays_in_its_row(backend, tail, divergence, dtype):
    student, teacher = sparse_pair(3, 5008, k=64, tail=tail, dtype=dtype)
    weak = outside(teacher, 5008)[1].nonzero()[:, 0]
    for column in (int(teacher.ids[1, 4]), int(weak[0]), int(weak[2000]), int(weak[-1])):
        spoilt = student.clone()
        spoilt[1, column] = torch.nan
        options = {"divergence": divergence, "reduction": "none", "ce_weight": 0.5}
        loss, gradient = gradient_of(
            spoilt.cuda(), on("cuda", teacher), torch.tensor([3, 4999, 7], device="cuda"), **options
        )
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert torch.isfinite(gradient[[0, 2]]).all()


@A_FEW
@TWO_DTYPES
def test_labels_weights_and_rows_that_do_not_count(backend, tail, divergence, dtype):
    student, teacher = sparse_pair(3, 4, 1008, k=64, tail=tail, dtype=dtype)
    labels = torch.tensor([[3, -100, 0, 999], [-100, 5, 5, -100], [17, 2, -100, 1]])
    weight = torch.tensor([[1.0, 2.0, 0.5, 0.0], [1.0, 0.0, 3.0, 1.0], [0.25, 1.0, 1.0, 1.0]])
    student[labels == -100] = torch.nan
    teacher.logprobs[labels == -100] = torch.nan
    for options in ({"weight": weight}, {"reduction": "none"}, {"reduction": "mean", "normalizer": 7}):
        check(student, teacher, divergence, labels, ce_weight=0.3, kd_weight=0.7, **options)
        check(student, teacher, divergence, labels, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropy_alone(backend, temperature):
    student, teacher = sparse_pair(4, 5008, k=64)
    student[:, teacher.ids[0, 3]] = -torch.inf  # an infinite divergence of which nothing comes through
    labels = torch.tensor([int(teacher.ids[0, 5]), 99, 5007, 0])
    for tail in ("bucket", "renormalize"):
        here = teacher._replace(tail=tail, teacher_temperature=temperature)
        check(student, here, None, labels, kd_weight=0.0, ce_weight=1.0, temperature=temperature)


@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100)])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(backend, shape, inplace):
    leaf = torch.empty(shape, device="cuda", requires_grad=True)
    ids = torch.zeros(*shape[:-1], 5, dtype=torch.int64, device="cuda")
    loss = kd.distillation_loss(leaf * 1, kd.TopKTeacher(ids, ids.float()), inplace=inplace)
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad.shape == shape


# --- Statistics ---


@EACH
def test_statistics(backend, tail, divergence):
    student, teacher = sparse_pair(6, 4000, k=64, tail=tail, dtype=torch.bfloat16)
    best = teacher.ids.gather(1, teacher.logprobs.argmax(-1, keepdim=True))
    student[0].scatter_(0, best[0], 30.0)
    student[1, outside(teacher, 4000)[1].nonzero()[5, 0]] = 30.0
    student[3].scatter_(0, teacher.ids[3], 30.0)  # equals are no less likely
    labels = torch.tensor([3, 399, -100, 7, 8, 3999])
    stats = check_stats(student, teacher, labels, device="cuda", divergence=divergence, ce_weight=0.5)
    assert stats.top1_agreement[:4].tolist() == [1, 0, 0, 1]
    assert all(float(stat[2]) == 0 for stat in stats if stat is not None)
    check_stats(student, repeated(teacher), labels, device="cuda", divergence=divergence, ce_weight=0.5)
    if tail in ("renormalize", "teacher"):
        temperature = torch.tensor([0.5, 1.0, 2.0, 3.0, 1.5, 5.0], device="cuda")
        check_stats(student, teacher, device="cuda", divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("name", ["renormalize", "renormalize_jsd"])
def test_the_columns_of_the_ids_alone(backend, name):
    """Without cross-entropy and statistics, a loss inside S reads nothing else."""
    tail, divergence = LOSSES[name]
    student, teacher = sparse_pair(5, 5008, k=64, tail=tail, dtype=torch.bfloat16)
    options = {"divergence": divergence, "reduction": "none"}
    spoilt = student.masked_fill(outside(teacher, 5008), torch.nan)
    student, spoilt, teacher = student.cuda(), spoilt.cuda(), on("cuda", teacher)
    loss, gradient = gradient_of(student, teacher, **options)
    alone = gradient_of(spoilt, teacher, **options)
    assert torch.equal(alone[0], loss)
    assert torch.equal(alone[1], gradient)
    leaf = student.clone().requires_grad_()
    whole, _ = kd.distillation_loss(leaf, teacher, return_stats=True, **options)
    whole.sum().backward()
    assert_near("loss", loss, whole, 1e-6)
    assert_near("gradient", gradient, leaf.grad, 1e-3)


@A_FEW
def test_without_a_gradient(backend, tail, divergence):
    student, teacher = sparse_pair(5, 5008, k=64, tail=tail, dtype=torch.bfloat16)
    student, teacher = student.cuda(), on("cuda", teacher)
    options = {"divergence": divergence, "reduction": "none", "return_stats": True}
    with torch.no_grad():
        alone, stats = kd.distillation_loss(student, teacher, **options)
    loss, others = kd.distillation_loss(student.requires_grad_(), teacher, **options)
    assert_near("loss", alone, loss, 1e-6)
    for one, other in zip(stats, others, strict=True):
        if one is not None:
            assert_near("stats", one, other, 2e-6, floor=0.1)


# --- Where tensors lie ---


@A_FEW
@pytest.mark.parametrize(("width", "dtype"), [(1001, torch.float32), (1008, torch.bfloat16)], ids=str)
def test_shifted_views_and_in_place(backend, tail, divergence, width, dtype):
    student, teacher = sparse_pair(2, 5, width, k=64, tail=tail, dtype=dtype)
    cut = teacher._replace(ids=teacher.ids[:, :-1], logprobs=teacher.logprobs[:, :-1])
    labels = torch.arange(10).view(2, 5)
    gradients = []
    for inplace in (False, True):
        leaf = student.cuda().requires_grad_()
        logits = leaf * 1.0
        loss = kd.distillation_loss(
            logits, on("cuda", teacher), labels.cuda(), divergence=divergence, ce_weight=0.5, inplace=inplace
        )
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    check(student[:, :-1], cut, divergence, labels[:, :-1], ce_weight=0.5)


@A_FEW
def test_any_view_by_the_automatic_choice(any_dtypes, tail, divergence):
    memory, teacher = sparse_pair(2, 5, 1021, k=64, tail=tail, dtype=torch.bfloat16)
    teacher = teacher._replace(ids=teacher.ids.clamp(max=999))
    for start in (0, 3, 8):
        check(memory[..., start : start + 1000], teacher, divergence)
    every_other = teacher._replace(ids=teacher.ids[:, ::2], logprobs=teacher.logprobs[:, ::2])
    check(memory[:, ::2, 1:1001], every_other, divergence)


@A_FEW
@TWO_DTYPES
def test_padding_is_no_token(backend, tail, divergence, dtype):
    student, teacher = sparse_pair(5, 1008, k=64, tail=tail, dtype=dtype)
    teacher = teacher._replace(ids=teacher.ids.clamp(max=991))
    student[:, 992:] = torch.nan
    labels = torch.tensor([0, 991, -100, 5, 5])
    check(student, teacher, divergence, labels, vocab_size=992, ce_weight=0.5, reduction="sum")
    _, gradient = gradient_of(student.cuda(), on("cuda", teacher), divergence=divergence, vocab_size=992)
    assert (gradient[:, 992:] == 0).all()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_transforms_of_the_students_logits(any_dtypes, tail):
    student, teacher = sparse_pair(3, 1003, k=64, tail=tail, dtype=torch.bfloat16)
    labels = teacher.ids[:, 3]
    for options in ({"student_logit_scale": 0.3}, {"student_logit_scale": 2.0, "student_softcap": 5.0}):
        check(student, teacher, None, labels, ce_weight=0.5, reduction="sum", **options)


def sweep(
    backend: str, student: Tensor, teacher: kd.TopKTeacher, gradient: Tensor | None, divergence: kd.Divergence
) -> tuple[Tensor, Tensor]:
    """Loss and statistics straight from the kernels, with a cross-entropy; row 1 counts for nothing."""
    rows = student.shape[0]
    options = RowOptions(
        divergence=divergence.name,
        parameters=divergence.parameters(),
        temperature=1.0,
        kd_weight=0.7,
        ce_weight=0.3,
        scale_by_temperature=True,
        vocab_size=student.shape[-1],
        student_logit_scale=1.0,
        student_softcap=0.0,
        teacher_logit_scale=1.0,
        teacher_softcap=0.0,
        scale_gradient=True,
        tail=teacher.tail,
    )
    scale = torch.ones(rows, device="cuda")
    scale[1] = 0
    loss, stats = torch.full((rows,), torch.nan, device="cuda"), torch.full((7, rows), torch.nan, device="cuda")
    labels = torch.arange(rows, device="cuda") * 7
    tensors = (student, teacher.logprobs, labels, scale, None, None, teacher.ids)
    try:
        backends.row_loss(backend, *tensors, options, gradient, loss, stats)
    except RuntimeError as error:
        if "within 16 bytes" not in str(error):
            raise
        pytest.skip("the CUDA kernels leave these rows to Triton")
    return loss, stats


@A_FEW
@pytest.mark.parametrize(("width", "dtype"), [(1000, torch.bfloat16), (128256, torch.float16)], ids=str)
def test_a_16_bit_gradient_of_fp32_logits(backend, tail, divergence, width, dtype):
    student, teacher = sparse_pair(4, width, k=64, tail=tail)
    student[1] = torch.nan
    student, teacher = student.cuda(), on("cuda", teacher)
    wide = torch.full_like(student, torch.nan)
    before = sweep(backend, student, teacher, wide, divergence)
    exact = student.double().nan_to_num().requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0], device="cuda")
    labels = torch.arange(4, device="cuda") * 7
    options = {"divergence": divergence, "kd_weight": 0.7, "ce_weight": 0.3, "weight": weight}
    reference.distillation_loss(exact, in_double(teacher), labels, reduction="sum", **options).backward()
    gradient = torch.full_like(student, torch.nan, dtype=dtype)
    after = sweep(backend, student, teacher, gradient, divergence)
    assert_rounded("gradient", gradient, exact.grad, BOUNDS[dtype][1])
    assert_rounded("gradient", gradient, wide.double(), BOUNDS[dtype][1])
    assert_near("loss", after[0], before[0], 1e-6)
    assert_near("statistics", after[1], before[1], 1e-6)
    assert (gradient[1] == 0).all()


@A_FEW
def test_a_16_bit_gradient_wherever_it_lies(backend, tail, divergence):
    student, teacher = sparse_pair(4, 1000, k=64, tail=tail)
    student, teacher = student.cuda(), on("cuda", teacher)
    wide = torch.empty_like(student)
    sweep(backend, student, teacher, wide, divergence)
    for start, width in ((0, 1008), (4, 1004), (3, 1003)):
        memory = torch.full((4 * width + start,), torch.nan, dtype=torch.bfloat16, device="cuda")
        gradient = memory[start:].view(4, width)[:, :1000]
        sweep(backend, student, teacher, gradient, divergence)
        assert_rounded(f"{start}, {width}", gradient, wide.double(), BOUNDS[torch.bfloat16][1])
        assert int(memory.isnan().sum()) == memory.numel() - gradient.numel()


# --- What only a GPU can get wrong ---


@A_FEW
@TWO_DTYPES
def test_the_same_bits_every_time(backend, tail, divergence, dtype):
    student, teacher = sparse_pair(300, 33008, k=64, tail=tail, dtype=dtype)
    labels = torch.arange(300).cuda()
    student, teacher = student.cuda(), on("cuda", repeated(teacher))
    runs = []
    for _ in range(4):
        leaf = student.clone().requires_grad_()
        options = {"divergence": divergence, "ce_weight": 0.5, "reduction": "none", "return_stats": True}
        loss, stats = kd.distillation_loss(leaf, teacher, labels, **options)
        loss.sum().backward()
        runs.append([loss.detach(), leaf.grad, *(stat for stat in stats if stat is not None)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaf is older than the side stream
@A_FEW
def test_never_waits_for_the_device_and_is_captured(backend, tail, divergence):
    student, teacher = sparse_pair(6, 5008, k=64, tail=tail, dtype=torch.bfloat16)
    student, teacher = student.cuda(), on("cuda", teacher)
    labels = torch.tensor([0, -100, 5, 7, 9, 5007]).cuda()
    static = student.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = kd.distillation_loss(static, teacher, labels, divergence=divergence, ce_weight=0.5)
        (gradient,) = torch.autograd.grad(2.0 * loss, static)
        return loss, gradient

    step()
    with synchronisations("error"):
        step()
    graph, (loss, gradient) = captured(step)
    with torch.no_grad():
        static.copy_(student.flip(0))
    for _ in range(2):
        graph.replay()
    expected = step()
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


def test_the_current_stream_is_used(backend):
    student, teacher = sparse_pair(64, 32000, k=64, dtype=torch.bfloat16)
    student, teacher = student.cuda(), on("cuda", teacher)
    expected = kd.distillation_loss(student, teacher)
    late = torch.zeros_like(student)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(student)
        actual = kd.distillation_loss(late, teacher)
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_many_rows_of_few_columns(backend):
    """More rows than a GPU runs at once, in turns: a row leaves nothing behind for the next."""
    student, teacher = sparse_pair(20000, 64, k=8, dtype=torch.bfloat16)
    labels = torch.arange(20000) % 64
    labels[::3] = -100
    check(student, repeated(ragged(teacher)), None, labels, ce_weight=0.5, reduction="none")


def test_more_than_2_31_elements(backend):
    rows, width = 8200, 262144  # 2.15e9 elements, 4.3 GB a tensor
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    student = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, width, (rows, 64), device="cuda")
    ids[-1, 0] = width - 1
    teacher = kd.TopKTeacher(ids, torch.randn(rows, 64, device="cuda").log_softmax(-1) - 0.1)
    leaf = student.requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, reduction="none")
    loss.sum().backward()
    for picked in (0, 4096, rows - 1):
        here = slice(picked, picked + 1)
        one = student.detach()[here].double().requires_grad_()
        of_one = teacher._replace(ids=ids[here], logprobs=teacher.logprobs[here].double())
        expected = reference.distillation_loss(one, of_one, reduction="none")
        expected.sum().backward()
        assert_near("loss", loss[here], expected, 2e-6)
        assert_rounded("gradient", leaf.grad[here], one.grad, 4e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_peak_memory(backend, inplace):
    rows, width = 512, 128256
    leaf = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    ids = torch.randint(0, width, (rows, 64), device="cuda")
    teacher = kd.TopKTeacher(ids, torch.randn(rows, 64, device="cuda").log_softmax(-1))
    labels = torch.arange(rows, device="cuda")

    def step() -> None:
        leaf.grad = None
        logits = leaf.view_as(leaf) if inplace else leaf
        kd.distillation_loss(logits, teacher, labels, ce_weight=0.5, inplace=inplace).backward()

    step()
    leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradient = 0 if inplace else rows * width * 2
    assert gradient <= peak <= gradient + (4 << 20), f"{peak / 2**20:.2f} MiB"


def test_torch_compile(backend):
    student, teacher = sparse_pair(5, 1008, k=64, dtype=torch.bfloat16)
    student, teacher = student.cuda(), on("cuda", teacher)

    def loss_of(z: Tensor) -> Tensor:
        return kd.distillation_loss(z, teacher) * 2

    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = loss_of(one)
    expected.backward()
    actual = torch.compile(loss_of, fullgraph=True)(two)
    actual.backward()
    assert_near("loss", actual, expected, 1e-6)
    assert_near("gradient", two.grad, one.grad, 1e-2)
