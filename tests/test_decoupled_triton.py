"""Strong sets and decoupled divergences of the Triton kernels against the reference in fp64, under the interpreter."""

import pytest
import torch
from checks import BOUNDS, against_reference, assert_near, gradient_of, logits_pair
from decoupled_cases import FAMILY, labels_for, light_weak_set, mask_of, tied
from interpreter import interpreted

import kdkernels as kd
from kdkernels.backends import triton
from kdkernels.backends.native import RowOptions
from kdkernels.reference import strong_tokens

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(triton.why_not(CPU) is not None, reason=str(triton.why_not(CPU)))

# One of each way to a strong set, with weights that tell the terms apart.
KINDS = {name: FAMILY[name] for name in ("dkd", "top_5", "cakd_top_p", "given", "adaptive_kl")}
EACH = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
EACH_KIND = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with interpreted(monkeypatch):
        yield


def stats_of(student, teacher, labels=None, **options):
    """Our statistics, and the reference's in fp64."""
    _, actual = kd.distillation_loss(student, teacher, labels, return_stats=True, **options)
    _, expected = kd.reference.distillation_loss(
        student.double(), teacher.double(), labels, return_stats=True, **options
    )
    return actual, expected


# --- The family ---


@EACH
@EACH_DTYPE
def test_the_family(make, dtype):
    student, teacher = logits_pair(1, 700, dtype=dtype)
    against_reference(student, teacher, labels_for(1, 700), divergence=make(700), reduction="sum")


@EACH_KIND
@pytest.mark.parametrize(
    ("width", "dtype"), [(1, torch.float32), (7, torch.bfloat16), (300, torch.float16), (1024, torch.bfloat16)], ids=str
)
def test_widths(make, width, dtype):
    student, teacher = logits_pair(1, width, dtype=dtype)
    against_reference(student, teacher, labels_for(1, width), divergence=make(width), reduction="sum")


@EACH_KIND
@pytest.mark.parametrize(
    ("temperature", "dtype"),
    [(0.2, torch.bfloat16), (5.0, torch.float32), (torch.tensor([0.5, 7.0]), torch.bfloat16)],
    ids=["0.2", "5", "per row"],
)
def test_temperatures_labels_and_weights(make, temperature, dtype):
    student, teacher = logits_pair(2, 300, dtype=dtype)
    options = {"divergence": make(300), "temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.3}
    weight = torch.tensor([2.0, 0.5])
    against_reference(student, teacher, labels_for(2, 300), weight=weight, **options)


@EACH_KIND
@pytest.mark.parametrize(("noise", "dtype"), [(1e-3, torch.float32), (0.1, torch.float32), (0.3, torch.bfloat16)])
def test_models_that_nearly_agree(make, noise, dtype):
    student, teacher = logits_pair(1, 300, noise=noise, dtype=dtype)
    against_reference(student, teacher, labels_for(1, 300), divergence=make(300))


@EACH_KIND
def test_teacher_is_student(make):
    student, _ = logits_pair(1, 300)
    loss, gradient = gradient_of(student, student.clone(), labels_for(1, 300), divergence=make(300), temperature=1.3)
    assert loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("strong", [kd.Label(), kd.TopK(4), kd.TopP(0.6), kd.Given(mask_of(600))], ids=str)
@EACH_DTYPE
def test_all_weights_one_are_forward_kl(strong, dtype):
    for student, teacher in (logits_pair(2, 600, dtype=dtype), logits_pair(2, 600, noise=3e-3, dtype=dtype)):
        ones = torch.ones(())
        divergence = kd.Decoupled(strong, ones, ones, ones)
        loss, gradient = gradient_of(student, teacher, labels_for(2, 600), divergence=divergence, reduction="none")
        expected, expected_gradient = gradient_of(student, teacher, reduction="none")
        assert_near("loss", loss, expected, 1e-6)
        assert_near("gradient", gradient, expected_gradient, 1e-6 if dtype == torch.float32 else 2e-3)


@EACH_DTYPE
def test_a_light_weak_set_keeps_its_digits(dtype):
    student, teacher = (x.to(dtype) for x in light_weak_set(2, 600, 3))
    for weights in ((1.0, 1.0, 1.0), (0.0, 0.0, 1.0)):
        divergence = kd.Decoupled(kd.Given(torch.arange(600) < 3), *weights, mass_weighted=False)
        against_reference(student, teacher, divergence=divergence, reduction="sum")
        actual, expected = stats_of(student, teacher, divergence=divergence)
        for name in ("bcd", "scd", "wcd", "strong_mass_teacher"):
            assert_near(name, getattr(actual, name), getattr(expected, name), 2e-6)


@pytest.mark.parametrize("gap", [60.0, 1000.0])
def test_a_weak_set_beyond_the_range_of_one_reference(gap):
    student, teacher = light_weak_set(2, 300, 3, gap)
    # Where the sets' gap is large, fp32 logits themselves are coarse: both sides get the same numbers.
    for strong in (kd.Given(torch.arange(300) < 3), kd.TopK(3), kd.Given(torch.arange(300) >= 3)):
        for mass_weighted in (False, True):
            divergence = kd.Decoupled(strong, 1.0, 2.0, 3.0, mass_weighted)
            against_reference(student, teacher, divergence=divergence, reduction="sum")
    against_reference(student, teacher, labels_for(2, 300), divergence=kd.DKD(), reduction="sum")


@EACH_KIND
def test_extreme_logits(make):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (1e4 * (2 * torch.rand(2, 300, generator=generator) - 1) for _ in range(2))
    teacher[1] = student[1]
    teacher[1, ::2] += 64.0
    against_reference(student, teacher, labels_for(2, 300), divergence=make(300), slack=2)


# --- Which tokens are strong ---


def strong_mass(teacher, strong, **options):
    """The teacher's mass of the set that the kernels chose, and of the reference's, in fp64."""
    actual, _ = stats_of(torch.zeros_like(teacher), teacher, divergence=kd.Decoupled(strong), **options)
    log_p = (teacher.double() / options.get("temperature", 1.0)).log_softmax(-1)
    inside = strong_tokens(teacher.double(), log_p, strong)
    return actual.strong_mass_teacher, (log_p.exp() * inside).sum(-1), inside


@pytest.mark.parametrize("k", [1, 2, 63, 299, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_top_k(k, dtype):
    # Logits so close that every token counts: one more or less would show.
    _, teacher = logits_pair(1, 300, spread=0.3, dtype=dtype)
    actual, expected, _ = strong_mass(teacher, kd.TopK(k))
    assert_near("mass", actual, expected, 1e-6)


@pytest.mark.parametrize("k", [1, 7, 100, 599])
def test_top_k_takes_ties_as_a_whole(k):
    student, teacher = tied(2, 600)
    for dtype in (torch.float32, torch.bfloat16):
        actual, expected, inside = strong_mass(teacher.to(dtype), kd.TopK(k))
        assert (inside.sum(-1) > k).any() or k == 599
        assert_near("mass", actual, expected, 1e-6)
    against_reference(student, teacher, divergence=kd.CAKD(1.0, 2.0, kd.TopK(k)))


def test_top_k_of_one_value():
    teacher = torch.zeros(1, 300)
    for k in (1, 300):
        actual, expected, _ = strong_mass(teacher, kd.TopK(k))
        assert_near("mass", actual, expected, 1e-6)


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.97])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_top_p(mass, temperature):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, teacher = logits_pair(2, 601, dtype=dtype)
        teacher[1, 300] = 12.0  # holds nearly everything
        actual, expected, _ = strong_mass(teacher, kd.TopP(mass), temperature=temperature)
        assert_near("mass", actual, expected, 1e-6)


def test_a_threshold_far_from_the_sample():
    # The first columns say nothing about the others, a sample of BLOCK columns nothing about the largest.
    teacher = torch.full((2, 2000), -3.0)
    teacher[0, :1500] = torch.linspace(5, 6, 1500)
    teacher[1, 1511::16] = torch.linspace(60, 90, 31)
    for strong in (kd.TopK(20), kd.TopK(1400), kd.TopP(0.3), kd.TopP(0.999)):
        actual, expected, _ = strong_mass(teacher, strong)
        assert_near("mass", actual, expected, 1e-6)


def test_threshold_of_transformed_logits():
    student, teacher = logits_pair(1, 300, spread=5.0, dtype=torch.bfloat16)
    for strong in (kd.TopK(9), kd.TopP(0.5)):
        divergence = kd.CAKD(0.5, 2.0, strong)
        for options in ({"teacher_logit_scale": 0.3}, {"teacher_softcap": 30.0, "student_softcap": 9.0}):
            against_reference(student, teacher, divergence=divergence, temperature=2.0, reduction="sum", **options)


def test_masks_of_every_shape():
    student, teacher = logits_pair(2, 3, 300)
    generator = torch.Generator().manual_seed(1)
    masks = (
        torch.rand(2, 3, 300, generator=generator) < 0.2,
        (torch.rand(2, 3, 305, generator=generator) < 0.2)[..., 3:303],
        (torch.rand(3, 300, generator=generator) < 0.2).expand(2, 3, 300),
        (torch.rand(3, 2, 300, generator=generator) < 0.2).transpose(0, 1),
    )
    for mask in masks:
        divergence = kd.CAKD(1.0, 2.0, kd.Given(mask))
        against_reference(student, teacher, divergence=divergence)
    cut = kd.CAKD(1.0, 2.0, kd.Given(masks[0][:, 1:]))
    against_reference(student[:, 1:], teacher[:, 1:], divergence=cut)


# --- What is no number, and what does not count ---


@EACH_KIND
@EACH_DTYPE
def test_tokens_masked_in_both_models_contribute_nothing(make, dtype):
    masked = [*range(40), 299]
    student, teacher = logits_pair(1, 300, dtype=dtype)
    student[:, masked] = teacher[:, masked] = -torch.inf
    against_reference(student, teacher, torch.tensor([77]), divergence=make(300))


@EACH_DTYPE
def test_an_infinite_term_is_never_nan(dtype):
    student, teacher = logits_pair(1, 300, dtype=dtype)
    student[:, 3] = -torch.inf
    label = torch.tensor([3])
    alone = kd.Given(torch.arange(300) == 3)
    among = kd.Given(torch.arange(300) < 9)
    for divergence in (kd.DKD(), kd.Decoupled(alone), kd.Decoupled(among), kd.CAKD(1.0, 1.0, among)):
        loss, gradient = gradient_of(student, teacher, label, divergence=divergence)
        assert loss.item() == torch.inf
        assert not gradient.isnan().any()
    # Nothing of what is infinite counts.
    for divergence in (kd.Decoupled(alone, 0.0, 0.0), kd.Decoupled(kd.Label(), 0.0, 0.0)):
        loss, _ = gradient_of(student, teacher, label, divergence=divergence)
        assert loss.isfinite()


@EACH_DTYPE
def test_sets_without_the_teachers_mass(dtype):
    student, teacher = logits_pair(2, 300, dtype=dtype)
    teacher[:, :9] = -torch.inf
    for mask in (torch.arange(300) < 9, torch.arange(300) >= 9):
        for mass_weighted in (False, True):
            divergence = kd.Decoupled(kd.Given(mask), 1.0, 2.0, 3.0, mass_weighted)
            against_reference(student, teacher, divergence=divergence)
    against_reference(student, teacher, torch.tensor([4, 200]), divergence=kd.DKD())
    student[:, :9] = -torch.inf  # and nobody's mass: as if the set were empty
    against_reference(student, teacher, divergence=kd.CAKD(1.0, 2.0, kd.Given(torch.arange(300) < 9)))


@EACH_KIND
def test_nan_stays_in_its_row(make):
    for side, column in ((0, 299), (1, 100)):
        pair = logits_pair(3, 300, dtype=torch.bfloat16)
        pair[side][1, column] = torch.nan
        loss, gradient = gradient_of(*pair, torch.tensor([3, 299, 7]), divergence=make(300), reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert not gradient[[0, 2]].isnan().any()


def test_labels_out_of_range_are_nan_in_their_row():
    # Labels on the CPU are checked before they come here; a GPU's are not.
    student, teacher = logits_pair(3, 100)
    options = RowOptions(
        "decoupled", (1.0, 0.0, 8.0, 0.0), 1.0, 1.0, 0.0, True, 100, 1.0, 0.0, 1.0, 0.0, True, "label", 0.0
    )
    loss, stats, gradient = torch.empty(3), torch.empty(9, 3), torch.empty(3, 100)
    labels = torch.tensor([1, 100, -7])
    triton.row_loss(student, teacher, labels, torch.ones(3), None, None, None, options, gradient, loss, stats)
    assert loss.isnan().tolist() == [False, True, True]
    assert stats.isnan().all(0).tolist() == [False, True, True]
    assert gradient[1:].isnan().all()


@EACH_KIND
def test_rows_that_do_not_count_are_not_read(make):
    student, teacher = logits_pair(3, 300)
    student[1], teacher[1] = torch.nan, torch.inf
    options = {"divergence": make(300), "weight": torch.tensor([1.0, 0.0, 1.0])}
    labels = labels_for(3, 300)
    against_reference(student, teacher, labels, **options)
    _, stats = kd.distillation_loss(student, teacher, labels, return_stats=True, **options)
    assert all((stat[1] == 0).all() for stat in stats if stat is not None)


# --- The other arguments ---


@pytest.mark.parametrize(
    "make", [FAMILY[name] for name in ("label_weighted", "top_32_no_tail", "cakd_top_p", "given_none", "adaptive_kl")]
)
def test_stats(make):
    student, teacher = logits_pair(1, 300, dtype=torch.bfloat16)
    actual, expected = stats_of(student, teacher, labels_for(1, 300), divergence=make(300), temperature=2.0)
    for name, ours, exact in zip(actual._fields, actual, expected, strict=True):
        if exact is not None:
            assert_near(name, ours, exact, 2e-6)


@EACH_KIND
@EACH_DTYPE
def test_padding(make, dtype):
    student, _ = logits_pair(2, 320, dtype=dtype)
    _, teacher = logits_pair(2, 304, dtype=dtype, seed=1)
    student[:, 300:], teacher[:, 300:] = torch.nan, torch.inf  # padding may hold anything at all
    options = {"vocab_size": 300, "ce_weight": 0.5, "divergence": make(300)}
    against_reference(student, teacher, labels_for(2, 300), reduction="sum", **options)
    _, gradient = gradient_of(student, teacher, labels_for(2, 300), **options)
    assert (gradient[:, 300:] == 0).all()


@EACH_KIND
def test_rows_of_any_alignment(make):
    student, teacher = logits_pair(2, 2, 607, dtype=torch.bfloat16)
    labels = labels_for(4, 600).view(2, 2)
    for cut in (lambda x: x[:, 1:, :600], lambda x: x[..., 3:603]):
        divergence = make(600)
        against_reference(cut(student), cut(teacher), labels[:, -cut(student).shape[1] :], divergence=divergence)
    against_reference(student[:1, :1, :600], teacher[:1, :1, 1:601], labels[:1, :1], divergence=make(600))


@EACH_KIND
def test_cross_entropy_alone(make):
    student, teacher = logits_pair(2, 300)
    student[:, 200] = -torch.inf  # an infinite divergence of which nothing comes through
    labels = torch.tensor([3, 99])
    for temperature in (1.0, 2.0):
        options = {"divergence": make(300), "kd_weight": 0.0, "ce_weight": 1.0, "temperature": temperature}
        against_reference(student, teacher, labels, **options)


@EACH_DTYPE
def test_term_weights_may_be_tensors(dtype):
    student, teacher = logits_pair(2, 300, dtype=dtype)
    divergence = kd.Decoupled(kd.TopK(4), torch.tensor(0.5), 2.0, torch.tensor(3.0), mass_weighted=False)
    against_reference(student, teacher, divergence=divergence)
    same = kd.Decoupled(kd.TopK(4), 0.5, 2.0, 3.0, mass_weighted=False)
    assert torch.equal(
        gradient_of(student, teacher, divergence=divergence)[1], gradient_of(student, teacher, divergence=same)[1]
    )


@EACH_KIND
@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 1.0), (torch.float32, 1e-2)], ids=str)
def test_inplace(make, dtype, noise):
    student, teacher = logits_pair(2, 300, dtype=dtype, noise=noise)
    options = {"divergence": make(300), "ce_weight": 0.5, "temperature": 2.0, "student_softcap": 9.0}
    labels = labels_for(2, 300)
    expected, expected_gradient = gradient_of(student, teacher, labels, **options)
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf * 1, teacher, labels, inplace=True, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(leaf.grad, expected_gradient)


@EACH_KIND
def test_mixed_dtypes_and_no_gradient(make):
    student, teacher = logits_pair(2, 300)
    labels = labels_for(2, 300)
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        pair = student.to(dtypes[0]), teacher.to(dtypes[1])
        against_reference(*pair, labels, divergence=make(300), reduction="sum")
        loss = kd.distillation_loss(*pair, labels, divergence=make(300))
        exact = kd.reference.distillation_loss(*(x.double() for x in pair), labels, divergence=make(300))
        assert_near("loss", loss, exact, BOUNDS[dtypes[0]][0])


def test_adaptive_kl_of_all_mass_is_forward_kl():
    student, teacher = logits_pair(2, 300)
    teacher[:, 7] = -torch.inf  # an infinite reverse KL, whose weight is 0
    actual, expected = (gradient_of(student, teacher, divergence=d) for d in (kd.AdaptiveKL(1.0), kd.ForwardKL()))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_counts_beyond_fp32_are_refused():
    options = RowOptions(
        "decoupled", (1.0,) * 4, 1.0, 1.0, 0.0, True, 2**24 + 1, 1.0, 0.0, 1.0, 0.0, True, "top_k", 5.0
    )
    logits = torch.empty(1, 1).expand(1, 2**24 + 1)
    assert "count tokens in fp32" in str(
        triton.row_loss(
            logits, logits, None, torch.ones(1), None, None, None, options, None, torch.empty(1), torch.empty(9, 1)
        )
    )
