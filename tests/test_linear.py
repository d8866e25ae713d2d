"""linear_distillation_loss against the reference in fp64 on the same numbers: each gradient, every argument."""

import itertools
import warnings

import pytest
import torch
from checks import DIVERGENCES, TRANSFORMS, assert_near, relative_error
from decoupled_cases import FAMILY, labels_for, mask_of
from linear_cases import (
    BOUNDS,
    NAMES,
    Operands,
    against_reference,
    assert_gradients,
    losses,
    operands,
)

import kdkernels as kd
from kdkernels import backends

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, WIDTH = 37, 300
EACH_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
TWO_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
# In bytes: one row at a time, several chunks of which the last is smaller, all rows at once.
CHUNKS = [1, 5 * WIDTH * 12, 16 * WIDTH * 12, 2**30]
EACH_CHUNK = pytest.mark.parametrize("workspace_bytes", CHUNKS)


def some_labels(*rows: int, width: int = WIDTH, ignored: float = 0.3, seed: int = 1) -> torch.Tensor:
    """Labels (*rows), a part of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, width, rows, generator=generator)
    return torch.where(torch.rand(*rows, generator=generator) < ignored, -100, labels)


LABELS = some_labels(ROWS)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@EACH_DTYPE
def test_divergences(divergence, dtype):
    given = operands(ROWS, dtype=dtype, bias=True)
    against_reference(given, divergence=divergence, workspace_bytes=CHUNKS[1])
    options = {"temperature": 2.5, "ce_weight": 0.3, "kd_weight": 0.7, "reduction": "none"}
    against_reference(given, LABELS, divergence=divergence, **options)


@pytest.mark.parametrize("divergence", FAMILY.values(), ids=FAMILY)
@TWO_DTYPES
def test_decoupled_and_adaptive(divergence, dtype):
    given = operands(ROWS, dtype=dtype, bias=True)
    labels = torch.where(LABELS < 0, LABELS, labels_for(ROWS, WIDTH))
    for temperature, workspace_bytes in ((1.0, CHUNKS[1]), (2.0, None)):
        # A strong set without a label's own mass has digits of its own: see tests/test_decoupled_native.py.
        against_reference(
            given, labels, divergence=divergence(WIDTH), temperature=temperature, workspace_bytes=workspace_bytes
        )


@EACH_DTYPE
@pytest.mark.parametrize("teacher_logits", [False, True])
@pytest.mark.parametrize(("bias", "teacher_bias"), [(False, False), (True, False), (False, True), (True, True)])
def test_teachers_and_biases(dtype, teacher_logits, bias, teacher_bias):
    for teacher_hidden in (24, 64):
        given = operands(
            ROWS, dtype=dtype, bias=bias, teacher_bias=teacher_bias, teacher_hidden=teacher_hidden,
            teacher_logits=teacher_logits,
        )  # fmt: skip
        against_reference(given, LABELS, ce_weight=0.5, temperature=2.0)


@TWO_DTYPES
@pytest.mark.parametrize("teacher_logits", [False, True])
@EACH_CHUNK
def test_leading_dimensions(dtype, teacher_logits, workspace_bytes):
    given = operands(3, 7, dtype=dtype, teacher_logits=teacher_logits)
    options = {"ce_weight": 0.5, "workspace_bytes": workspace_bytes}
    against_reference(given, some_labels(3, 7), **options)
    against_reference(given, some_labels(3, 7), reduction="none", **options)
    loss, _ = losses(given, some_labels(3, 7), reduction="none")
    assert loss.shape == (3, 7)


def test_one_dimension_is_one_row():
    given = operands(5)
    one = given._replace(hidden=given.hidden[0], teacher=given.teacher._replace(hidden=given.teacher.hidden[0]))
    of_logits = one._replace(teacher=torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    for reduction, compact in itertools.product(("mean", "none"), (False, True)):
        for single in (one, of_logits, of_logits._replace(teacher=of_logits.teacher.bfloat16())):
            against_reference(single, torch.tensor(3), ce_weight=0.5, reduction=reduction, compact=compact)


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "transposed rows": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[:, ::2],
    "narrowed columns": lambda x: x[..., 3:],
    "expanded": lambda x: x[:1].expand(6, *x.shape[1:]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@TWO_DTYPES
@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
def test_views(view, dtype, workspace_bytes):
    given = operands(3, 7, dtype=dtype, teacher_logits=True)
    options = {"workspace_bytes": workspace_bytes, "reduction": "sum"}
    # The teacher's logits are read where they lie. A narrowed teacher is one of fewer tokens.
    logits = view(given.teacher)
    hidden = torch.randn(*logits.shape[:-1], 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    weight = given.weight[: logits.shape[-1]]
    against_reference(Operands(hidden, weight, None, logits), **options)
    # So are hidden states of either model, and weights.
    given = operands(3, 7, dtype=dtype)
    teacher = kd.LinearTeacher(
        view(given.teacher.hidden), given.teacher.weight[:, : view(given.teacher.hidden).shape[-1]]
    )
    hidden, weight = view(given.hidden), given.weight[:, : view(given.hidden).shape[-1]]
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    expected, exact = losses(Operands(hidden, weight, None, teacher).to(torch.float64).leaves(), reference=True)
    loss = kd.linear_distillation_loss(*leaves, teacher, workspace_bytes=workspace_bytes)
    loss.backward()
    assert_near("loss", loss, expected, 2e-6)
    assert_gradients({"hidden": leaves[0].grad, "weight": leaves[1].grad, "bias": None}, exact)


@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
def test_the_gradient_of_a_view_of_hidden_states(workspace_bytes):
    # As a shifted language model calls it: the last position's hidden state gets a gradient of 0.
    given = operands(3, 7)
    grads = []
    for which, dtype in (
        (kd.linear_distillation_loss, torch.float32),
        (kd.reference.linear_distillation_loss, torch.float64),
    ):
        hidden, weight, _, teacher = given.to(dtype).leaves()
        shifted = kd.LinearTeacher(teacher.hidden[:, :-1], teacher.weight)
        which(hidden[:, :-1], weight, shifted, some_labels(3, 6), workspace_bytes=workspace_bytes).backward()
        grads.append((hidden.grad, weight.grad))
    assert (grads[0][0][:, -1] == 0).all()
    for actual, expected in zip(*grads, strict=True):
        assert_near("gradient", actual, expected, 4e-6)


@pytest.mark.parametrize("hidden", [0, 1, 3, 8, 37, 100, 129])
@TWO_DTYPES
def test_hidden_sizes(hidden, dtype):
    against_reference(operands(11, hidden=hidden, dtype=dtype, bias=True, teacher_hidden=2 * hidden + 1))


@pytest.mark.parametrize("width", [1, 2, 7, 8, 129, 1003])
@TWO_DTYPES
def test_widths(width, dtype):
    # Of one column, the gradient is 0 up to the rounding of a probability of 1.
    against_reference(operands(11, width=width, dtype=dtype, bias=True), floor=0.1 if width == 1 else 0.0)


@EACH_DTYPE
@REDUCTIONS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
def test_labels_weights_and_reductions(dtype, reduction, weighted, workspace_bytes):
    given = operands(ROWS, dtype=dtype, bias=True)
    weight = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) if weighted else None
    if weight is not None:
        weight[5:9] = 0
    options = {"reduction": reduction, "weight": weight, "workspace_bytes": workspace_bytes}
    against_reference(given, LABELS, ce_weight=0.3, **options)
    against_reference(given, LABELS, temperature=2.5, **options)
    against_reference(given, temperature=2.5, **options)


@pytest.mark.parametrize("normalizer", [7, 2.5, torch.tensor(7), torch.tensor(3.0), 0, torch.tensor(0)])
def test_normalizer(normalizer):
    against_reference(operands(ROWS), LABELS, normalizer=normalizer, ce_weight=0.5, workspace_bytes=CHUNKS[1])


def test_ignore_index():
    labels = torch.where(LABELS < 0, 7, LABELS)
    against_reference(operands(ROWS), labels, ignore_index=7, ce_weight=0.5)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("scale_by_temperature", [True, False])
@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
def test_temperatures(divergence, scale_by_temperature, workspace_bytes):
    given = operands(ROWS)
    options = {"divergence": divergence, "scale_by_temperature": scale_by_temperature, "ce_weight": 0.4}
    per_row = 0.5 + 3 * torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    for temperature in (0.5, 20.0, per_row, torch.tensor(1.7)):
        against_reference(given, LABELS, temperature=temperature, workspace_bytes=workspace_bytes, **options)


def test_cross_entropy_alone():
    for temperature in (1.0, 2.0):
        against_reference(operands(ROWS, bias=True), LABELS, kd_weight=0.0, ce_weight=1.0, temperature=temperature)


@pytest.mark.parametrize("options", TRANSFORMS, ids=lambda options: "-".join(options))
@EACH_DTYPE
def test_logit_transforms(options, dtype):
    given = operands(ROWS, dtype=dtype, bias=True)
    for divergence in ("forward_kl", "jensen_shannon"):
        # Softcapped logits are rounded to fp32 before the temperature magnifies their differences.
        against_reference(
            given, LABELS, divergence=divergence, temperature=1.5, ce_weight=0.5, workspace_bytes=CHUNKS[1], slack=4,
            **options,
        )  # fmt: skip


@EACH_DTYPE
@pytest.mark.parametrize("widths", [(300, 300), (304, 301), (301, 364)])
@pytest.mark.parametrize("teacher_logits", [False, True])
@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
def test_vocab_size(dtype, widths, teacher_logits, workspace_bytes):
    width, teacher_width = widths
    given = operands(
        ROWS, width=width, teacher_width=teacher_width, dtype=dtype, bias=True, teacher_bias=True,
        teacher_logits=teacher_logits,
    )  # fmt: skip
    labels = some_labels(ROWS, width=297)
    options = {"vocab_size": 297, "ce_weight": 0.5, "workspace_bytes": workspace_bytes}
    against_reference(given, labels, **options)
    against_reference(given, labels, reduction="none", **options)
    _, gradients = losses(given.leaves(), labels, **options)
    assert (gradients["weight"][297:] == 0).all()
    assert (gradients["bias"][297:] == 0).all()


@TWO_DTYPES
@pytest.mark.parametrize("teacher_dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("teacher_logits", [False, True])
def test_a_teacher_of_another_dtype(dtype, teacher_dtype, teacher_logits):
    given = operands(ROWS, dtype=dtype, bias=True)
    teacher = operands(ROWS, dtype=teacher_dtype, teacher_bias=True, seed=1, teacher_logits=teacher_logits).teacher
    given = given._replace(teacher=teacher)
    for workspace_bytes in (CHUNKS[1], None):
        against_reference(given, LABELS, ce_weight=0.5, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("divergence", ["jensen_shannon", kd.Decoupled(kd.TopK(5)), kd.DKD(), "adaptive_kl"], ids=str)
@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
@pytest.mark.parametrize("compact", [False, True])
@REDUCTIONS
def test_stats(divergence, workspace_bytes, compact, reduction):
    given = operands(3, 7, bias=True)
    labels = some_labels(3, 7)
    options = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 3.0, "reduction": reduction}

    def call(which, given):
        return which(
            given.hidden, given.weight, given.teacher, labels, student_bias=given.bias, return_stats=True,
            workspace_bytes=workspace_bytes, compact=compact, **options,
        )  # fmt: skip

    expected_loss, expected = call(kd.reference.linear_distillation_loss, given.to(torch.float64))
    for leaves in (given, given.leaves()):  # without gradients and with them
        loss, stats = call(kd.linear_distillation_loss, leaves)
        assert_near("loss", loss, expected_loss, 2e-6)
        assert isinstance(stats, kd.RowStats)
        for name, actual, want in zip(stats._fields, stats, expected, strict=True):
            assert (actual is None) == (want is None), name
            if actual is not None:
                assert not actual.requires_grad
                assert_near(name, actual, want, 4e-6, floor=1e-2)
                assert (actual[labels == -100] == 0).all()


def test_stats_without_cross_entropy():
    given = operands(5)
    _, stats = kd.linear_distillation_loss(given.hidden, given.weight, given.teacher, return_stats=True)
    assert stats.cross_entropy is None
    assert stats.bcd is None


@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
@pytest.mark.parametrize("compact", [False, True])
def test_given_masks(workspace_bytes, compact):
    given = operands(3, 7)
    of_row = torch.stack([mask_of(WIDTH, seed) for seed in range(21)]).view(3, 7, WIDTH)
    for mask in (mask_of(WIDTH), of_row, of_row[:, :1].expand(3, 7, WIDTH)):
        divergence = kd.Decoupled(kd.Given(mask), 1.0, 2.0, 0.5)
        for labels in (None, some_labels(3, 7)):
            against_reference(given, labels, divergence=divergence, workspace_bytes=workspace_bytes, compact=compact)


@pytest.mark.parametrize("width", [300, 297])
def test_given_masks_as_wide_as_either_model_or_the_vocabulary(width):
    given = operands(ROWS, width=300, teacher_width=304)
    divergence = kd.Decoupled(kd.Given(mask_of(width)))
    against_reference(given, divergence=divergence, vocab_size=297, workspace_bytes=CHUNKS[1])


def test_term_weights_as_tensors():
    given = operands(ROWS)
    weights = {"bcd": torch.tensor(0.5), "scd": torch.tensor(2.0, dtype=torch.float64), "wcd": 3.0}
    for workspace_bytes in (CHUNKS[1], None):
        against_reference(given, divergence=kd.Decoupled(kd.TopK(5), **weights), workspace_bytes=workspace_bytes)


IGNORED = {"none": 0.0, "some": 0.3, "most": 0.9, "all": 1.1}


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize("workspace_bytes", [1, CHUNKS[1], None])
@REDUCTIONS
@pytest.mark.parametrize("compact", [False, True])
def test_ignored_rows(ignored, workspace_bytes, reduction, compact):
    labels = some_labels(3, 7, ignored=ignored)
    weight = torch.rand(3, 7, generator=torch.Generator().manual_seed(6)) + 0.1
    weight[0, 1] = 0
    for dtype, teacher_logits in ((torch.float32, False), (torch.bfloat16, True)):
        given = operands(3, 7, dtype=dtype, bias=True, teacher_logits=teacher_logits)
        options = {"workspace_bytes": workspace_bytes, "reduction": reduction, "compact": compact, "ce_weight": 0.5}
        temperature = 1 + torch.rand(3, 7, generator=torch.Generator().manual_seed(7))
        against_reference(given, labels, weight=weight, temperature=temperature, **options)
        loss, gradients = losses(given.leaves(), labels, **options)
        assert (gradients["hidden"][labels == -100] == 0).all()
        if ignored > 1:
            assert (loss == 0).all()
            assert (gradients["weight"] == 0).all()
            assert (gradients["bias"] == 0).all()


@REDUCTIONS
def test_compact_gives_the_same(reduction):
    given, labels = operands(ROWS, bias=True), some_labels(ROWS, ignored=0.8)
    options = {"reduction": reduction, "ce_weight": 0.5, "workspace_bytes": CHUNKS[1]}
    loss, gradients = losses(given.leaves(), labels, **options)
    compact_loss, compact_gradients = losses(given.leaves(), labels, compact=True, **options)
    assert_near("loss", compact_loss, loss, 1e-6)
    for name in NAMES:
        assert_near(name, compact_gradients[name], gradients[name], 2e-6)


@pytest.mark.parametrize("teacher_logits", [False, True])
@REDUCTIONS
def test_what_ignored_rows_of_a_teacher_hold_is_not_read(teacher_logits, reduction):
    given, labels = operands(ROWS, teacher_logits=teacher_logits), LABELS
    (given.teacher if teacher_logits else given.teacher.hidden)[labels == -100] = torch.nan
    against_reference(given, labels, ce_weight=0.5, reduction=reduction)


def test_compact_multiplies_no_row_that_does_not_count():
    given, labels = operands(ROWS, bias=True), LABELS
    expected = losses(given.leaves(), labels, compact=True)
    given.hidden[labels == -100] = torch.nan  # times a gradient of 0, NaN in the weight's
    given.teacher.hidden[labels == -100] = torch.inf
    loss, gradients = losses(given.leaves(), labels, compact=True)
    assert torch.equal(loss, expected[0])
    for name in NAMES:
        assert torch.equal(gradients[name], expected[1][name]), name


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 16, 17, 37])
@EACH_CHUNK
@pytest.mark.parametrize("teacher_logits", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks(rows, workspace_bytes, teacher_logits, reduction):
    given = operands(rows, bias=True, teacher_logits=teacher_logits)
    against_reference(given, workspace_bytes=workspace_bytes, reduction=reduction, divergence="jensen_shannon")


@TWO_DTYPES
def test_chunks_change_no_more_than_the_order_of_sums(dtype):
    given = operands(ROWS, dtype=dtype, bias=True)
    loss, gradients = losses(given.leaves(), LABELS, ce_weight=0.5)
    for workspace_bytes in CHUNKS:
        other, theirs = losses(given.leaves(), LABELS, ce_weight=0.5, workspace_bytes=workspace_bytes)
        assert_near("loss", other, loss, 1e-6)
        for name in NAMES:
            # The gradient of the weight is a sum in fp32 over all chunks, rounded once: see test_divergences.
            assert_near(name, theirs[name], gradients[name], 2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)], ids=str)
@REDUCTIONS
@pytest.mark.parametrize("teacher_logits", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_no_rows(rows, reduction, teacher_logits, compact):
    given = operands(*rows, bias=True, teacher_logits=teacher_logits).leaves()
    labels = torch.empty(rows, dtype=torch.int64)
    loss, gradients = losses(given, labels, reduction=reduction, compact=compact, ce_weight=0.5)
    assert loss.shape == (rows if reduction == "none" else ())
    assert (loss == 0).all()
    assert gradients["hidden"].shape == (*rows, 40)
    assert (gradients["weight"] == 0).all()
    assert (gradients["bias"] == 0).all()


def subsets() -> list[tuple[str, ...]]:
    return [which for size in range(4) for which in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("required", subsets(), ids=lambda names: "-".join(names) or "nothing")
@REDUCTIONS
@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
def test_only_what_requires_grad_gets_one(required, reduction, workspace_bytes):
    given = operands(ROWS, bias=True)
    options = {"reduction": reduction, "workspace_bytes": workspace_bytes}
    against_reference(given, LABELS, required=required, **options)
    loss, gradients = losses(given.leaves(required), LABELS, **options)
    assert {name for name, gradient in gradients.items() if gradient is not None} == set(required)
    # Whatever else is formed, the loss is the same (but for where a workspace has other chunks).
    assert_near("loss", loss, losses(given.leaves(), LABELS, **options)[0], 1e-6)


def test_without_gradients_there_is_a_loss_alone():
    given = operands(ROWS, bias=True)
    expected, _ = losses(given.leaves(), LABELS)
    with torch.no_grad():
        leaves = given.leaves()
        loss = kd.linear_distillation_loss(
            leaves.hidden, leaves.weight, leaves.teacher, LABELS, student_bias=leaves.bias
        )
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


@EACH_DTYPE
@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
@pytest.mark.parametrize("compact", [False, True])
def test_incoming_gradient_per_token(dtype, workspace_bytes, compact):
    incoming = torch.randn(ROWS, generator=torch.Generator().manual_seed(8))
    incoming[3] = 0
    against_reference(
        operands(ROWS, dtype=dtype, bias=True), LABELS, incoming=incoming, reduction="none", ce_weight=0.5,
        workspace_bytes=workspace_bytes, compact=compact, weight=torch.rand(ROWS), slack=2,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [0.25, -3.0, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@EACH_DTYPE
def test_incoming_gradient_scalar(factor, reduction, dtype):
    given = operands(ROWS, dtype=dtype, bias=True)
    # A 16-bit gradient that forward rounded is rounded again when it is multiplied.
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype)
    against_reference(given, LABELS, incoming=factor, reduction=reduction, bound=bound)


def test_fp16_gradients_survive_under_a_loss_scale():
    # 1/65536 of a token's gradient is under the smallest half; under a loss scale of 65536 it must not be.
    given = operands(64, dtype=torch.float16, bias=True)
    against_reference(given, incoming=65536.0, normalizer=65536.0, bound=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("workspace_bytes", [CHUNKS[1], None])
def test_fp16_means_of_sums_that_fp16_cannot_hold(reduction, workspace_bytes):
    # A thousand tokens of one label: their gradients add up to 1e5, and their mean is 100.
    rows = 1000
    given = operands(rows, width=50, dtype=torch.float16, bias=True)
    given = given._replace(hidden=torch.full_like(given.hidden, 100.0), weight=given.weight / 1000)
    options = {"ce_weight": 1.0, "kd_weight": 0.0, "reduction": reduction, "workspace_bytes": workspace_bytes}
    labels = torch.zeros(rows, dtype=torch.int64)
    _, gradients = losses(given.to(torch.float64).leaves(), labels, reference=True, **options)
    assert gradients["weight"].abs().max() > (70000 if reduction == "none" else 70)
    incoming = 1 / rows if reduction == "none" else 1.0
    against_reference(given, labels, required=("weight", "bias"), incoming=incoming, bound=1e-3, **options)


def test_negative_and_large_weights():
    weight = torch.tensor([-1.0, 100.0, 0.0, 1e-3, 5.0])
    against_reference(operands(5), weight=weight, reduction="sum")


# Where models nearly agree, 16-bit logits have little to say of their difference.
NEAR = {"noise": 0.01, "width": 1000, "hidden": 256}


@TWO_DTYPES
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_models_that_nearly_agree(dtype, divergence):
    # Differences of logits of 0.03: an error of 1e-6 in a logit is 3e-5 of them.
    given = operands(16, dtype=dtype, **NEAR)
    against_reference(given, divergence=divergence, slack=50)
    _, exact = losses(given.to(torch.float64).leaves(), reference=True, divergence=divergence)
    _, ours = losses(given.leaves(), divergence=divergence)
    for name in ("hidden", "weight"):
        assert_near(name, ours[name], exact[name], 5e-3)


def test_16_bit_logits_are_what_one_asks_for():
    given = operands(16, dtype=torch.bfloat16, **NEAR)
    _, exact = losses(given.to(torch.float64).leaves(), reference=True)
    _, rounded = losses(given.leaves(), logits_dtype=torch.bfloat16)
    for name in ("hidden", "weight"):
        # Half a unit of 2^-8 of logits of 2 stands against differences of 0.03.
        assert relative_error(rounded[name], exact[name]) > 0.05, f"{name}: fp32 logits would be no better"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits_of_models_that_are_far_apart(dtype):
    # Logits of up to 8, rounded: a probability is off by as much as its logit, half a unit in 8 bits (11 in float16).
    bound = 2e-2 if dtype == torch.bfloat16 else 2.5e-3
    given = operands(ROWS, dtype=dtype, bias=True)
    _, exact = losses(given.to(torch.float64).leaves(), LABELS, reference=True)
    for workspace_bytes in (CHUNKS[1], None):
        _, rounded = losses(given.leaves(), LABELS, logits_dtype=dtype, workspace_bytes=workspace_bytes)
        for name in NAMES:
            assert_near(name, rounded[name], exact[name], bound)


def test_float64_operands_have_float64_logits():
    against_reference(operands(ROWS, dtype=torch.float64), logits_dtype=torch.float32)


def test_repeated_runs_agree_bitwise():
    given = operands(ROWS, dtype=torch.bfloat16, bias=True)
    for options in ({}, {"reduction": "none"}, {"workspace_bytes": CHUNKS[1]}, {"compact": True}):
        loss, gradients = losses(given.leaves(), LABELS, **options)
        again, others = losses(given.leaves(), LABELS, **options)
        assert torch.equal(loss, again)
        assert all(torch.equal(gradients[name], others[name]) for name in NAMES)


def test_a_row_of_nan_stays_in_its_row():
    given = operands(5)
    given.hidden[2] = torch.nan
    leaves = given.leaves()
    loss, gradients = losses(leaves, reduction="none", workspace_bytes=1)
    assert loss.isnan().tolist() == [False, False, True, False, False]
    assert gradients["hidden"].isnan().all(-1).tolist() == [False, False, True, False, False]


def test_the_teacher_gets_no_gradient():
    given = operands(5)
    teacher = kd.LinearTeacher(*(x.clone().requires_grad_() for x in given.teacher[:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once a process: a teacher that requires grad gets none
        losses(given._replace(teacher=teacher).leaves())
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None


def test_module_is_the_function():
    given = operands(ROWS, bias=True)
    fixed = {"divergence": kd.SkewReverseKL(0.2), "temperature": 2.0, "ce_weight": 0.3, "workspace_bytes": CHUNKS[1]}
    module = kd.LinearDistillationLoss(return_stats=True, compact=True, logits_dtype=torch.float32, **fixed)
    weight = torch.rand(ROWS, generator=torch.Generator().manual_seed(4))
    loss, stats = module(
        given.hidden, given.weight, given.teacher, LABELS, student_bias=given.bias, weight=weight, normalizer=5
    )
    expected, _ = losses(given, LABELS, weight=weight, normalizer=5, compact=True, **fixed)
    assert torch.equal(loss, expected)
    assert isinstance(stats, kd.RowStats)
    warmer, _ = module(given.hidden, given.weight, given.teacher, LABELS, temperature=4.0)
    expected, _ = losses(given._replace(bias=None), LABELS, compact=True, **{**fixed, "temperature": 4.0})
    assert torch.equal(warmer, expected)
    assert "temperature=2.0" in repr(module)
    assert "compact=True" in repr(module)
    plain = kd.LinearDistillationLoss()
    assert torch.equal(plain(given.hidden, given.weight, given.teacher), losses(given._replace(bias=None))[0])


@TWO_DTYPES
def test_many_rows_by_default(dtype):
    # More than a group holds: the weight's gradient is a sum in fp32, rounded once.
    for reduction in ("mean", "none"):
        against_reference(operands(700, width=64, dtype=dtype, bias=True), reduction=reduction)


@TWO_DTYPES
def test_several_threads(dtype):
    torch.set_num_threads(4)
    against_reference(operands(150, width=5003, dtype=dtype), some_labels(150), workspace_bytes=64 * 5003 * 12)


@REDUCTIONS
def test_the_reference_backend_is_the_reference(reduction):
    given = operands(ROWS, bias=True)
    expected, gradients = losses(given.leaves(), LABELS, reference=True, reduction=reduction)
    with backends.use("reference"):
        actual, ours = losses(given.leaves(), LABELS, reduction=reduction, compact=True, workspace_bytes=1)
    assert torch.equal(actual, expected)
    assert all(torch.equal(ours[name], gradients[name]) for name in NAMES)
