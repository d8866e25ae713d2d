"""The loss from hidden states with a sparse teacher on a GPU: real vocabularies, ids as frequent as words are."""

from __future__ import annotations

import pytest
import torch
from checks import assert_near
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
from sparse_cases import LOSSES, TAILS, on, ragged, repeated, top_k
from torch import Tensor

import kdkernels as kd
from benchmarks.memory import peak_above_now
from kdkernels import _gathered_products as products

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_TAIL = pytest.mark.parametrize("tail", TAILS)
EACH_LOSS = pytest.mark.parametrize(("tail", "divergence"), LOSSES.values(), ids=LOSSES)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])
ROWS, WIDTH, K = 300, 5003, 32


def zipfian(rows: int, ids: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Distinct ids a row (rows, ids), drawn with probabilities as 1/rank: some are in nearly every row."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    noise = torch.rand(rows, vocabulary, generator=generator, device=DEVICE).log().neg().log().neg()
    rank = torch.arange(1, vocabulary + 1, device=DEVICE)
    spread = torch.randperm(vocabulary, generator=generator, device=DEVICE)  # ranks are not in the order of the ids
    return spread[(noise - rank.log()).topk(ids, -1).indices]


def some(*rows: int, tail: str = "renormalize", k: int = K, width: int = WIDTH, frequent: bool = False, **how):
    """A student with a bias, and a teacher of the k most likely tokens, or of frequent ones."""
    given = operands(*rows, width=width, **{"hidden": 64, "bias": True, "device": DEVICE, **how})
    generator = torch.Generator().manual_seed(9)
    if not frequent:
        return given._replace(teacher=on(DEVICE, top_k(3 * torch.randn(*rows, width, generator=generator), k, tail)))
    logprobs = torch.randn(*rows, k, generator=generator).mul(2).log_softmax(-1).to(DEVICE) - 0.1
    return given._replace(teacher=kd.TopKTeacher(zipfian(given.hidden[..., 0].numel(), k, width), logprobs, tail))


def padded(given: Operands) -> Operands:
    """The same with padding, ids that come again, and a row without ids."""
    return given._replace(teacher=on(DEVICE, repeated(ragged(on("cpu", given.teacher)))))


def labels_of(*rows: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, width, rows, generator=generator)
    return torch.where(torch.rand(*rows, generator=generator) < 0.3, -100, labels).to(DEVICE)


@pytest.mark.parametrize("width", [50, 1000, 50257, 128256, 151936])
@EACH_TAIL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabularies(backend, width, tail, dtype):
    rows = 70 if width <= 50257 else 20
    given = padded(some(rows, tail=tail, width=width, dtype=dtype))
    slack = 2 if dtype == torch.float32 else 1
    against_reference(given, labels_of(rows, width=width), slack=slack)
    options = {"ce_weight": 0.5, "reduction": "none", "workspace_bytes": 8 * MIB}
    against_reference(given, labels_of(rows, width=width), slack=slack, **options)


@EACH_LOSS
@EACH_DTYPE
@REDUCTIONS
def test_losses(backend, tail, divergence, dtype, reduction):
    given = padded(some(3, 100, tail=tail, dtype=dtype))
    weight = torch.rand(3, 100, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    weight[1, :20] = 0
    options = {"divergence": divergence, "reduction": reduction, "weight": weight, "slack": 2}
    for compact, workspace_bytes in ((False, None), (True, MIB), (False, MIB)):
        against_reference(
            given, labels_of(3, 100), compact=compact, workspace_bytes=workspace_bytes, **options
        )  # fmt: skip


@EACH_DTYPE
@pytest.mark.parametrize("workspace_bytes", [MIB, None])
def test_ids_that_nearly_every_row_has(backend, dtype, workspace_bytes):
    # Several parts of a token's entries, by several chunks.
    given = some(3000, width=20011, k=48, frequent=True, dtype=dtype, hidden=200)
    most = given.teacher.ids.flatten().bincount().max()
    assert most > 4 * products.PART, "no token has more entries than a program adds up"
    against_reference(given, slack=2, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("k", [1, 3, 8, 100, 4096])
@EACH_TAIL
def test_numbers_of_ids(backend, tail, k):
    given = some(40, tail=tail, k=k, dtype=torch.bfloat16)
    against_reference(given, floor=0.1 if k == 1 else 0.0)


@pytest.mark.parametrize("hidden", [1, 8, 37, 129, 1500])
@EACH_DTYPE
def test_hidden_sizes(backend, hidden, dtype):
    against_reference(some(70, hidden=hidden, dtype=dtype), slack=2)


def test_temperatures_and_transforms(backend):
    given = padded(some(70, dtype=torch.bfloat16))
    given = given._replace(teacher=given.teacher._replace(teacher_temperature=2.0))
    per_row = (0.7 + torch.rand(70, generator=torch.Generator().manual_seed(3))).to(DEVICE)
    transforms = {"student_logit_scale": 0.7, "student_softcap": 5.0}
    for temperature in (0.5, 2.0, per_row):
        for divergence in ("forward_kl", "jensen_shannon"):
            options = {"temperature": temperature, "divergence": divergence, "bound": OF_16_BIT_LOGITS_GRADIENT}
            against_reference(given, slack=4, **transforms, **options)


# rows, ids, vocabulary, hidden.
PRODUCTS = {
    "few": (7, 8, 50, 40),
    "one token in every row": (1000, 8, 1, 70),
    "tokens that share a window": (700, 8, 3, 1030),
    "hidden states of one": (2000, 16, 500, 1),
    "many ids": (20, 4096, 128256, 256),
    "much hidden": (300, 64, 4000, 5000),
}


@pytest.mark.parametrize(("rows", "ids", "vocabulary", "hidden"), PRODUCTS.values(), ids=PRODUCTS)
@EACH_DTYPE
def test_products(rows, ids, vocabulary, hidden, dtype):
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    x, weight, bias = normal(rows, hidden).to(dtype), normal(vocabulary, hidden).to(dtype), normal(vocabulary)
    places = zipfian(rows, min(ids, vocabulary), vocabulary)
    places = torch.nn.functional.pad(places, (0, ids - places.shape[1]), value=-1)
    places = places.masked_fill(normal(rows, ids) < -1, -1).to(torch.int32)
    gradient = normal(rows, ids).masked_fill(places < 0, 0)
    found = []
    for fused in (True, True, False):
        z, of_hidden, of_weight = (
            torch.full(shape, torch.nan, device=DEVICE) for shape in ((rows, ids), (rows, hidden), (vocabulary, hidden))
        )
        products.logits(x, weight, bias, 1.5, places, z, fused=fused)
        products.of_hidden(gradient, places, weight, of_hidden, fused=fused)
        entries = products.segments(places, gradient, vocabulary)
        products.of_weight(entries, x, of_weight, add=False, fused=fused)
        products.of_weight(entries, x, of_weight, add=True, fused=fused)
        assert (z[places < 0] == -torch.inf).all()
        found.append((z.masked_fill(places < 0, 0), of_hidden, of_weight))
    for one, again, plain in zip(*found, strict=True):
        assert torch.equal(one, again)
        assert_near("product", one, plain, 4e-6)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(products, "in_triton", lambda *_: False)
    for dtype in DTYPES:
        given = padded(some(ROWS, dtype=dtype))
        for workspace_bytes in (MIB // 8, None):
            against_reference(given, labels_of(ROWS), slack=2, workspace_bytes=workspace_bytes)


@EACH_TAIL
def test_ids_out_of_range_are_nan_in_their_row(backend, tail):
    given = some(5, tail=tail, dtype=torch.bfloat16)
    given.teacher.ids[1, 3] = WIDTH
    given.teacher.ids[2] = 2**40
    given.teacher.ids[4] = WIDTH  # of a row that is not read
    labels = torch.tensor([0, 1, 2, 3, -100], device=DEVICE)
    loss, gradients = losses(given.leaves(), labels, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False, False]
    assert gradients["hidden"].isnan().all(-1).tolist() == [False, True, True, False, False]
    assert gradients["hidden"][[0, 3, 4]].isfinite().all()


@EACH_TAIL
@REDUCTIONS
def test_repeated_runs_agree_bitwise(backend, tail, reduction):
    given = some(2000, tail=tail, width=5003, frequent=True, dtype=torch.bfloat16)
    for options in ({}, {"workspace_bytes": MIB}, {"compact": True}):
        loss, gradients = losses(given.leaves(), reduction=reduction, **options)
        for _ in range(2):
            again, others = losses(given.leaves(), reduction=reduction, **options)
            assert torch.equal(loss, again)
            assert all(torch.equal(gradients[name], others[name]) for name in NAMES)


@EACH_TAIL
@REDUCTIONS
def test_backward_twice(backend, tail, reduction):
    leaves = some(ROWS, tail=tail, dtype=torch.bfloat16).leaves()
    loss = kd.linear_distillation_loss(
        leaves.hidden, leaves.weight, leaves.teacher, student_bias=leaves.bias, reduction=reduction
    )
    of_loss = torch.linspace(-1, 2, loss.numel(), device=DEVICE).view(loss.shape)
    first = [x.clone() for x in torch.autograd.grad(loss, leaves[:3], of_loss, retain_graph=True)]
    second = torch.autograd.grad(loss, leaves[:3], of_loss)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EACH_TAIL
@REDUCTIONS
def test_no_synchronisation_with_the_host(backend, tail, reduction):
    leaves, labels = padded(some(10, 30, tail=tail, dtype=torch.bfloat16)).leaves(), labels_of(10, 30)
    teacher = leaves.teacher._replace(
        ids=leaves.teacher.ids.transpose(0, 1)[:, :-1], logprobs=leaves.teacher.logprobs.transpose(0, 1)[:, :-1]
    )
    hidden, labels = leaves.hidden.transpose(0, 1)[:, :-1], labels.transpose(0, 1)[:, :-1]

    def step() -> None:
        loss = kd.linear_distillation_loss(
            hidden, leaves.weight, teacher, labels, student_bias=leaves.bias, reduction=reduction,
            workspace_bytes=MIB // 2,
        )  # fmt: skip
        (2.0 * loss).sum().backward(retain_graph=True)

    step()
    with synchronisations("error"):
        step()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaf is older than the side stream
@EACH_TAIL
@REDUCTIONS
def test_cuda_graphs(backend, tail, reduction):
    made = some(900, tail=tail, frequent=True, dtype=torch.bfloat16)
    static = made.leaves()

    def step() -> tuple[Tensor, ...]:
        loss = kd.linear_distillation_loss(
            static.hidden, static.weight, static.teacher, student_bias=static.bias, reduction=reduction
        )
        return loss.detach(), *torch.autograd.grad(2.0 * loss.sum(), static[:3])

    graph, replayed = captured(step)
    with torch.no_grad():
        static.hidden.copy_(made.hidden.flip(0))
        static.teacher.ids.copy_(zipfian(900, K, WIDTH, seed=5))
    graph.replay()
    expected = step()
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))


@EACH_TAIL
def test_the_current_stream_is_used(backend, tail):
    given = some(64, tail=tail, width=32000, dtype=torch.bfloat16)
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


@EACH_TAIL
@REDUCTIONS
def test_autocast(backend, tail, reduction):
    given = some(ROWS, tail=tail)
    rounded = given.to(torch.bfloat16)._replace(bias=given.bias).to(torch.float64)
    expected, exact = losses(rounded.leaves(), reference=True, reduction=reduction)
    leaves = given.leaves()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual, gradients = losses(leaves, reduction=reduction)
    assert_near("loss", actual, expected, 1e-5)
    assert gradients["weight"].dtype == torch.float32
    assert_gradients(gradients, exact, bound=OF_16_BIT_LOGITS_GRADIENT)


@EACH_TAIL
def test_compile_fullgraph(tail):
    torch._dynamo.reset()
    given = some(90, tail=tail, width=1000, dtype=torch.bfloat16)

    def step(hidden, weight, bias, ids, logprobs):
        teacher = kd.TopKTeacher(ids, logprobs, tail)
        return 2 * kd.linear_distillation_loss(hidden * 1, weight, teacher, student_bias=bias)

    one, two = given.leaves(), given.leaves()
    expected = step(*one[:3], *given.teacher[:2])
    expected.backward()
    actual = torch.compile(step, fullgraph=True)(*two[:3], *given.teacher[:2])
    actual.backward()
    assert_near("loss", actual, expected, 1e-5)
    for name, gradient in two.gradients().items():
        assert_near(name, gradient, one.gradients()[name], 1e-2)


# rows, ids, workspace in MiB, reduction; 32768 tokens and hidden states of 512: the student's logits would take 512 MiB
# of fp32.
PEAKS = {
    "chunks": (4096, 64, 16, "mean"),
    "loss per row": (4096, 64, 16, "none"),
    "one chunk": (4096, 64, 64, "mean"),
    "the default": (4096, 64, None, "mean"),
}


@pytest.mark.parametrize(("rows", "ids", "workspace", "reduction"), PEAKS.values(), ids=PEAKS)
def test_peak_memory(backend, rows, ids, workspace, reduction):
    width, hidden = 32768, 512
    given = some(rows, k=ids, width=width, hidden=hidden, frequent=True, bias=False, dtype=torch.bfloat16).leaves()

    def step() -> None:
        given.hidden.grad = given.weight.grad = None
        kd.linear_distillation_loss(
            given.hidden, given.weight, given.teacher, reduction=reduction,
            workspace_bytes=workspace and workspace * MIB,
        ).sum().backward()  # fmt: skip

    step()
    given.hidden.grad = given.weight.grad = None
    peak = peak_above_now(step, DEVICE)
    gradients = (rows + width) * hidden * 2
    # Over several chunks the weight's gradient is added up in fp32.
    accumulated = width * hidden * 4 if workspace == 16 else 0
    # By default what the ids take, of which the logits would be a hundred times as many.
    room = rows * ids * 128 if workspace is None else workspace * MIB
    bound = gradients + accumulated + room + 4 * MIB
    assert gradients <= peak <= bound, f"{peak / MIB:.2f} MiB, where at most {bound / MIB:.2f} were expected"


def test_weights_of_more_than_2_31_elements(backend):
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of GPU memory")
    rows, width, hidden = 64, 140000, 16384
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(rows, hidden, generator=generator, device=DEVICE).to(torch.bfloat16)
    weight = torch.empty(width, hidden, device=DEVICE, dtype=torch.bfloat16).normal_(0, 1 / 128, generator=generator)
    ids = torch.randint(0, width, (rows, 16), generator=generator, device=DEVICE)
    ids[:, 0] = width - 1  # beyond 2^31
    ids[:, 1] = 0
    teacher = kd.TopKTeacher(ids, torch.randn(rows, 16, device=DEVICE).log_softmax(-1), "renormalize")
    loss, gradients = losses(Operands(x, weight, None, teacher).leaves())
    used, places = ids.unique(return_inverse=True)
    few = Operands(x, weight[used], None, teacher._replace(ids=places)).to(torch.float64)
    expected, exact = losses(few.leaves(), reference=True)
    assert_near("loss", loss, expected, 1e-5)
    assert_near("hidden", gradients["hidden"], exact["hidden"], OF_16_BIT_LOGITS_GRADIENT)
    assert_near("weight", gradients["weight"][used], exact["weight"], OF_16_BIT_LOGITS_GRADIENT)
    gradients["weight"][used] = 0
    assert not gradients["weight"].any()
