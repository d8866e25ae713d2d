"""linear_distillation_loss with a TopKTeacher, against the reference in fp64 and against its definition."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from checks import assert_near
from linear_cases import BOUNDS, NAMES, Operands, against_reference, assert_gradients, losses, operands
from sparse_cases import LOSSES, TAILS, ragged, repeated, top_k
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kdkernels as kd
from kdkernels import _arguments, ops
from kdkernels.backends.native import RowOptions

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, WIDTH, K = 23, 300, 11
LABELS = torch.where(torch.arange(ROWS) % 3 == 0, -100, torch.arange(ROWS))
EACH_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
EACH_TAIL = pytest.mark.parametrize("tail", TAILS)
EACH_LOSS = pytest.mark.parametrize(("tail", "divergence"), LOSSES.values(), ids=LOSSES)
WITHIN = pytest.mark.parametrize("divergence", [of for tail, of in LOSSES.values() if tail == "renormalize"], ids=str)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])
# Bytes: a row at a time; several chunks of which the last is smaller, of logits or of ids; everything at once.
FEW_ROWS = 5 * WIDTH * 8
CHUNKS = [1, FEW_ROWS, None]
EACH_CHUNK = pytest.mark.parametrize("workspace_bytes", CHUNKS)


def some(*rows: int, tail: str = "renormalize", k: int = K, width: int = WIDTH, **how) -> Operands:
    """A student with a bias, and the k most likely tokens of another model."""
    given = operands(*rows, width=width, **{"bias": True, **how})
    logits = 3 * torch.randn(*rows, width, generator=torch.Generator().manual_seed(9))
    return given._replace(teacher=top_k(logits, k, tail))


def padded(given: Operands) -> Operands:
    """The same with padding, ids that come again, and a row without ids."""
    return given._replace(teacher=repeated(ragged(given.teacher)))


def reads_all(**options) -> dict:
    """Options with which "renormalize" reads the whole vocabulary."""
    return {"ce_weight": 1e-30, **options}


@EACH_LOSS
@EACH_DTYPE
def test_tails(tail, divergence, dtype):
    given = some(ROWS, tail=tail, dtype=dtype)
    against_reference(given, divergence=divergence)
    against_reference(padded(given), LABELS, divergence=divergence, workspace_bytes=FEW_ROWS)
    options = {"ce_weight": 0.3, "kd_weight": 0.7, "reduction": "none", "divergence": divergence}
    against_reference(padded(given), LABELS, workspace_bytes=FEW_ROWS, **options)


def by_definition(given: Operands, temperature: float = 1.0) -> torch.Tensor:
    """The losses that TopKTeacher's table gives, per row, of ids without padding: fp64 logits, autograd."""
    teacher, log_q = given.teacher, (given.hidden @ given.weight.T + given.bias).div(temperature).log_softmax(-1)
    log_p = teacher.logprobs * teacher.teacher_temperature / temperature
    p, log_q = log_p.exp(), log_q.gather(-1, teacher.ids)
    inside_p, inside_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    within = (inside_p.exp() * (inside_p - inside_q)).sum(-1)
    if teacher.tail == "renormalize":
        return temperature**2 * within
    if teacher.tail == "teacher":
        return temperature**2 * (inside_p.exp() * (inside_p - log_q)).sum(-1)
    if teacher.tail == "drop":
        return temperature**2 * (p * (log_p - log_q)).sum(-1)
    p_s, q_s = p.sum(-1), log_q.exp().sum(-1)
    binary = p_s * (p_s / q_s).log() + (1 - p_s) * ((1 - p_s) / (1 - q_s)).log()
    return temperature**2 * (binary + p_s * within)


@EACH_TAIL
@REDUCTIONS
def test_the_definition(tail, reduction):
    given = some(ROWS, tail=tail)
    given = given._replace(teacher=given.teacher._replace(teacher_temperature=1.5))
    exact = given.to(torch.float64).leaves()
    expected = by_definition(exact, 1.5)
    expected = expected.mean() if reduction == "mean" else expected
    expected.sum().backward()
    actual, gradients = losses(given.leaves(), reduction=reduction, temperature=1.5)
    assert_near("loss", actual, expected, 2e-6)
    assert_gradients(gradients, exact.gradients())


@WITHIN
@EACH_DTYPE
@REDUCTIONS
def test_renormalize_is_the_loss_of_the_logits(divergence, dtype, reduction):
    # Of those at the ids alone, and of all of them: three ways to one number.
    given = padded(some(ROWS, dtype=dtype))
    options = {"divergence": divergence, "reduction": reduction, "temperature": 1.7}
    loss, gradients = losses(given.leaves(), LABELS, **options)
    exact = given.to(torch.float64).leaves()
    logits = exact.hidden @ exact.weight.T + exact.bias
    expected = kd.distillation_loss(logits, exact.teacher, LABELS, **options)
    expected.sum().backward()
    assert_near("loss", loss, expected, BOUNDS[dtype][0])
    assert_gradients(gradients, exact.gradients(), bound=3e-3 if dtype.itemsize == 2 else None)
    whole, theirs = losses(given.leaves(), LABELS, **reads_all(**options))
    assert_near("loss", loss, whole, BOUNDS[dtype][0])
    assert_gradients(gradients, theirs, bound=3e-3 if dtype.itemsize == 2 else None)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_renormalize_reads_the_ids_alone(reduction):
    given = padded(some(ROWS))
    expected, gradients = losses(given.leaves(), reduction=reduction)
    named = torch.zeros(WIDTH, dtype=torch.bool)
    named[given.teacher.ids[given.teacher.ids >= 0]] = True
    named[0] = True  # where padding is sent
    assert not named.all()
    given.weight[~named] = torch.nan
    given.bias[~named] = torch.nan
    loss, others = losses(given.leaves(), reduction=reduction)
    assert torch.equal(loss, expected)
    assert all(torch.equal(others[name], gradients[name]) for name in NAMES)
    assert (others["weight"][~named] == 0).all()
    assert (others["bias"][~named] == 0).all()


@WITHIN
@EACH_CHUNK
@pytest.mark.parametrize("compact", [False, True])
@REDUCTIONS
def test_renormalize_in_chunks(divergence, workspace_bytes, compact, reduction):
    given = padded(some(ROWS))
    weight = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    weight[4:6] = 0
    options = {"divergence": divergence, "weight": weight, "compact": compact, "reduction": reduction}
    against_reference(given, LABELS, workspace_bytes=workspace_bytes, **options)


@EACH_TAIL
@EACH_CHUNK
@pytest.mark.parametrize("compact", [False, True])
def test_ignored_rows(tail, workspace_bytes, compact):
    given = padded(some(3, 7, tail=tail))
    labels = torch.where(torch.arange(21) % 2 == 0, -100, torch.arange(21)).view(3, 7)
    given.teacher.logprobs[labels == -100] = torch.nan
    for reduction, ce_weight in itertools.product(("mean", "none"), (0.0, 0.5)):
        options = {"workspace_bytes": workspace_bytes, "compact": compact, "reduction": reduction}
        against_reference(given, labels, ce_weight=ce_weight, **options)
        _, gradients = losses(given.leaves(), labels, ce_weight=ce_weight, **options)
        assert (gradients["hidden"][labels == -100] == 0).all()
    loss, gradients = losses(given.leaves(), torch.full_like(labels, -100), compact=compact)
    assert loss == 0
    assert all((gradients[name] == 0).all() for name in NAMES)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_renormalize_multiplies_no_row_that_does_not_count(reduction):
    given = some(ROWS)
    expected, gradients = losses(given.leaves(), LABELS, reduction=reduction)
    given.hidden[LABELS == -100] = torch.nan
    loss, others = losses(given.leaves(), LABELS, reduction=reduction)
    assert torch.equal(loss, expected)
    assert all(torch.equal(others[name], gradients[name]) for name in NAMES)


@EACH_TAIL
@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 64, WIDTH])
def test_numbers_of_ids(tail, k):
    # Of a single id, what is renormalised is 0, and so is its gradient up to the rounding of a probability of 1.
    against_reference(some(ROWS, tail=tail, k=k), floor=0.1 if k == 1 else 0.0)


@pytest.mark.parametrize("hidden", [0, 1, 3, 129])
@EACH_DTYPE
def test_hidden_sizes(hidden, dtype):
    for tail in ("renormalize", "bucket"):
        against_reference(some(ROWS, tail=tail, hidden=hidden, dtype=dtype))


def test_many_ids_and_much_hidden(monkeypatch):
    # Gathered in pieces: of a token's ids, and of several tokens.
    for piece in (4 * 40 * 5, 4 * 40 * 40):
        monkeypatch.setattr("kdkernels._gathered_products.PIECE_BYTES", piece)
        against_reference(padded(some(ROWS)))
    monkeypatch.setattr("kdkernels._gathered_products.LEAST_COLUMNS", 7)  # of 40
    against_reference(padded(some(ROWS, dtype=torch.bfloat16)), workspace_bytes=FEW_ROWS)


@EACH_LOSS
@pytest.mark.parametrize("scale_by_temperature", [True, False])
def test_temperatures_and_transforms(tail, divergence, scale_by_temperature):
    given = padded(some(ROWS, tail=tail))
    given = given._replace(teacher=given.teacher._replace(teacher_temperature=2.0))
    given_only = tail in ("bucket", "drop")
    per_row = 0.5 + 3 * torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    for temperature in (2.0,) if given_only else (0.5, 2.0, 20.0, per_row, torch.tensor(1.7)):
        options = {"temperature": temperature, "scale_by_temperature": scale_by_temperature, "divergence": divergence}
        against_reference(given, LABELS, **options)
        transforms = {"student_logit_scale": 0.7, "student_softcap": 5.0}
        against_reference(given, LABELS, slack=4, workspace_bytes=FEW_ROWS, **transforms, **options)


@EACH_TAIL
def test_vocab_size(tail):
    given = some(ROWS, tail=tail, width=290)
    wider = operands(ROWS, width=300, bias=True)._replace(teacher=given.teacher)
    for options in ({}, {"reduction": "none"}, {"ce_weight": 0.5}):
        against_reference(wider, LABELS, vocab_size=290, **options)
        _, gradients = losses(wider.leaves(), LABELS, vocab_size=290, **options)
        assert (gradients["weight"][290:] == 0).all()
        assert (gradients["bias"][290:] == 0).all()


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "transposed rows": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[:, ::2],
    "every other id": lambda x: x[..., ::2],
    "ids apart": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "expanded": lambda x: x[:1].expand(6, *x.shape[1:]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("compact", [False, True])
def test_views(view, tail, compact):
    teacher = some(3, 7, tail=tail).teacher
    teacher = teacher._replace(ids=view(teacher.ids), logprobs=view(teacher.logprobs))
    rows = teacher.ids.shape[:-1]
    given = operands(*rows, width=WIDTH)._replace(teacher=teacher)
    labels = torch.where(torch.arange(rows.numel()) % 3 == 0, -100, 1).view(rows)
    for workspace_bytes in (FEW_ROWS, None):
        options = {"workspace_bytes": workspace_bytes, "compact": compact}
        against_reference(given, labels, **options)
        against_reference(given, labels, reduction="none", **options)


@EACH_TAIL
def test_one_dimension_is_one_row(tail):
    given = some(1, tail=tail)
    ids, logprobs = given.teacher.ids[0], given.teacher.logprobs[0]
    one = given._replace(hidden=given.hidden[0], teacher=given.teacher._replace(ids=ids, logprobs=logprobs))
    other = one._replace(teacher=one.teacher._replace(ids=ids[::2], logprobs=logprobs[::2]))
    for reduction, compact in itertools.product(("mean", "none"), (False, True)):
        for single in (one, other):
            against_reference(single, torch.tensor(3), reduction=reduction, compact=compact)


@EACH_TAIL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_the_teacher(tail, dtype):
    given = some(ROWS, tail=tail, dtype=dtype)
    for logprobs, ids in itertools.product(BOUNDS, (torch.int32, torch.int64)):
        teacher = given.teacher._replace(ids=given.teacher.ids.to(ids), logprobs=given.teacher.logprobs.to(logprobs))
        against_reference(given._replace(teacher=teacher), workspace_bytes=FEW_ROWS)


@EACH_TAIL
def test_a_weight_that_is_a_transpose(tail):
    given = some(ROWS, tail=tail)
    turned = given._replace(weight=given.weight.T.contiguous().T)
    expected, gradients = losses(given.leaves())
    leaf = turned.weight.detach().requires_grad_()
    loss = kd.linear_distillation_loss(turned.hidden, leaf, turned.teacher, student_bias=turned.bias)
    loss.backward()
    assert_near("loss", loss, expected, 1e-6)
    assert_near("weight", leaf.grad, gradients["weight"], 1e-6)


@EACH_LOSS
def test_logits_of_minus_infinity(tail, divergence):
    # A student who gives a row's ids nothing at all, where a teacher does, is infinitely wrong; nothing is NaN.
    given = some(4, tail=tail)
    given.teacher.ids[:, 0] = torch.arange(4)
    given.teacher.ids[1:, 1:] += 5 - given.teacher.ids[1:, 1:].clamp(max=5)
    given.bias[given.teacher.ids[0]] = -torch.inf
    options = {"divergence": divergence, "reduction": "none"}
    loss, gradients = losses(given.leaves(), **options)
    exact, expected = losses(given.to(torch.float64).leaves(), reference=True, **options)
    assert exact.isinf()[0]
    assert torch.equal(loss.isinf(), exact.isinf())
    assert loss[~exact.isinf()].isfinite().all()
    for name in NAMES:
        assert not gradients[name].isnan().any(), name
    rows = ~exact.isinf()
    assert_near("hidden", gradients["hidden"][rows], expected["hidden"][rows], 4e-6)
    if tail == "renormalize":  # of forward KL -p, else 0
        p = given.teacher.logprobs[0].double().softmax(-1) * (divergence == kd.ForwardKL())
        assert_near("hidden", gradients["hidden"][0], -p @ given.weight[given.teacher.ids[0]].double(), 1e-6)


@EACH_TAIL
def test_rows_without_anything(tail):
    given = some(6, tail=tail)
    given.teacher.ids[1] = -1
    given.teacher.logprobs[1] = torch.nan
    given.teacher.logprobs[2] = -torch.inf
    given.teacher.logprobs[3, 1:] = -torch.inf
    for options in ({}, {"reduction": "none"}, {"workspace_bytes": 1}):
        against_reference(given, **options)
    loss, gradients = losses(given.leaves(), reduction="none")
    empty = [1] if tail == "bucket" else [1, 2]
    assert (loss[empty] == 0).all()
    assert (gradients["hidden"][empty] == 0).all()


@EACH_TAIL
@REDUCTIONS
def test_ids_out_of_range_are_nan_in_their_row(tail, reduction, monkeypatch):
    # On the CPU the public function has raised; elsewhere, and under torch.compile, nobody looks.
    monkeypatch.setattr(_arguments, "out_of_range", lambda *_: torch.zeros((), dtype=torch.bool))
    given = some(5, tail=tail)
    given.teacher.ids[1, 3] = WIDTH
    given.teacher.ids[2] = 2**31 - 1
    labels = torch.tensor([0, 1, 2, 3, -100])
    given.teacher.ids[4] = WIDTH  # of a row that is not read
    loss, gradients = losses(given.leaves(), labels, reduction=reduction)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert loss.isnan().tolist() == [False, True, True, False, False]
    assert gradients["hidden"].isnan().all(-1).tolist() == [False, True, True, False, False]
    assert gradients["hidden"][[0, 3, 4]].isfinite().all()


def test_a_row_of_nan_stays_in_its_row():
    for tail in TAILS:
        given = some(5, tail=tail)
        given.hidden[2] = torch.nan
        loss, gradients = losses(given.leaves(), reduction="none", workspace_bytes=1)
        assert loss.isnan().tolist() == [False, False, True, False, False]
        assert gradients["hidden"].isnan().all(-1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("rows", [(0,), (2, 0)], ids=str)
@EACH_TAIL
@REDUCTIONS
def test_no_rows(rows, tail, reduction):
    teacher = kd.TopKTeacher(torch.zeros(*rows, 3, dtype=torch.int64), torch.zeros(*rows, 3), tail)
    given = operands(*rows, width=20, bias=True)._replace(teacher=teacher).leaves()
    for compact in (False, True):
        loss, gradients = losses(given, reduction=reduction, compact=compact)
        assert loss.shape == (rows if reduction == "none" else ())
        assert (loss == 0).all()
        assert gradients["hidden"].shape == (*rows, 40)
        assert (gradients["weight"] == 0).all()
        assert (gradients["bias"] == 0).all()


@pytest.mark.parametrize("required", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@REDUCTIONS
def test_only_what_requires_grad_gets_one(required, tail, reduction):
    given = padded(some(ROWS, tail=tail))
    for workspace_bytes in (FEW_ROWS, None):
        options = {"reduction": reduction, "workspace_bytes": workspace_bytes}
        against_reference(given, LABELS, required=required, **options)
        _, gradients = losses(given.leaves(required), LABELS, **options)
        assert {name for name, gradient in gradients.items() if gradient is not None} == set(required)


@EACH_TAIL
@REDUCTIONS
def test_incoming_gradients_and_backward_twice(tail, reduction):
    given = padded(some(ROWS, tail=tail))
    incoming = torch.linspace(-1, 2, ROWS) if reduction == "none" else torch.tensor(3.0)
    against_reference(given, LABELS, incoming=incoming, reduction=reduction)
    leaves = given.leaves()
    loss = kd.linear_distillation_loss(
        leaves.hidden, leaves.weight, leaves.teacher, LABELS, student_bias=leaves.bias, reduction=reduction
    )
    first = [x.clone() for x in torch.autograd.grad(loss, leaves[:3], incoming, retain_graph=True)]
    second = torch.autograd.grad(loss, leaves[:3], incoming)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all((a != 0).any() for a in first)


@EACH_TAIL
def test_repeated_runs_agree_bitwise(tail):
    given = padded(some(ROWS, tail=tail, dtype=torch.bfloat16))
    for options in ({}, {"reduction": "none"}, {"workspace_bytes": FEW_ROWS}, {"compact": True}):
        loss, gradients = losses(given.leaves(), LABELS, **options)
        again, others = losses(given.leaves(), LABELS, **options)
        assert torch.equal(loss, again)
        assert all(torch.equal(gradients[name], others[name]) for name in NAMES)


@EACH_TAIL
def test_fp16_gradients_survive_under_a_loss_scale(tail):
    # 1/65536 of a token's gradient is under the smallest half; under a loss scale of 65536 it must not be.
    given = some(64, tail=tail, dtype=torch.float16)
    against_reference(given, incoming=65536.0, normalizer=65536.0, bound=1e-3)


@EACH_TAIL
@pytest.mark.parametrize("compact", [False, True])
@EACH_CHUNK
def test_stats(tail, compact, workspace_bytes):
    given = padded(some(3, 7, tail=tail))
    labels = torch.where(torch.arange(21) % 3 == 0, -100, torch.arange(21)).view(3, 7)

    def call(which, given):
        return which(
            given.hidden, given.weight, given.teacher, labels, student_bias=given.bias, return_stats=True,
            workspace_bytes=workspace_bytes, compact=compact, ce_weight=0.5,
        )  # fmt: skip

    _, expected = call(kd.reference.linear_distillation_loss, given.to(torch.float64))
    for leaves in (given, given.leaves()):  # without gradients and with them
        _, stats = call(kd.linear_distillation_loss, leaves)
        for name, actual, want in zip(stats._fields, stats, expected, strict=True):
            assert (actual is None) == (want is None), name
            if actual is not None:
                assert not actual.requires_grad
                assert_near(name, actual.nan_to_num(neginf=-99), want.nan_to_num(neginf=-99), 4e-6, floor=1e-2)


@EACH_TAIL
@REDUCTIONS
@pytest.mark.parametrize("registered", [False, True])
def test_a_teacher_of_inference_mode(tail, reduction, registered):
    given = padded(some(ROWS, tail=tail))
    expected, exact = losses(given.to(torch.float64).leaves(), LABELS, reference=True, reduction=reduction)
    with torch.inference_mode():
        teacher = given.teacher._replace(ids=given.teacher.ids.clone(), logprobs=given.teacher.logprobs.clone())
    looking_on = FlopCounterMode(display=False) if registered else nullcontext()
    with looking_on:  # a dispatch mode is served by the registered operator
        actual, gradients = losses(given._replace(teacher=teacher).leaves(), LABELS, reduction=reduction)
    assert_near("loss", actual, expected, 2e-6)
    assert_gradients(gradients, exact)


@EACH_TAIL
@REDUCTIONS
def test_autocast_casts_neither_ids_nor_log_probabilities(tail, reduction):
    given = some(ROWS, tail=tail)
    given = given._replace(bias=given.bias.bfloat16().float())
    # Ids that 16 bits do not hold would name other tokens; the log-probabilities have digits beyond theirs.
    rounded = Operands(*(x.bfloat16() for x in given[:3]), given.teacher).to(torch.float64)
    expected, exact = losses(rounded.leaves(), LABELS, reference=True, reduction=reduction)
    leaves = given.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, gradients = losses(leaves, LABELS, reduction=reduction, workspace_bytes=FEW_ROWS)
    assert_near("loss", actual, expected, 4e-6)
    assert gradients["weight"].dtype == torch.float32
    assert_gradients(gradients, exact, bound=2.5e-3)


@EACH_TAIL
def test_activation_checkpointing(tail):
    one, two = some(ROWS, tail=tail).leaves(), some(ROWS, tail=tail).leaves()

    def step(hidden, weight, bias):
        return kd.linear_distillation_loss(torch.tanh(hidden), weight, one.teacher, LABELS, student_bias=bias)

    checkpoint(step, *one[:3], use_reentrant=False).backward()
    step(*two[:3]).backward()
    assert all(torch.equal(one.gradients()[name], two.gradients()[name]) for name in NAMES)


@pytest.mark.parametrize(("tail", "reduction"), [("bucket", "mean"), ("renormalize", "mean"), ("renormalize", "none")])
def test_compile_fullgraph(tail, reduction):
    torch._dynamo.reset()
    made = padded(some(ROWS, tail=tail))

    def step(hidden, weight, bias, ids, logprobs):
        loss = kd.linear_distillation_loss(
            hidden * 1, weight, kd.TopKTeacher(ids, logprobs, tail), LABELS, student_bias=bias, reduction=reduction,
            workspace_bytes=FEW_ROWS, compact=True,
        )  # fmt: skip
        return 2 * loss.sum()

    one, two = made.leaves(), made.leaves()
    expected = step(*one[:3], *made.teacher[:2])
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*two[:3], *made.teacher[:2])
    assert_near("loss", actual, expected, 1e-6)
    expected.backward()
    actual.backward()
    for name, gradient in two.gradients().items():
        assert_near(name, gradient, one.gradients()[name], 2e-6)


def test_compile_dynamic_shapes():
    torch._dynamo.reset()

    def step(hidden, weight, ids, logprobs):
        return kd.linear_distillation_loss(hidden, weight, kd.TopKTeacher(ids, logprobs, "renormalize"))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, width in ((3, 50), (4, 60)):
        made = some(rows, width=width, bias=False)
        one, two = made.leaves(), made.leaves()
        compiled(one.hidden, one.weight, *made.teacher[:2]).backward()
        step(two.hidden, two.weight, *made.teacher[:2]).backward()
        assert_near("hidden", one.hidden.grad, two.hidden.grad, 2e-6)
        assert_near("weight", one.weight.grad, two.weight.grad, 2e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck(tail, per_row):
    given = some(2, 3, tail=tail, width=40, hidden=5, k=4).leaves()
    options = RowOptions(
        divergence="forward_kl",
        parameters=(),
        temperature=1.0,
        kd_weight=0.7,
        ce_weight=0.0,
        scale_by_temperature=True,
        vocab_size=40,
        student_logit_scale=1.0,
        student_softcap=0.0,
        teacher_logit_scale=1.0,
        teacher_softcap=0.0,
        scale_gradient=True,
        tail=tail,
        whole=tail != "renormalize",
    )
    scale = torch.rand(2, 3, generator=torch.Generator().manual_seed(3))
    arguments = (
        *given[:3], given.teacher.logprobs, None, None, None, scale, None, None, given.teacher.ids, "native",
        *ops.packed(options), None, torch.float32, 1, False, per_row, [True, True, True], False,
    )  # fmt: skip
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # Statistics that need all columns are NaN, and the last of these compares them.
    torch.library.opcheck(ops.linear_loss, arguments, test_utils=utils if tail == "bucket" else utils[:-1])


def test_module_is_the_function():
    given = padded(some(ROWS))
    module = kd.LinearDistillationLoss(temperature=2.0, workspace_bytes=FEW_ROWS)
    expected, _ = losses(given, LABELS, temperature=2.0, workspace_bytes=FEW_ROWS)
    assert torch.equal(module(given.hidden, given.weight, given.teacher, LABELS, student_bias=given.bias), expected)


@EACH_TAIL
def test_the_reference_backend_is_the_reference(tail):
    given = padded(some(ROWS, tail=tail))
    expected, gradients = losses(given.leaves(), LABELS, reference=True)
    with kd.backends.use("reference"):
        actual, ours = losses(given.leaves(), LABELS, compact=True, workspace_bytes=1)
    assert torch.equal(actual, expected)
    assert all(torch.equal(ours[name], gradients[name]) for name in NAMES)
