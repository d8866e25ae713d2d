"""The C++ CPU kernels of the decoupled family against the reference in fp64."""

import functools
import os

import checks
import pytest
import torch
from checks import BOUNDS, against_reference, assert_near, logits_pair, masked_pair
from decoupled_cases import FAMILY, labels_for, light_weak_set, mask_of, tied
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels import ops

EACH = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
FEW = {name: FAMILY[name] for name in ("dkd_2_0.5", "top_5", "cakd_top_p", "given", "adaptive_kl")}
EACH_OF_FEW = pytest.mark.parametrize("make", FEW.values(), ids=FEW)
DECOUPLED = {name: make for name, make in FAMILY.items() if not name.startswith("adaptive")}
EACH_DECOUPLED = pytest.mark.parametrize("make", DECOUPLED.values(), ids=DECOUPLED)
EACH_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
TWO_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# A warm fp64 reference keeps 1e-12 of a divergence that is itself small: it is a difference of logarithms.
FP64_SLACK = 10.0


def compare(student, teacher, make, labels=None, **options):
    slack = FP64_SLACK if student.dtype == torch.float64 else 1.0
    labels = labels_for(student.shape[0], student.shape[-1]) if labels is None else labels
    against_reference(student, teacher, labels, divergence=make(student.shape[-1]), slack=slack, **options)


gradient_of = functools.partial(checks.gradient_of, reduction="none")


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("width", [1, 7, 1000, 4099])
def test_widths(make, dtype, width):
    compare(*logits_pair(5, width, dtype=dtype), make, reduction="sum")


@EACH_OF_FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_blocks(capability, make, dtype):
    compare(*logits_pair(2, 32000, dtype=dtype), make, reduction="sum")


@EACH
@TWO_DTYPES
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 20.0])
def test_temperatures(make, dtype, temperature):
    compare(*logits_pair(5, 1501, dtype=dtype), make, temperature=temperature, reduction="sum")


@EACH
@TWO_DTYPES
def test_instruction_sets(capability, make, dtype):
    options = {"temperature": 1.7, "ce_weight": 0.5, "student_softcap": 6.0, "teacher_logit_scale": 0.7}
    labels = torch.tensor([0, 2098, -100, 17])
    compare(*logits_pair(4, 2099, dtype=dtype), make, labels, reduction="sum", **options)


@EACH
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("width", [50, 5003])
def test_models_that_nearly_agree(make, noise, width):
    compare(*logits_pair(4, width, noise=noise), make)


@EACH
def test_teacher_is_student(capability, make):
    student, _ = logits_pair(3, 3003)
    loss, gradient = gradient_of(student, student.clone(), labels_for(3, 3003), divergence=make(3003), temperature=1.3)
    assert loss.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-9


# S by the label, or by a mask: adaptive KL and top-p go by masses that are 0 or 1 here but for rounding.
@pytest.mark.parametrize("name", [name for name in DECOUPLED if "top_p" not in name])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits(capability, name, scale):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * (2 * torch.rand(6, 513, generator=generator) - 1) for _ in range(2))
    teacher[3:] = student[3:]
    teacher[4, ::2] += 1.0
    compare(student, teacher, FAMILY[name])


def test_a_sure_teacher_keeps_the_rest(capability):
    # P_W = e^-1000: what DKD is for. Its WCD is that of the other tokens alone.
    student, teacher = logits_pair(4, 1000)
    labels = labels_for(4, 1000)
    teacher[torch.arange(4), labels] = 1000.0
    against_reference(student, teacher, labels, divergence=kd.DKD(), reduction="sum")
    _, stats = kd.distillation_loss(student, teacher, labels, divergence=kd.DKD(), return_stats=True)
    others = torch.ones(4, 1000, dtype=torch.bool).scatter(1, labels[:, None], False)
    p, q = teacher[others].view(4, -1).double(), student[others].view(4, -1).double()
    assert_near("wcd", stats.wcd, kd.reference.divergence(p.log_softmax(-1), q.log_softmax(-1), "forward_kl"), 2e-6)


@pytest.mark.parametrize("gap", [4.0, 16.0])
@pytest.mark.parametrize("strong", ["given", "top_k", "top_p"])
def test_all_weights_one_are_forward_kl(capability, gap, strong):
    student, teacher = light_weak_set(4, 3000, 3, gap)
    sets = {"given": kd.Given(torch.arange(3000) < 3), "top_k": kd.TopK(3), "top_p": kd.TopP(0.9)}
    loss, gradient = gradient_of(student, teacher, divergence=kd.Decoupled(sets[strong]), temperature=1.2)
    exact = student.double().requires_grad_()
    expected = kd.reference.distillation_loss(exact, teacher.double(), temperature=1.2, reduction="none")
    expected.sum().backward()
    assert_near("loss", loss, expected, 1e-6)
    assert_near("gradient", gradient, exact.grad, 1e-6)


@EACH_DTYPE
@pytest.mark.parametrize("k", [1, 2, 37, 1000, 2999, 3000])
def test_ties_enter_as_a_whole(capability, dtype, k):
    student, teacher = tied(3, 3000)
    teacher[1] = teacher[1] + torch.arange(3000) * 1e-3
    against_reference(
        student.to(dtype), teacher.to(dtype), divergence=kd.Decoupled(kd.TopK(k), 1.0, 2.0, 0.5),
        reduction="sum", slack=FP64_SLACK if dtype == torch.float64 else 1.0,
    )  # fmt: skip


def selection_rows() -> torch.Tensor:  # (6, 20011)
    """Distributions that a search by samples could stumble over."""
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(6, 20011, generator=generator)
    rows[1] = rows[1].sort().values
    rows[2] = rows[2].sort(descending=True).values * 3
    rows[3] = rows[3].bfloat16().float()
    rows[4, 100:] = -torch.inf
    rows[5] = torch.finfo(torch.float32).min / 2
    rows[5, ::40] = torch.randn(501, generator=generator)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 32, 99, 101, 158, 400, 1024, 10000, 20010, 20011])
def test_top_k_is_exact(capability, dtype, k):
    teacher = selection_rows().to(dtype)
    _, stats = kd.distillation_loss(
        torch.zeros_like(teacher), teacher, divergence=kd.Decoupled(kd.TopK(k)), return_stats=True
    )
    # A student of equal logits counts: its mass of S is the number of S's tokens.
    strong = teacher >= teacher.topk(k, -1).values[:, -1:]
    assert ((stats.strong_mass_student * 20011).round() == strong.sum(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mass", [0.003, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_top_p_is_the_smallest_threshold_set(capability, dtype, mass):
    teacher = selection_rows().to(dtype)
    _, stats = kd.distillation_loss(
        torch.zeros_like(teacher), teacher, divergence=kd.Decoupled(kd.TopP(mass)), temperature=1.4, return_stats=True
    )
    p = (teacher.double() / 1.4).softmax(-1)
    tokens = (stats.strong_mass_student.double() * 20011).round().long()
    if mass == 1:
        assert (tokens == 20011).all()
        return
    edge = teacher.sort(-1, descending=True).values.gather(-1, tokens[:, None] - 1)
    strong = teacher >= edge
    assert (strong.sum(-1) == tokens).all()
    held, without_edge = (p * strong).sum(-1), (p * (teacher > edge)).sum(-1)
    slack = 1e-6 if dtype == torch.float32 else 1e-12
    assert (held >= mass - slack).all()
    assert (without_edge < mass + slack).all()


@EACH
def test_tokens_masked_in_both_models_contribute_nothing(capability, make):
    student, teacher = masked_pair(both=[0, 5, 1001, 1002])
    labels = torch.tensor([1, 7, 500, 1000])
    compare(student, teacher, make, labels)
    _, gradient = gradient_of(student, teacher, labels, divergence=make(1003))
    assert (gradient[:, [0, 5, 1001, 1002]] == 0).all()


@EACH_DECOUPLED
def test_tokens_masked_in_the_teacher_are_as_unlikely_as_it_says(make):
    student, teacher = masked_pair(teacher_only=[3, 500])
    compare(student, teacher, make, torch.tensor([3, 7, 500, 1000]))


@pytest.mark.parametrize("mass_weighted", [True, False])
@pytest.mark.parametrize("empty_in", ["student", "teacher", "both"])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(3, 20), slice(20, None)])
def test_a_set_without_mass(capability, mass_weighted, empty_in, columns):
    student, teacher = logits_pair(3, 1003)
    if empty_in in ("student", "both"):
        student[:, columns] = -torch.inf
    if empty_in in ("teacher", "both"):
        teacher[:, columns] = -torch.inf
    mask = torch.zeros(1003, dtype=torch.bool)
    mask[columns] = True
    for which in (mask, ~mask):
        divergence = kd.Decoupled(kd.Given(which), 1.0, 2.0, 3.0, mass_weighted=mass_weighted)
        loss, gradient = gradient_of(student, teacher, divergence=divergence)
        if empty_in == "student":
            assert (loss == torch.inf).all()
        else:
            against_reference(student, teacher, divergence=divergence)
        assert torch.isfinite(gradient).all()
        off = kd.Decoupled(kd.Given(which), 0.0, *((0.0, 1.0) if which is mask else (1.0, 0.0)))
        against_reference(student, teacher, divergence=off)


@EACH
def test_nan_stays_in_its_row(capability, make):
    labels = labels_for(3, 3003)
    for side in (0, 1):
        for column, value in ((0, torch.nan), (1500, torch.inf), (3002, torch.nan), (slice(None), torch.nan)):
            pair = logits_pair(3, 3003)
            pair[side][1, column] = value
            leaf = pair[0].clone().requires_grad_()
            loss, stats = kd.distillation_loss(
                leaf, pair[1], labels, divergence=make(3003), reduction="none", return_stats=True
            )
            loss.sum().backward()
            assert loss.isnan().tolist() == [False, True, False]
            assert leaf.grad[1].isnan().all()
            assert not leaf.grad[[0, 2]].isnan().any()
            for stat in stats:
                assert stat is None or stat.isnan().tolist() == [False, True, False]


def test_a_label_out_of_range_makes_its_row_nan():
    student, teacher = logits_pair(3, 100)
    scale = torch.ones(3)
    arguments = (student, teacher, torch.tensor([5, 100, -3]), scale, None, None, None, "native", "decoupled")
    options = ([1.0, 1.0, 1.0, 1.0], "label", 0.0, 1.0, 1.0, 0.0, True, 100, 1.0, 0.0, 1.0, 0.0, "", True, True, False)
    loss, stats, gradient = ops.row_loss(*arguments, *options)
    assert loss.isnan().tolist() == [False, True, True]
    assert stats[:, 1:].isnan().all()
    assert gradient[1:].isnan().all()
    assert not gradient[0].isnan().any()


LABELS = torch.tensor([[3, -100, 0, 999], [-100, 5, 5, -100], [17, 2, -100, 1]])


@EACH_OF_FEW
@EACH_DTYPE
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_weights_and_reductions(make, dtype, reduction):
    student, teacher = logits_pair(3, 4, 1000, dtype=dtype)
    weight = torch.tensor([[1.0, 2.0, 0.5, 0.0], [1.0, 0.0, 3.0, 1.0], [0.25, 1.0, 1.0, 1.0]])
    options = {"reduction": reduction, "temperature": 2.5}
    compare(student, teacher, make, LABELS, kd_weight=0.7, ce_weight=0.3, **options)
    compare(student, teacher, make, LABELS, weight=weight, **options)


@EACH_OF_FEW
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, torch.linspace(0.2, 5.0, 12).view(3, 4)], ids=["1", "per row"])
@pytest.mark.parametrize("scale_by_temperature", [True, False])
def test_temperature_per_row(make, ce_weight, temperature, scale_by_temperature):
    compare(
        *logits_pair(3, 4, 1000), make, LABELS, temperature=temperature, ce_weight=ce_weight,
        scale_by_temperature=scale_by_temperature,
    )  # fmt: skip


def test_cross_entropy_alone():
    student, teacher = logits_pair(3, 4, 1000)
    for temperature in (1.0, 2.0):
        options = {"kd_weight": 0.0, "ce_weight": 1.0, "temperature": temperature}
        against_reference(student, teacher, LABELS, divergence=kd.DKD(), **options)
    student[:, :, 500] = -torch.inf  # nothing of an infinite divergence leaks into it
    loss, gradient = gradient_of(student, teacher, LABELS, divergence=kd.DKD(), kd_weight=0.0, ce_weight=1.0)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@EACH_OF_FEW
@EACH_DTYPE
@pytest.mark.parametrize("widths", [(1000, 1000), (1024, 1001), (1000, 1064)])
def test_vocab_size_with_unequal_widths(make, dtype, widths):
    student, _ = logits_pair(5, widths[0], dtype=dtype)
    _, teacher = logits_pair(5, widths[1], dtype=dtype, seed=1)
    student[:, 1000:] = torch.nan
    teacher[:, 1000:] = torch.inf
    labels = torch.tensor([0, 999, -100, 5, 5])
    against_reference(
        student, teacher, labels, divergence=make(1000), vocab_size=1000, ce_weight=0.5, reduction="sum", slack=10.0
    )
    _, gradient = gradient_of(student, teacher, labels, divergence=make(1000), vocab_size=1000)
    assert (gradient[:, 1000:] == 0).all()


@EACH_OF_FEW
@EACH_DTYPE
def test_logit_transforms(capability, make, dtype):
    options = {"student_logit_scale": 2.0, "student_softcap": 5.0, "teacher_logit_scale": 0.5, "teacher_softcap": 30.0}
    compare(
        *logits_pair(3, 4, 1003, dtype=dtype), make, LABELS, ce_weight=0.5, temperature=1.5, reduction="sum", **options
    )


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "transposed rows": lambda x: x.transpose(0, 1),
    "narrowed columns": lambda x: x[..., 3:1001],
    "rows backwards in memory": lambda x: x.permute(1, 0, 2)[1:, 1:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@EACH_OF_FEW
def test_views_are_read_where_they_lie(view, make):
    student, teacher = (view(x) for x in logits_pair(3, 5, 1003))
    labels = torch.randint(0, 998, student.shape[:-1], generator=torch.Generator().manual_seed(1))
    compare(student, teacher, make, labels, reduction="sum")


@EACH_DTYPE
@EACH_OF_FEW
def test_inplace_gives_the_same_gradient(make, dtype):
    student, teacher = logits_pair(3, 4, 1003, dtype=dtype)
    options = {"divergence": make(1003), "ce_weight": 0.5, "temperature": 2.0}
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    kd.distillation_loss(one, teacher, LABELS, **options).backward()
    kd.distillation_loss(two * 1, teacher, LABELS, inplace=True, **options).backward()
    assert torch.equal(two.grad, one.grad)


def test_masks_of_any_layout():
    student, teacher = logits_pair(3, 4, 1003)
    generator = torch.Generator().manual_seed(2)
    wide = torch.rand(3, 5, 2010, generator=generator) < 0.2
    masks = [
        mask_of(1003),
        wide[:, :4, :1003],
        wide[:, 1:, 7:1010],
        wide[:1, :1, :1003].expand(3, 4, 1003),
        wide.transpose(0, 1)[:4, :, :1003].transpose(0, 1),
        (torch.rand(4, 3, 1003, generator=generator) < 0.2).transpose(0, 1),
    ]
    for mask in masks:
        against_reference(student, teacher, divergence=kd.Decoupled(kd.Given(mask), 1.0, 2.0, 0.5))


@EACH
@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100)])
def test_no_rows(make, shape):
    leaf = torch.empty(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    loss = kd.distillation_loss(leaf * 1, torch.empty(shape), labels, divergence=make(100))
    loss.backward()
    assert loss == 0
    assert leaf.grad.shape == shape


@EACH_OF_FEW
def test_no_row_counts(make):
    student, teacher = logits_pair(4, 100)
    student[0], teacher[1] = torch.nan, torch.inf
    loss, gradient = gradient_of(student, teacher, torch.full((4,), -100), divergence=make(100), ce_weight=0.5)
    assert (loss == 0).all()
    assert (gradient == 0).all()


@EACH
@TWO_DTYPES
@pytest.mark.parametrize("form_gradient", [False, True])
def test_stats(make, dtype, form_gradient):
    student, teacher = logits_pair(3, 4, 1000, dtype=dtype)
    options = {"divergence": make(1000), "ce_weight": 0.5, "temperature": 2.0, "kd_weight": 3.0}
    leaf = student.clone().requires_grad_(form_gradient)
    loss, stats = kd.distillation_loss(leaf, teacher, LABELS, return_stats=True, **options)
    expected_loss, expected = kd.reference.distillation_loss(
        student.double(), teacher.double(), LABELS, return_stats=True, **options
    )
    bound = 1e-11 if dtype == torch.float64 else 2e-6
    assert_near("loss", loss, expected_loss, bound)
    for name, actual, want in zip(stats._fields, stats, expected, strict=True):
        if want is None:
            assert actual is None, name
            continue
        # A set of one token has a term of 0, which the reference misses by its rounding.
        assert_near(name, actual, want, bound, floor=1e-10)
        assert (actual[LABELS == -100] == 0).all()


def test_weights_may_be_tensors():
    student, teacher = logits_pair(4, 1000)
    for dtype in (torch.float32, torch.float64):
        numbers = kd.Decoupled(kd.TopK(4), 0.5, 2.0, 3.0, mass_weighted=False)
        tensors = kd.Decoupled(
            kd.TopK(4), torch.tensor(0.5), 2.0, torch.tensor(3.0, dtype=torch.float64), mass_weighted=False
        )
        one = gradient_of(student.to(dtype), teacher, divergence=numbers)
        other = gradient_of(student.to(dtype), teacher, divergence=tensors)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@EACH_DECOUPLED
def test_gradcheck_of_the_kernels(make):
    student, teacher = logits_pair(3, 7, dtype=torch.float64)
    labels = torch.tensor([0, -100, 6])

    def loss(z):
        return kd.distillation_loss(
            z, teacher, labels, divergence=make(7), temperature=1.7, ce_weight=0.3, student_softcap=4.0,
            reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize("strong", ["label", "top_k", "top_p", "given"])
def test_opcheck_row_loss(strong):
    student, teacher = logits_pair(2, 5, 100)
    labels = torch.tensor([0, 5, 99, 3, 2]).expand(2, 5)
    amount = {"top_k": 7.0, "top_p": 0.4}.get(strong, 0.0)
    mask = mask_of(100) if strong == "given" else None
    weights = torch.tensor([1.0, 2.0, 0.5])
    tensors = (student.requires_grad_(), teacher, labels, torch.rand(2, 5), None, weights, mask)
    options = (
        [0.0, 0.0, 0.0, 1.0], strong, amount, 1.5, 0.7, 0.5, True, 100, 1.0, 0.0, 1.0, 0.0, "", True, True, False,
    )  # fmt: skip
    torch.library.opcheck(ops.row_loss, (*tensors, "native", "decoupled", *options))


def test_compiled_weights_change_without_a_recompile():
    torch._dynamo.reset()
    student, teacher = logits_pair(5, 100)
    labels = labels_for(5, 100)

    def step(z, alpha, beta):
        return kd.distillation_loss(z, teacher, labels, divergence=kd.DKD(alpha, beta), temperature=2.0)

    compiled = torch.compile(step, fullgraph=True)
    for alpha, beta in ((1.0, 8.0), (0.5, 2.0), (0.0, 1.0)):
        weights = (torch.tensor(alpha), torch.tensor(beta))
        one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
        with torch.compiler.set_stance("default" if alpha == 1.0 else "fail_on_recompile"):
            loss = compiled(one, *weights)
        expected = step(two, alpha, beta)
        loss.backward()
        expected.backward()
        assert_near("loss", loss, expected, 1e-6)
        assert_near("gradient", one.grad, two.grad, 1e-6)


@pytest.mark.parametrize("name", ["top_5", "cakd_top_p", "given"])
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    student, teacher = logits_pair(5, 100)
    divergence = FAMILY[name](100)

    def step(z):
        loss, stats = kd.distillation_loss(z, teacher, divergence=divergence, return_stats=True)
        return loss, stats.bcd

    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    actual, expected = torch.compile(step, fullgraph=True)(one), step(two)
    assert_near("bcd", actual[1], expected[1], 1e-6)
    actual[0].backward()
    expected[0].backward()
    assert_near("gradient", one.grad, two.grad, 1e-6)


def test_a_wrong_gradient_of_these_losses_fails():
    student, teacher = logits_pair(4, 1000)
    _, gradient = gradient_of(student, teacher, labels_for(4, 1000), divergence=kd.DKD())
    _, without_tckd = gradient_of(student, teacher, labels_for(4, 1000), divergence=kd.DKD(alpha=0.0))
    for wrong in (torch.zeros_like(gradient), without_tckd, 2 * gradient):
        with pytest.raises(AssertionError):
            assert_near("gradient", wrong, gradient, 2e-6)


CALLS = settings(max_examples=int(os.environ.get("KDKERNELS_EXAMPLES", "60")), deadline=None)


@st.composite
def rows_with_sets(draw):
    rows, width = draw(st.integers(1, 5)), draw(st.integers(2, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.01, 1.0, 5.0, 100.0]))
    student, teacher = (spread * torch.randn(rows, width, generator=generator) for _ in range(2))
    strong = draw(
        st.sampled_from(
            [
                kd.Label(),
                kd.TopK(draw(st.integers(1, width))),
                kd.TopP(draw(st.floats(0.01, 1.0))),
                kd.Given(torch.rand(rows, width, generator=generator) < 0.4),
            ]
        )
    )
    labels = torch.randint(0, width, (rows,), generator=generator)
    return student, teacher, labels, strong, draw(st.sampled_from([0.5, 1.0, 3.0]))


@CALLS
@given(rows_with_sets())
def test_terms_and_masses_are_what_they_should_be(case):
    student, teacher, labels, strong, temperature = case
    options = {"temperature": temperature, "reduction": "none", "return_stats": True}
    _, stats = kd.distillation_loss(student, teacher, labels, divergence=kd.Decoupled(strong), **options)
    for mass in (stats.strong_mass_teacher, stats.strong_mass_student):
        assert ((mass >= 0) & (mass <= 1)).all()
    for term in (stats.bcd, stats.scd, stats.wcd):
        assert (term >= 0).all()
    p, q = (teacher.double() / temperature).log_softmax(-1), (student.double() / temperature).log_softmax(-1)
    assert_near("sum", stats.divergence, kd.reference.divergence(p, q, "forward_kl"), 1e-6, floor=1e-6)
