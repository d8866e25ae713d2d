"""The Triton kernels against the reference in fp64, on small shapes under Triton's interpreter (see conftest.py)."""

import pytest
import torch
from checks import DIVERGENCES, against_reference, assert_near, assert_rounded, gradient_of, logits_pair
from interpreter import interpreted

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import triton
from kdkernels.backends.native import RowOptions

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(triton.why_not(CPU) is not None, reason=str(triton.why_not(CPU)))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
# One of each way through the kernels: no sums; sums from the statistics; sums of their own; a power sum; no plain form.
KINDS = {
    name: DIVERGENCES[name] for name in ("forward_kl", "reverse_kl", "jensen_shannon", "alpha_beta", "alpha_beta_c0")
}
EACH_KIND = pytest.mark.parametrize("divergence", KINDS.values(), ids=KINDS)
LABELS = torch.tensor([3, -100, 99])


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with interpreted(monkeypatch):
        yield


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_divergence(divergence, dtype):
    student, teacher = logits_pair(2, 1301, dtype=dtype)
    against_reference(student, teacher, divergence=divergence, reduction="sum")


# 1 and 7: less than a lane's columns; 1024: whole blocks; 1296: a part of one, in whole lanes; 1301: neither.
@EACH_KIND
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(1, torch.float32), (7, torch.bfloat16), (1024, torch.float16), (1296, torch.bfloat16), (1301, torch.float16)],
    ids=str,
)
def test_widths(divergence, width, dtype):
    student, teacher = logits_pair(2, width, dtype=dtype)
    against_reference(student, teacher, divergence=divergence, reduction="sum")


@EACH_KIND
@pytest.mark.parametrize("temperature", [0.1, 20.0])
def test_temperatures(divergence, temperature):
    if divergence == kd.AlphaBeta(0.5, -0.5) and temperature < 1:
        pytest.skip("e^(gap/2T) exceeds what the dtype holds; so does the definition")
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits_pair(2, 700, dtype=dtype)
        # At 0.1 these models share next to no mass: see docs/losses.md.
        # Nor do 16-bit rows keep every digit there in the plain formulas: Jensen-Shannon's gradient is off by 4.1e-6.
        options = {"divergence": divergence, "temperature": temperature, "reduction": "sum"}
        against_reference(student, teacher, floor=1e-2, slack=1.25, **options)


@ALL
def test_models_that_nearly_agree(divergence):
    student, teacher = logits_pair(2, 700, noise=1e-3)
    against_reference(student, teacher, divergence=divergence)


@EACH_KIND
@pytest.mark.parametrize("noise", [3e-2, 0.3])
def test_models_that_agree_somewhat(divergence, noise):
    # Where 16-bit rows leave the accurate formulas for the plain ones.
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits_pair(3, 700, noise=noise, dtype=dtype)
        against_reference(student, teacher, divergence=divergence)


@ALL
def test_teacher_is_student(divergence):
    student, _ = logits_pair(1, 1003)
    loss, gradient = gradient_of(student, student.clone(), divergence=divergence, temperature=1.3)
    assert loss.item() == 0
    assert (gradient == 0).all()


@EACH_KIND
@pytest.mark.parametrize("shift", [1000.0, -4096.0])
def test_a_shift_of_all_logits_changes_nothing(divergence, shift):
    student, teacher = logits_pair(2, 600, dtype=torch.float64)
    student, teacher = (student * 256).round() / 256, (teacher * 256).round() / 256
    against_reference(student.float(), (teacher + shift).float(), divergence=divergence)


@ALL
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits(divergence, scale):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * (2 * torch.rand(3, 513, generator=generator) - 1) for _ in range(2))
    teacher[1:] = student[1:]
    teacher[2, ::2] += 1.0
    if isinstance(divergence, kd.AlphaBeta) and min(divergence.alpha, divergence.beta) < 0:
        pytest.skip("a negative exponent of a probability of e^-1e4 exceeds fp32, as its value does")
    against_reference(student, teacher, divergence=divergence)


@EACH_KIND
def test_a_token_far_above_the_rest(divergence):
    # Beyond the range of the first reference: the row is swept again. In 16 bits, too sure for plain formulas.
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits_pair(3, 700, dtype=dtype)
        student[:, 601], teacher[1:, 601] = 20.0, 12.0
        teacher[2, 601] = student[2, 601] = 130.0
        against_reference(student, teacher, divergence=divergence, reduction="sum")


@ALL
def test_tokens_masked_in_both_models_contribute_nothing(divergence):
    masked = [*range(40), 400, 601, 602]
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits_pair(1, 603, dtype=dtype)
        student[:, masked] = teacher[:, masked] = -torch.inf
        against_reference(student, teacher, divergence=divergence)
    _, gradient = gradient_of(student, teacher, divergence=divergence)
    assert (gradient[:, masked] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_sided_masks(dtype):
    student, teacher = logits_pair(1, 603, dtype=dtype)
    teacher[:, [4, 602]] = -torch.inf
    against_reference(student, teacher, divergence="forward_kl")
    assert kd.distillation_loss(student, teacher, divergence="reverse_kl").item() == torch.inf
    student[:, [3, 8]] = -torch.inf
    for divergence in (kd.JensenShannon(), kd.SkewForwardKL(), kd.SkewReverseKL(), kd.TotalVariation(), kd.AlphaBeta()):
        against_reference(student, teacher, divergence=divergence)
    loss, gradient = gradient_of(student, teacher, divergence="forward_kl")
    assert loss.item() == torch.inf
    assert torch.isfinite(gradient).all()


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_row(divergence, dtype):
    for side, column in ((0, 602), (1, 300)):
        pair = logits_pair(3, 603, dtype=dtype)
        pair[side][1, column] = torch.nan
        loss, gradient = gradient_of(*pair, divergence=divergence, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert not gradient[[0, 2]].isnan().any()


def test_rows_without_a_number_are_nan():
    student, teacher = logits_pair(5, 300)
    student[0] = -torch.inf
    teacher[1] = -torch.inf
    student[2, 5] = torch.inf
    temperature = torch.tensor([1.0, 1.0, 1.0, -1.0, 2.0])
    loss, gradient = gradient_of(student, teacher, temperature=temperature, reduction="none")
    assert loss.isnan().tolist() == [True, True, True, True, False]
    assert gradient[:4].isnan().all()
    assert gradient[4].isfinite().all()


def test_labels_out_of_range_are_nan_in_their_row():
    # Labels on the CPU are checked before they come here; a GPU's are not.
    student, teacher = logits_pair(3, 100)
    options = RowOptions("forward_kl", (), 1.0, 1.0, 0.5, True, 100, 1.0, 0.0, 1.0, 0.0, True)
    loss, stats, gradient = torch.empty(3), torch.empty(4, 3), torch.empty(3, 100)
    triton.row_loss(
        student, teacher, torch.tensor([1, 100, -7]), torch.ones(3), None, None, None, options, gradient, loss, stats
    )
    assert loss.isnan().tolist() == [False, True, True]
    assert stats.isnan().any(0).tolist() == [False, True, True]
    assert gradient[1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, teacher_dtype):
    student, teacher = logits_pair(1, 601)
    against_reference(student.to(dtype), teacher.to(teacher_dtype), divergence="jensen_shannon", reduction="sum")


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5, torch.tensor([0.5, 1.0, 7.0])], ids=["1", "2.5", "per row"])
def test_labels_weights_and_temperatures(divergence, dtype, temperature):
    student, teacher = logits_pair(3, 600, dtype=dtype)
    weight = torch.tensor([2.0, 1.0, 0.5])
    options = {"divergence": divergence, "temperature": temperature, "weight": weight, "kd_weight": 0.7}
    against_reference(student, teacher, LABELS, ce_weight=0.3, **options)
    against_reference(student, teacher, LABELS, scale_by_temperature=False, reduction="none", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_alone(dtype):
    student, teacher = logits_pair(3, 700, dtype=dtype)
    student[:, 500] = -torch.inf  # an infinite divergence of which nothing comes through
    for temperature in (1.0, 2.0):
        against_reference(student, teacher, LABELS, kd_weight=0.0, ce_weight=1.0, temperature=temperature)


def test_rows_that_do_not_count_are_not_read():
    student, teacher = logits_pair(3, 600)
    student[1] = torch.nan
    teacher[1] = torch.inf
    for labels, weight in ((LABELS, None), (None, torch.tensor([1.0, 0.0, 1.0]))):
        against_reference(student, teacher, labels, weight=weight, divergence="jensen_shannon")
        loss, gradient = gradient_of(student, teacher, labels, weight=weight, reduction="none")
        assert loss[1] == 0
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(1000, 1000), (1024, 1001), (1008, 1064)])
def test_padding(dtype, widths):
    student, _ = logits_pair(2, widths[0], dtype=dtype)
    _, teacher = logits_pair(2, widths[1], dtype=dtype, seed=1)
    student[:, 992:], teacher[:, 992:] = torch.nan, torch.inf  # padding may hold anything at all
    labels = torch.tensor([0, 991])
    for divergence in ("forward_kl", "jensen_shannon"):
        options = {"vocab_size": 992, "ce_weight": 0.5, "divergence": divergence}
        against_reference(student, teacher, labels, reduction="sum", **options)
        _, gradient = gradient_of(student, teacher, labels, **options)
        assert (gradient[:, 992:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"student_logit_scale": 0.3},
        {"teacher_logit_scale": 0.3},
        {"student_softcap": 3.0},
        {"student_logit_scale": 2.0, "student_softcap": 5.0, "teacher_logit_scale": 0.5, "teacher_softcap": 30.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_logit_transforms(dtype, options):
    student, teacher = logits_pair(3, 603, dtype=dtype)
    student[0, 17] = -torch.inf if "student_softcap" in options else 0.0
    for divergence in ("forward_kl", "jensen_shannon"):
        options = {"divergence": divergence, "ce_weight": 0.5, "temperature": 1.5, "reduction": "sum", **options}
        against_reference(student, teacher, LABELS, **options)


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_stats(ce_weight, divergence):
    student, teacher = logits_pair(3, 600)
    labels = LABELS if ce_weight else None
    for dtype in (torch.float32, torch.bfloat16):
        options = {"ce_weight": ce_weight, "temperature": 2.0, "divergence": divergence, "return_stats": True}
        pair = student.to(dtype), teacher.to(dtype)
        loss, stats = kd.distillation_loss(*pair, labels, **options)
        exact, expected = kd.reference.distillation_loss(*(x.double() for x in pair), labels, **options)
        assert_near("loss", loss, exact, 2e-6)
        for name, actual, want in zip(stats._fields, stats, expected, strict=True):
            if want is not None:
                assert_near(name, actual, want, 2e-6)


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "transposed rows": lambda x: x.transpose(0, 1),
    "narrowed columns": lambda x: x[..., 3:601],
    "expanded": lambda x: x[:1].expand(2, *x.shape[1:]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize(("width", "dtype"), [(603, torch.bfloat16), (608, torch.float32)], ids=str)
def test_views_are_read_where_they_lie(view, width, dtype):
    student, teacher = logits_pair(2, 3, width, dtype=dtype)
    against_reference(view(student), view(teacher), divergence="reverse_kl", reduction="sum")
    against_reference(view(student), view(teacher).contiguous(), reduction="sum")


def test_four_runs_of_rows_and_more():
    student, teacher = logits_pair(3, 3, 3, 3, 3, 20)
    cut = (slice(None, 2), slice(None, 1), slice(None, 2), slice(None, 2), slice(None, 2))
    against_reference(student[cut], teacher[cut])
    cut = (slice(None, 2),) * 5
    base = student.clone().requires_grad_()
    kd.distillation_loss((base * 1)[cut], teacher[cut], inplace=True).backward()
    with backends.use("native"):
        _, gradient = gradient_of(student[cut], teacher[cut])
    assert_near("gradient", base.grad[cut], gradient, 1e-6)


@EACH_KIND
@pytest.mark.parametrize(("width", "dtype", "noise"), [(603, torch.bfloat16, 1.0), (608, torch.float32, 1e-2)], ids=str)
def test_inplace(divergence, width, dtype, noise):
    student, teacher = logits_pair(2, width, dtype=dtype, noise=noise)
    options = {"divergence": divergence, "ce_weight": 0.5, "temperature": 2.0, "student_softcap": 9.0}
    labels = torch.tensor([0, 602])
    expected, expected_gradient = gradient_of(student, teacher, labels, **options)
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf * 1, teacher, labels, inplace=True, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(leaf.grad, expected_gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_rows(dtype):
    values, _ = logits_pair(70, 1100, dtype=dtype)
    for factors, rows in ((torch.ones(70), []), (torch.where(torch.arange(70) == 67, 0.3, 1.0), [67])):
        out, inplace = torch.empty_like(values), values.clone()
        triton.scale_rows(values, factors, out)
        triton.scale_rows(inplace, factors, inplace)
        assert torch.equal(inplace, out)
        others = [row for row in range(70) if row not in rows]
        assert torch.equal(out[others], values[others])
        if rows:
            assert_rounded("scaled", out[rows], values[rows].double() * factors[rows, None].double(), 1e-6)
    triton.scale_rows(values, torch.tensor(0.5).expand(70), out)
    assert torch.equal(out, values * 0.5)
    view = values.view(7, 10, 1100)[:, :9]
    into = view.clone()
    triton.scale_rows(view, torch.tensor(2.0).expand(7, 9), view)
    assert torch.equal(view, into * 2)


def test_retained_graphs_and_repeated_runs_agree_bitwise():
    student, teacher = logits_pair(2, 603)
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, divergence="jensen_shannon")
    first = torch.autograd.grad(loss * 3, leaf, retain_graph=True)[0]
    second = torch.autograd.grad(loss * 3, leaf)[0]
    assert torch.equal(first, second)
    assert torch.equal(gradient_of(student, teacher, divergence="jensen_shannon")[0], loss)


def test_float64_is_refused():
    student, teacher = logits_pair(2, 10, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="compute in fp32, but student_logits is float64"):
        kd.distillation_loss(student, teacher)


def test_offsets_beyond_32_bits():
    student, teacher = logits_pair(2, 603, dtype=torch.bfloat16)
    far = torch.empty(2**31 + 2000, dtype=torch.bfloat16).as_strided(
        (2, 603), (2**31 + 3, 1)
    )  # rows lie to 16 bytes as the others do
    far.copy_(student)
    loss, gradient = gradient_of(student, teacher)
    leaf = far.requires_grad_()
    actual = kd.distillation_loss(leaf, teacher)
    assert torch.equal(actual, loss)
    assert torch.equal(torch.autograd.grad(actual, leaf)[0], gradient)
