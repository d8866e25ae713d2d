"""Every argument of distillation_loss, fused against the reference."""

import pytest
import torch
from checks import BOUNDS, TRANSFORMS, against_reference, assert_near, logits_pair

import kdkernels as kd

LABELS = torch.tensor([[3, -100, 0, 999], [-100, 5, 5, -100], [17, 2, -100, 1]])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_weights_and_reductions(dtype, reduction, temperature, weighted):
    student, teacher = logits_pair(3, 4, 1000, dtype=dtype)
    weight = torch.tensor([[1.0, 2.0, 0.5, 0.0], [1.0, 0.0, 3.0, 1.0], [0.25, 1.0, 1.0, 1.0]]) if weighted else None
    against_reference(
        student,
        teacher,
        LABELS,
        reduction=reduction,
        temperature=temperature,
        weight=weight,
        kd_weight=0.7,
        ce_weight=0.3,
    )
    against_reference(student, teacher, LABELS, reduction=reduction, temperature=temperature, weight=weight)


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "total_variation"])
@pytest.mark.parametrize("scale_by_temperature", [True, False])
def test_temperature_per_row(divergence, ce_weight, scale_by_temperature):
    student, teacher = logits_pair(3, 4, 1000)
    temperature = torch.tensor([[0.1, 0.5, 1.0, 2.0], [3.0, 1.0, 20.0, 1.5], [1.0, 1.1, 7.0, 0.9]])
    options = {"divergence": divergence, "ce_weight": ce_weight, "scale_by_temperature": scale_by_temperature}
    against_reference(student, teacher, LABELS, temperature=temperature, **options)
    against_reference(student, teacher, LABELS, temperature=torch.tensor(1.7), **options)


def test_scale_by_temperature_multiplies_loss_and_gradient():
    student, teacher = logits_pair(5, 100)
    losses, gradients = [], []
    for scaled in (True, False):
        leaf = student.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, teacher, temperature=3.0, scale_by_temperature=scaled)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    assert_near("loss", losses[0], 9 * losses[1], 1e-6)
    assert_near("gradient", gradients[0], 9 * gradients[1], 1e-6)


@pytest.mark.parametrize("normalizer", [7, 2.5, torch.tensor(7), torch.tensor(3.0), 0, torch.tensor(0)])
def test_normalizer_replaces_the_denominator(normalizer):
    student, teacher = logits_pair(3, 4, 100)
    labels = LABELS.clamp(max=99)
    against_reference(student, teacher, labels, normalizer=normalizer, ce_weight=0.5)
    if float(normalizer):
        total = kd.distillation_loss(student, teacher, labels, reduction="sum")
        mean = kd.distillation_loss(student, teacher, labels, normalizer=normalizer)
        assert_near("mean", mean, total / float(normalizer), 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(reduction):
    student, teacher = logits_pair(4, 100)
    leaf = student.requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, torch.full((4,), -100), ce_weight=0.5, reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100), (0, 3, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(shape, reduction, inplace):
    leaf = torch.empty(shape, requires_grad=True)
    loss = kd.distillation_loss(leaf * 1, torch.empty(shape), reduction=reduction, inplace=inplace)
    loss.sum().backward()
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert (loss == 0).all()
    assert leaf.grad.shape == shape


def test_one_dimension_is_one_row():
    student, teacher = logits_pair(1000)
    against_reference(student, teacher, torch.tensor(5), ce_weight=0.5, reduction="none")


def test_ignored_rows_are_not_read(capability):
    # NaN there would be NaN here; so would the memory of a row that does not exist.
    student, teacher = logits_pair(3, 4, 1000)
    student[LABELS == -100] = torch.nan
    teacher[LABELS == -100] = torch.inf
    against_reference(student, teacher, LABELS, ce_weight=0.5)
    weight = (LABELS != -100).float()
    against_reference(student, teacher, weight=weight, divergence="jensen_shannon")


def test_ignore_index():
    student, teacher = logits_pair(3, 100)
    labels = torch.tensor([1, 0, 2])
    loss = kd.distillation_loss(student, teacher, labels, ignore_index=0, reduction="none")
    assert (loss == 0).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("widths", [(1000, 1000), (1024, 1001), (1000, 1064)])
def test_vocab_size_with_unequal_widths(capability, dtype, widths):
    student, _ = logits_pair(5, widths[0], dtype=dtype)
    _, teacher = logits_pair(5, widths[1], dtype=dtype, seed=1)
    # Padding may hold anything at all.
    student[:, 1000:] = torch.nan
    teacher[:, 1000:] = torch.inf
    labels = torch.tensor([0, 999, -100, 5, 5])
    against_reference(student, teacher, labels, vocab_size=1000, ce_weight=0.5, reduction="sum")
    leaf = student.clone().requires_grad_()
    kd.distillation_loss(leaf, teacher, vocab_size=1000).backward()
    assert (leaf.grad[:, 1000:] == 0).all()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("options", TRANSFORMS, ids=lambda options: "-".join(options))
def test_logit_transforms(capability, dtype, options):
    student, teacher = logits_pair(3, 4, 1003, dtype=dtype)
    for divergence in ("forward_kl", "jensen_shannon"):
        against_reference(
            student, teacher, LABELS, divergence=divergence, ce_weight=0.5, temperature=1.5, reduction="sum", **options
        )


def test_softcap_of_a_masked_token_is_the_cap():
    student, teacher = logits_pair(2, 100)
    student[:, 3] = -torch.inf
    against_reference(student, teacher, student_softcap=3.0)


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stats(ce_weight, temperature):
    student, teacher = logits_pair(3, 4, 1000)
    options = {"ce_weight": ce_weight, "temperature": temperature, "divergence": "jensen_shannon", "kd_weight": 3.0}
    loss, stats = kd.distillation_loss(student.requires_grad_(), teacher, LABELS, return_stats=True, **options)
    expected_loss, expected = kd.reference.distillation_loss(
        student.double(), teacher.double(), LABELS, return_stats=True, **options
    )
    assert_near("loss", loss, expected_loss, 2e-6)
    for name, actual, want in zip(stats._fields, stats, expected, strict=True):
        if want is None:
            assert actual is None, name
            continue
        assert_near(name, actual, want, 2e-6)
        assert not actual.requires_grad
        assert (actual[LABELS == -100] == 0).all()
    assert (stats.cross_entropy is None) == (ce_weight == 0)


def test_cross_entropy_alone():
    student, teacher = logits_pair(3, 4, 1000)
    for temperature in (1.0, 2.0):
        against_reference(student, teacher, LABELS, kd_weight=0.0, ce_weight=1.0, temperature=temperature)
    # Nothing of an infinite divergence leaks into it.
    student[:, :, 500] = -torch.inf
    loss = kd.distillation_loss(student, teacher, LABELS, kd_weight=0.0, ce_weight=1.0)
    assert torch.isfinite(loss)


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "transposed rows": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[:, ::2],
    "narrowed columns": lambda x: x[..., 3:1001],
    "expanded": lambda x: x[:1].expand(6, *x.shape[1:]),
    "rows backwards in memory": lambda x: x.permute(1, 0, 2)[1:, 1:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_are_read_where_they_lie(view, dtype):
    student, teacher = logits_pair(3, 5, 1003, dtype=dtype)
    against_reference(view(student), view(teacher), divergence="reverse_kl", reduction="sum")
    against_reference(view(student), view(teacher).contiguous(), reduction="sum")


def test_more_runs_of_rows_than_the_kernels_count():
    student, teacher = logits_pair(3, 3, 3, 3, 3, 20)
    cut = (slice(None, 2),) * 5
    against_reference(student[cut], teacher[cut])
    base = student.clone().requires_grad_()
    logits = (base * 1)[cut]
    kd.distillation_loss(logits, teacher[cut], inplace=True).backward()
    other = student.clone().requires_grad_()
    kd.distillation_loss(other[cut], teacher[cut]).backward()
    assert torch.equal(base.grad, other.grad)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "alpha_beta"])
@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_inplace_gives_the_same_gradient_in_the_logits_memory(dtype, divergence, noise):
    student, teacher = logits_pair(3, 4, 1003, dtype=dtype, noise=noise)
    options = {"divergence": divergence, "ce_weight": 0.5, "temperature": 2.0, "student_softcap": 9.0}
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = kd.distillation_loss(one, teacher, LABELS, **options)
    expected.backward()
    logits = two * 1
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss = kd.distillation_loss(logits, teacher, LABELS, inplace=True, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(two.grad, one.grad)
    assert seen == [logits.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inplace_reads_the_logits_before_it_overwrites_them(dtype):
    # Whole blocks of plain logits, whose cross-entropy has a softmax of its own.
    student, teacher = logits_pair(2, 4096, dtype=dtype)
    labels = torch.tensor([5, 4000])
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    kd.distillation_loss(one, teacher, labels, ce_weight=0.5, temperature=2.0).backward()
    kd.distillation_loss(two * 1, teacher, labels, ce_weight=0.5, temperature=2.0, inplace=True).backward()
    assert torch.equal(one.grad, two.grad)


def test_inplace_without_gradient_leaves_the_logits_alone():
    student, teacher = logits_pair(4, 100)
    before = student.clone()
    kd.distillation_loss(student, teacher, inplace=True)
    assert torch.equal(student, before)


def test_module_is_the_function():
    student, teacher = logits_pair(3, 4, 1000)
    module = kd.DistillationLoss(divergence=kd.SkewReverseKL(0.2), temperature=2.0, ce_weight=0.3, return_stats=True)
    loss, stats = module(student, teacher, LABELS, normalizer=5)
    expected = kd.distillation_loss(
        student, teacher, LABELS, divergence=kd.SkewReverseKL(0.2), temperature=2.0, ce_weight=0.3, normalizer=5
    )
    assert torch.equal(loss, expected)
    assert isinstance(stats, kd.RowStats)
    warmer = module(student, teacher, LABELS, temperature=4.0)[0]
    assert torch.equal(
        warmer,
        kd.distillation_loss(
            student, teacher, LABELS, divergence=kd.SkewReverseKL(0.2), temperature=4.0, ce_weight=0.3
        ),
    )
    assert "temperature=2.0" in repr(module)


def test_offsets_beyond_32_bits():
    # Two rows more than 2^31 elements apart; the memory between them is never touched.
    student, teacher = logits_pair(2, 1003, dtype=torch.bfloat16)
    far = torch.empty(2**31 + 2000, dtype=torch.bfloat16).as_strided((2, 1003), (2**31 + 7, 1))
    far.copy_(student)
    near = student.clone().requires_grad_()
    leaf = far.requires_grad_()
    expected = kd.distillation_loss(near, teacher)
    actual = kd.distillation_loss(leaf, teacher)
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual, leaf)
    expected.backward()
    assert torch.equal(gradient, near.grad)
