"""The loss from hidden states on a GPU: real vocabularies, and what only a GPU can get wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
from checks import DIVERGENCES, assert_near, relative_error
from decoupled_cases import FAMILY, labels_for, mask_of, on_device
from gpu_tools import captured, synchronisations
from linear_cases import (
    NAMES,
    OF_16_BIT_LOGITS_GRADIENT,
    Operands,
    against_reference,
    assert_gradients,
    losses,
    operands,
)
from torch import Tensor

import kdkernels as kd
from benchmarks.memory import peak_above_now

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TWO_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])
ROWS, WIDTH = 300, 5003
# Bytes: a few rows at a time, several groups of chunks, everything at once.
CHUNKS = [1 * MIB, 8 * MIB, None]


def some(*rows: int, **how) -> Operands:
    return operands(*rows, **{"hidden": 64, "teacher_hidden": 40, "device": DEVICE, **how})


def some_labels(*rows: int, width: int, ignored: float = 0.3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, width, rows, generator=generator)
    return torch.where(torch.rand(*rows, generator=generator) < ignored, -100, labels).to(DEVICE)


@pytest.mark.parametrize("width", [1, 7, 1000, 32000, 50257, 128256, 151936, 262144])
@TWO_DTYPES
def test_vocabularies(backend, dtype, width):
    rows = 70 if width <= 50257 else 20
    given = some(rows, width=width, dtype=dtype, bias=True, teacher_bias=True)
    labels = some_labels(rows, width=width)
    # Of one column, the gradient is 0 up to the rounding of a probability of 1. In fp32, a hidden state's gradient is
    # the sum of as many terms as there are columns.
    options = {"floor": 0.3 if width == 1 else 0.0, "slack": 2 if dtype == torch.float32 else 1}
    against_reference(given, labels, temperature=2.0, **options)
    against_reference(given, labels, ce_weight=0.5, reduction="none", workspace_bytes=8 * MIB, **options)


MASKED_WIDTH = 992  # the CUDA kernels take masks whose rows lie at multiples of 16 bytes
KINDS = {name: DIVERGENCES[name] for name in ("reverse_kl", "jensen_shannon", "total_variation", "alpha_beta")}
SETS = {name: FAMILY[name] for name in ("label_weighted", "dkd", "cakd_top_k", "cakd_top_p", "given", "adaptive_kl")}


@pytest.mark.parametrize("divergence", KINDS.values(), ids=KINDS)
@EACH_DTYPE
def test_divergences(backend, divergence, dtype):
    given = some(48, width=WIDTH, dtype=dtype, bias=True)
    options = {"temperature": 1.5, "ce_weight": 0.3, "kd_weight": 0.7}
    against_reference(given, some_labels(48, width=WIDTH), divergence=divergence, **options)


@pytest.mark.parametrize("divergence", SETS.values(), ids=SETS)
@TWO_DTYPES
def test_decoupled_and_adaptive(backend, divergence, dtype):
    width = MASKED_WIDTH if divergence is SETS["given"] else WIDTH
    given = some(48, width=width, dtype=dtype)
    which = on_device(divergence(width), DEVICE)
    labels = labels_for(48, width).to(DEVICE)
    against_reference(given, labels, divergence=which, temperature=2.0, workspace_bytes=2 * MIB)


@EACH_DTYPE
@pytest.mark.parametrize("workspace_bytes", CHUNKS)
@REDUCTIONS
@pytest.mark.parametrize("compact", [False, True])
def test_chunks_labels_and_weights(backend, dtype, workspace_bytes, reduction, compact):
    given = some(3, 100, width=WIDTH, dtype=dtype, bias=True)
    weight = torch.rand(3, 100, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    weight[1, :20] = 0
    labels = some_labels(3, 100, width=WIDTH)
    options = {"workspace_bytes": workspace_bytes, "reduction": reduction, "compact": compact, "weight": weight}
    against_reference(given, labels, ce_weight=0.5, **options)
    _, gradients = losses(given.leaves(), labels, **options)
    assert (gradients["hidden"][(labels == -100) | (weight == 0)] == 0).all()


@pytest.mark.parametrize("hidden", [8, 37, 129])
@pytest.mark.parametrize("width", [1001, 1004])
@TWO_DTYPES
def test_sizes_that_no_vector_divides(backend, hidden, width, dtype):
    given = some(70, width=width, hidden=hidden, teacher_hidden=hidden + 2, dtype=dtype, bias=True)
    against_reference(given, divergence="jensen_shannon", workspace_bytes=MIB // 2)


@TWO_DTYPES
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["whole", "shifted", "transposed", "columns"])
def test_a_teacher_of_logits(backend, dtype, teacher_dtype, view):
    logits = some(10, 7, width=1032, dtype=teacher_dtype, teacher_logits=True).teacher
    views = {
        "whole": logits,
        "shifted": logits[:, :-1],
        "transposed": logits.transpose(0, 1),
        "columns": logits[..., 3:],
    }
    teacher = views[view]
    given = some(*teacher.shape[:-1], width=1021, dtype=dtype, seed=1)._replace(teacher=teacher)
    for compact in (False, True):
        options = {"vocab_size": 1021, "workspace_bytes": MIB // 4, "compact": compact}
        against_reference(given, some_labels(*teacher.shape[:-1], width=1021), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logit_transforms(any_dtypes, dtype):
    given = some(70, width=WIDTH, dtype=dtype, bias=True)
    options = {"student_logit_scale": 2.0, "student_softcap": 5.0, "teacher_logit_scale": 0.5, "teacher_softcap": 30.0}
    for divergence in ("forward_kl", "jensen_shannon"):
        against_reference(given, divergence=divergence, temperature=1.5, slack=4, workspace_bytes=2 * MIB, **options)


@TWO_DTYPES
def test_logit_scales(backend, dtype):
    # They go into the products: no kernel is needed for them.
    given = some(70, width=WIDTH, dtype=dtype, bias=True, teacher_bias=True)
    against_reference(given, student_logit_scale=0.5, teacher_logit_scale=1.5)


def test_options_per_row(backend):
    width = MASKED_WIDTH
    given = some(2, 20, width=width, dtype=torch.bfloat16)
    masks = torch.stack([mask_of(width, seed) for seed in range(40)]).view(2, 20, width).to(DEVICE)
    temperature = (0.7 + torch.rand(2, 20, generator=torch.Generator().manual_seed(3))).to(DEVICE)
    which = kd.Decoupled(kd.Given(masks), scd=torch.tensor(2.0, device=DEVICE))
    for compact in (False, True):
        options = {"temperature": temperature, "workspace_bytes": MIB // 2, "compact": compact}
        against_reference(given, some_labels(2, 20, width=width), divergence=which, **options)


@pytest.mark.parametrize("required", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()], ids=str)
@REDUCTIONS
def test_only_what_requires_grad_gets_one(backend, required, reduction):
    given = some(ROWS, width=WIDTH, dtype=torch.bfloat16, bias=True)
    against_reference(given, required=required, reduction=reduction, workspace_bytes=2 * MIB)


@pytest.mark.parametrize("rows", [(0,), (2, 0)], ids=str)
@REDUCTIONS
@pytest.mark.parametrize("compact", [False, True])
def test_no_rows(backend, rows, reduction, compact):
    given = some(*rows, width=100, bias=True).leaves()
    labels = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    loss, gradients = losses(given, labels, reduction=reduction, compact=compact)
    assert (loss == 0).all()
    assert gradients["hidden"].shape == (*rows, 64)
    assert (gradients["weight"] == 0).all()


@pytest.mark.parametrize("compact", [False, True])
def test_no_row_counts(backend, compact):
    labels = torch.full((70,), -100, device=DEVICE)
    loss, gradients = losses(some(70, width=1000, bias=True).leaves(), labels, compact=compact)
    assert loss.item() == 0
    assert all((gradients[name] == 0).all() for name in NAMES)


def test_stats(backend):
    given = some(3, 30, width=WIDTH, dtype=torch.bfloat16)
    labels = some_labels(3, 30, width=WIDTH)
    options = {"divergence": kd.Decoupled(kd.TopK(5)), "temperature": 2.0, "ce_weight": 0.5, "return_stats": True}

    def call(which, given, **more):
        return which(given.hidden, given.weight, given.teacher, labels, **options, **more)

    _, expected = call(kd.reference.linear_distillation_loss, given.to(torch.float64))
    for compact in (False, True):
        _, stats = call(kd.linear_distillation_loss, given.leaves(), compact=compact, workspace_bytes=MIB)
        for name, actual, want in zip(stats._fields, stats, expected, strict=True):
            if name == "top1_agreement":  # a sparse teacher's
                assert actual is None
                assert want is None
                continue
            assert_near(name, actual, want, 2e-5, floor=1e-2)
            assert (actual[labels == -100] == 0).all()


def test_labels_out_of_range_are_nan_in_their_row(backend):
    labels = torch.tensor([1, 1000, -7, 999], device=DEVICE)
    given = some(4, width=1000, dtype=torch.bfloat16).leaves()
    loss, gradients = losses(given, labels, ce_weight=0.5, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradients["hidden"][[0, 3]].isfinite().all()


def near(dtype: torch.dtype) -> Operands:
    return some(256, width=32000, hidden=1024, noise=0.01, dtype=dtype)


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [
        *((divergence, torch.bfloat16) for divergence in ("forward_kl", "reverse_kl", "jensen_shannon")),
        ("jensen_shannon", torch.float32),
        ("jensen_shannon", torch.float16),
        ("forward_kl", torch.float16),
    ],
    ids=str,
)
def test_models_that_nearly_agree(backend, divergence, dtype):
    given = near(dtype)
    options = {"divergence": divergence, "incoming": 65536.0 if dtype == torch.float16 else 1.0}  # a loss scale
    _, exact = losses(given.to(torch.float64).leaves(), reference=True, **options)
    for workspace_bytes in (None, 64 * MIB):
        _, ours = losses(given.leaves(), workspace_bytes=workspace_bytes, **options)
        assert_gradients(ours, exact, bound=5e-3)


def test_why_logits_are_fp32_by_default(backend):
    given = near(torch.bfloat16)
    _, exact = losses(given.to(torch.float64).leaves(), reference=True)
    _, rounded = losses(given.leaves(), logits_dtype=torch.bfloat16)
    for name in ("hidden", "weight"):
        # Half a unit of 2^-8 of logits of 2 stands against differences of 0.03.
        assert relative_error(rounded[name], exact[name]) > 0.05, f"{name}: fp32 logits would be no better"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits_of_models_that_are_far_apart(backend, dtype):
    given = some(ROWS, width=WIDTH, dtype=dtype, bias=True)
    _, exact = losses(given.to(torch.float64).leaves(), reference=True)
    for workspace_bytes in CHUNKS:
        _, rounded = losses(given.leaves(), logits_dtype=dtype, workspace_bytes=workspace_bytes)
        assert_gradients(rounded, exact, bound=2e-2)


def test_fp16_gradients_survive_under_a_loss_scale(backend):
    given = some(ROWS, width=WIDTH, dtype=torch.float16, bias=True)
    against_reference(given, incoming=65536.0, normalizer=65536.0)
    against_reference(given, incoming=torch.full((ROWS,), 65536.0, device=DEVICE), reduction="none", weight=torch.full(
        (ROWS,), 1 / 65536, device=DEVICE))  # fmt: skip


@REDUCTIONS
@TWO_DTYPES
def test_incoming_gradients_and_backward_twice(backend, reduction, dtype):
    given = some(ROWS, width=WIDTH, dtype=dtype, bias=True)
    incoming = torch.randn(ROWS, generator=torch.Generator().manual_seed(4)).to(DEVICE) if reduction == "none" else 3.0
    against_reference(given, incoming=incoming, reduction=reduction, bound=OF_16_BIT_LOGITS_GRADIENT)
    leaves = given.leaves()
    loss = kd.linear_distillation_loss(
        leaves.hidden, leaves.weight, leaves.teacher, student_bias=leaves.bias, reduction=reduction
    )
    of_loss = torch.as_tensor(incoming, device=DEVICE)
    first = [x.clone() for x in torch.autograd.grad(loss, leaves[:3], of_loss, retain_graph=True)]
    second = torch.autograd.grad(loss, leaves[:3], of_loss)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@REDUCTIONS
@EACH_DTYPE
def test_repeated_runs_agree_bitwise(backend, reduction, dtype):
    given, labels = some(ROWS, width=32000, dtype=dtype, bias=True), some_labels(ROWS, width=32000)
    for options in ({}, {"workspace_bytes": 16 * MIB}, {"compact": True}):
        loss, gradients = losses(given.leaves(), labels, reduction=reduction, **options)
        for _ in range(2):
            again, others = losses(given.leaves(), labels, reduction=reduction, **options)
            assert torch.equal(loss, again)
            assert all(torch.equal(gradients[name], others[name]) for name in NAMES)


def full_call(teacher: kd.LinearTeacher | Tensor, reduction: str, **options):
    """A step with everything that a call can bring along on the device."""
    shape = (teacher if isinstance(teacher, Tensor) else teacher.hidden).shape[:-1]
    labels = some_labels(*shape, width=MASKED_WIDTH)
    mask = mask_of(MASKED_WIDTH).to(DEVICE)
    more = {
        "temperature": torch.full(shape, 2.0, device=DEVICE),
        "weight": torch.rand(shape, device=DEVICE),
        "divergence": kd.Decoupled(kd.Given(mask), scd=torch.tensor(2.0, device=DEVICE)),
        **options,
    }
    if reduction == "mean":
        more["normalizer"] = torch.tensor(5, device=DEVICE)
    leaves = some(*shape, width=MASKED_WIDTH, dtype=torch.bfloat16, bias=True).leaves()

    def step() -> None:
        loss, _ = kd.linear_distillation_loss(
            leaves.hidden, leaves.weight, teacher, labels, student_bias=leaves.bias, reduction=reduction, ce_weight=0.5,
            return_stats=True, **more,
        )  # fmt: skip
        (2.0 * loss).sum().backward()

    return step


@pytest.mark.parametrize("kind", ["hidden", "logits", "logits of rows far apart"])
@REDUCTIONS
def test_no_synchronisation_with_the_host(backend, kind, reduction):
    made = some(10, 30, width=MASKED_WIDTH, dtype=torch.bfloat16, teacher_logits=kind != "hidden").teacher
    teacher = made.transpose(0, 1)[:, :-1] if kind == "logits of rows far apart" else made
    step = full_call(teacher, reduction, workspace_bytes=MIB // 2)
    step()
    with synchronisations("error"):
        step()


@REDUCTIONS
def test_compact_synchronises_once(backend, reduction):
    made = some(10, 30, width=MASKED_WIDTH, dtype=torch.bfloat16).teacher
    step = full_call(made, reduction, compact=True)
    step()
    with synchronisations("warn"), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    waits = [str(warning.message) for warning in seen if "synchronizing" in str(warning.message)]
    # A loss per token learns it again in backward.
    assert len(waits) == (1 if reduction == "mean" else 2), waits


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaf is older than the side stream
@pytest.mark.parametrize("teacher_logits", [False, True])
@REDUCTIONS
def test_cuda_graphs(backend, reduction, teacher_logits):
    made = some(90, width=WIDTH, dtype=torch.bfloat16, bias=True, teacher_logits=teacher_logits)
    static, labels = made.leaves(), some_labels(90, width=WIDTH)

    def step() -> tuple[Tensor, ...]:
        loss = kd.linear_distillation_loss(
            static.hidden, static.weight, static.teacher, labels, student_bias=static.bias, ce_weight=0.5,
            reduction=reduction, workspace_bytes=MIB, compact=torch.cuda.is_current_stream_capturing(),
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(2.0 * loss.sum(), static[:3])

    graph, replayed = captured(step)
    with torch.no_grad():
        static.hidden.copy_(made.hidden.flip(0))
        static.weight.mul_(0.5)
        labels.copy_(some_labels(90, width=WIDTH, seed=2))
    graph.replay()
    expected = step()
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))


def test_the_current_stream_is_used(backend):
    given = some(64, width=32000, dtype=torch.bfloat16)
    expected, gradients = losses(given.leaves())
    late = torch.zeros_like(given.hidden)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(given.hidden)
        actual, others = losses(given._replace(hidden=late).leaves())
    stream.synchronize()
    assert torch.equal(actual, expected)
    assert torch.equal(others["weight"], gradients["weight"])


def test_the_device_of_the_tensors_is_used(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    against_reference(some(48, width=WIDTH, dtype=torch.bfloat16, device="cuda:1"), workspace_bytes=MIB)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@REDUCTIONS
def test_autocast(backend, dtype, reduction):
    given = some(ROWS, width=WIDTH)
    expected, exact = losses(given.to(dtype).to(torch.float64).leaves(), reference=True, reduction=reduction)
    leaves = given.leaves()
    with torch.autocast("cuda", dtype=dtype):
        loss = kd.linear_distillation_loss(leaves.hidden, leaves.weight, leaves.teacher, reduction=reduction)
    loss.sum().backward()
    assert_near("loss", loss, expected, 1e-5)
    assert leaves.hidden.grad.dtype == leaves.weight.grad.dtype == torch.float32
    assert_gradients(leaves.gradients(), exact, bound=OF_16_BIT_LOGITS_GRADIENT)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile_fullgraph(compiler):
    torch._dynamo.reset()
    given, labels = some(90, width=1000, dtype=torch.bfloat16, bias=True), some_labels(90, width=1000)

    def step(hidden, weight, bias, teacher_hidden, teacher_weight):
        teacher = kd.LinearTeacher(teacher_hidden, teacher_weight)
        options = {"temperature": 2.0, "ce_weight": 0.5, "compact": True, "workspace_bytes": MIB}
        return 2 * kd.linear_distillation_loss(hidden * 1, weight, teacher, labels, student_bias=bias, **options)

    one, two = given.leaves(), given.leaves()
    expected = step(*one[:3], *given.teacher[:2])
    expected.backward()
    actual = torch.compile(step, fullgraph=True, backend=compiler)(*two[:3], *given.teacher[:2])
    actual.backward()
    assert_near("loss", actual, expected, 1e-5)
    for name, gradient in two.gradients().items():
        assert_near(name, gradient, one.gradients()[name], 1e-2)


# What lies about beside workspace and gradients: rows' numbers, and what the allocator rounds up to.
LITTLE = 4 * MIB
# rows, dtype, workspace in MiB, what requires grad, reduction; 32768 tokens and hidden states of 512: a model's logits
# would take 512 MiB of fp32.
PEAKS = {
    "chunks": (4096, torch.bfloat16, 64, ("hidden", "weight"), "mean"),
    "chunks in fp32": (4096, torch.float32, 64, ("hidden", "weight"), "mean"),
    "little workspace": (1024, torch.bfloat16, 8, ("hidden", "weight"), "mean"),
    "loss per row": (4096, torch.bfloat16, 64, ("hidden", "weight"), "none"),
    "no weight gradient": (4096, torch.bfloat16, 64, ("hidden",), "mean"),
    "loss alone": (4096, torch.bfloat16, 64, (), "mean"),
    "one group": (1024, torch.bfloat16, 512, ("hidden", "weight"), "mean"),
    "the default": (4096, torch.bfloat16, None, ("hidden", "weight"), "mean"),
}


@pytest.mark.parametrize(("rows", "dtype", "workspace", "required", "reduction"), PEAKS.values(), ids=PEAKS)
def test_peak_memory(backend, rows, dtype, workspace, required, reduction):
    width, hidden = 32768, 512
    given = some(rows, width=width, hidden=hidden, dtype=dtype).leaves(required)
    labels = some_labels(rows, width=width)

    def step() -> None:
        given.hidden.grad = given.weight.grad = None
        loss = kd.linear_distillation_loss(
            given.hidden, given.weight, given.teacher, labels, reduction=reduction, ce_weight=0.5,
            workspace_bytes=workspace and workspace * MIB,
        ).sum()  # fmt: skip
        if required:
            loss.backward()

    step()  # cuBLAS takes its workspace once
    given.hidden.grad = given.weight.grad = None
    peak = peak_above_now(step, DEVICE)
    sizes = {"hidden": rows * hidden, "weight": width * hidden}
    gradients = sum(sizes[name] * dtype.itemsize for name in required)
    # Over several groups of chunks, a 16-bit weight's gradient is added up in fp32.
    several = workspace is None or rows * width * dtype.itemsize > workspace * MIB
    accumulated = sizes["weight"] * 4 if "weight" in required and several and dtype.itemsize == 2 else 0
    # By default less than one model's logits in fp32 and their gradient in 16 bits, however large the vocabulary.
    room = rows * width * 6 if workspace is None else workspace * MIB
    bound = gradients + accumulated + room + LITTLE
    assert gradients <= peak <= bound, f"{peak / MIB:.2f} MiB, where at most {bound / MIB:.2f} were expected"


def of_rows(given: Operands, rows: slice) -> Operands:
    teacher = given.teacher
    part = teacher[rows] if isinstance(teacher, Tensor) else teacher._replace(hidden=teacher.hidden[rows])
    return given._replace(hidden=given.hidden[rows], teacher=part)


@pytest.mark.parametrize(("teacher_logits", "workspace_bytes"), [(True, 256 * MIB), (False, 40 << 30)])
def test_more_than_2_31_elements(backend, teacher_logits, workspace_bytes):
    # 16500 x 131072: 4.3 GB of a teacher's logits, of which chunks are read; or all of both models' logits at once.
    if torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs 50 GB of GPU memory")
    rows, width = 16500, 131072
    given = some(rows, width=width, hidden=16, teacher_hidden=16, dtype=torch.bfloat16)
    if teacher_logits:
        given = given._replace(teacher=torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16))
    options = {"reduction": "sum", "workspace_bytes": workspace_bytes}
    loss, gradients = losses(given.leaves(), **options)
    for row in (0, 8191, 16383, 16384, rows - 1):  # the last ones lie beyond 2^31
        one, theirs = losses(of_rows(given, slice(row, row + 1)).leaves(), reduction="sum")
        assert torch.isfinite(one)
        # The logits' gradient is rounded alike but for where sums in another order send it the other way.
        assert_near(f"hidden[{row}]", gradients["hidden"][row], theirs["hidden"][0], OF_16_BIT_LOGITS_GRADIENT)
    halves = [losses(of_rows(given, part).leaves(), **options) for part in (slice(None, 8192), slice(8192, None))]
    assert_near("loss", loss, halves[0][0] + halves[1][0], 1e-5)
    of_halves = halves[0][1]["weight"].float() + halves[1][1]["weight"].float()
    assert_near("weight", gradients["weight"], of_halves, OF_16_BIT_LOGITS_GRADIENT)
