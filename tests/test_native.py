"""The C++ kernels against the reference in fp64: every divergence, dtype, width, temperature and instruction set."""

import pytest
import torch
from checks import DIVERGENCES, against_reference, assert_near, logits_pair, masked_pair

import kdkernels as kd

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 1 and 7: less than a register; 1000 and 32000: whole registers, one block and many; 50257: a tail in every register
# width; the rest are today's vocabularies.
WIDTHS = [1, 7, 1000, 32000, 50257, 128256, 151936, 262144]
ALL = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(divergence, dtype, width):
    rows = 5 if width <= 1000 else 2
    student, teacher = logits_pair(rows, width, dtype=dtype)
    against_reference(student, teacher, divergence=divergence, reduction="sum")


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 20.0])
def test_temperatures(divergence, dtype, temperature):
    if divergence == kd.AlphaBeta(0.5, -0.5) and temperature < 1:
        pytest.skip("e^(gap/2T) exceeds what the dtype holds; so does the definition")
    student, teacher = logits_pair(8, 3001, dtype=dtype)
    against_reference(student, teacher, divergence=divergence, temperature=temperature, reduction="sum")


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(capability, divergence, dtype):
    student, teacher = logits_pair(4, 4099, dtype=dtype)
    labels = torch.tensor([0, 4098, -100, 17])
    options = {"temperature": 1.7, "ce_weight": 0.5, "student_softcap": 6.0, "teacher_logit_scale": 0.7}
    against_reference(student, teacher, labels, divergence=divergence, reduction="sum", **options)


@ALL
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("width", [50, 50257])
def test_models_that_nearly_agree(divergence, noise, width):
    # Where a value is a difference of large sums, or a gradient one of nearly equal probabilities, this fails.
    student, teacher = logits_pair(4, width, noise=noise)
    against_reference(student, teacher, divergence=divergence)


@ALL
def test_teacher_is_student(capability, divergence):
    student, _ = logits_pair(3, 5003)
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, student.clone(), divergence=divergence, temperature=1.3)
    loss.backward()
    assert loss.item() == 0
    assert (leaf.grad == 0).all()


@ALL
def test_a_shift_of_all_logits_changes_nothing(divergence):
    student, teacher = logits_pair(3, 1024, dtype=torch.float64)
    # Whole numbers of shift are exact in fp32 here.
    student, teacher = (student * 256).round() / 256, (teacher * 256).round() / 256
    for shift in (0.0, 1000.0, -4096.0):
        against_reference(student.float(), (teacher + shift).float(), divergence=divergence)


@ALL
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits(capability, divergence, scale):
    # ±1e4: probabilities of exactly 0 and 1 in any precision; finite, and right where the reference is.
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * (2 * torch.rand(6, 513, generator=generator) - 1) for _ in range(2))
    teacher[3:] = student[3:]
    teacher[4, ::2] += 1.0
    if isinstance(divergence, kd.AlphaBeta) and min(divergence.alpha, divergence.beta) < 0:
        pytest.skip("a negative exponent of a probability of e^-1e4 exceeds fp32, as its value does")
    against_reference(student, teacher, divergence=divergence)


@ALL
def test_tokens_masked_in_both_models_contribute_nothing(capability, divergence):
    student, teacher = masked_pair(both=[0, 5, 1001, 1002])
    against_reference(student, teacher, divergence=divergence)
    leaf = student.clone().requires_grad_()
    kd.distillation_loss(leaf, teacher, divergence=divergence).backward()
    assert (leaf.grad[:, [0, 5, 1001, 1002]] == 0).all()


def test_a_teacher_probability_of_zero_contributes_nothing_to_forward_kl(capability):
    student, teacher = masked_pair(teacher_only=[3, 500])
    against_reference(student, teacher, divergence="forward_kl")


def test_a_student_that_forbids_what_the_teacher_does_is_infinitely_far(capability):
    student, teacher = masked_pair(student_only=[3])
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, divergence="forward_kl")
    loss.backward()
    assert loss.item() == torch.inf
    assert torch.isfinite(leaf.grad).all()
    teacher[:, 3] = -300.0  # a mass that fp32 rounds to 0 is a mass all the same
    assert kd.distillation_loss(student, teacher, divergence="forward_kl").item() == torch.inf


@pytest.mark.parametrize(
    "divergence",
    [kd.JensenShannon(), kd.SkewForwardKL(), kd.SkewReverseKL(), kd.TotalVariation(), kd.AlphaBeta()],
    ids=lambda d: d.name,
)
def test_one_sided_masks_are_finite_for_bounded_divergences(capability, divergence):
    student, teacher = masked_pair(student_only=[3, 8], teacher_only=[4, 1002])
    against_reference(student, teacher, divergence=divergence)


@ALL
def test_nan_stays_in_its_row(capability, divergence):
    for side in (0, 1):
        for column in (0, 2500, 5002):
            pair = logits_pair(3, 5003)
            pair[side][1, column] = torch.nan
            leaf = pair[0].clone().requires_grad_()
            loss = kd.distillation_loss(leaf, pair[1], divergence=divergence, reduction="none")
            loss.sum().backward()
            assert loss.isnan().tolist() == [False, True, False]
            assert leaf.grad[1].isnan().all()
            assert not leaf.grad[[0, 2]].isnan().any()


def test_a_whole_block_of_nan_is_not_lost(capability):
    student, teacher = logits_pair(2, 5000)
    student[0, 1024:2048] = torch.nan
    teacher[1, :] = torch.nan
    assert kd.distillation_loss(student, teacher, reduction="none").isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, teacher_dtype):
    student, teacher = logits_pair(3, 1030)
    against_reference(student.to(dtype), teacher.to(teacher_dtype), divergence="jensen_shannon", reduction="sum")


def test_half_precision_conversions_are_exact(capability):
    # Every finite half and bfloat16, through a gradient that is the student's own probability times a power of two.
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
        a = kd.distillation_loss(values[None], values[None].flip(-1), reduction="none", return_stats=True)[1]
        b = kd.distillation_loss(
            values[None].double(), values[None].flip(-1).double(), reduction="none", return_stats=True
        )[1]
        assert_near("lse", a.student_lse, b.student_lse, 1e-6)


def test_repeated_runs_agree_bitwise():
    student, teacher = logits_pair(16, 4099)
    results = []
    before = torch.get_num_threads()
    for threads in (before, 1, before):
        torch.set_num_threads(threads)
        leaf = student.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, teacher, divergence="jensen_shannon", temperature=2.0)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])
