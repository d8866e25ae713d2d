"""The loss from hidden states among what autograd, autocast, torch.compile and checkpointing do."""

from contextlib import nullcontext

import pytest
import torch
from checks import assert_near, relative_error
from linear_cases import NAMES, Operands, assert_gradients, losses, operands
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kdkernels as kd
from kdkernels import ops
from kdkernels.backends.native import RowOptions

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, WIDTH = 23, 200
LABELS = torch.where(torch.arange(ROWS) % 3 == 0, -100, torch.arange(ROWS))
SEVERAL_CHUNKS = 5 * WIDTH * 12
EACH_CHUNK = pytest.mark.parametrize("workspace_bytes", [SEVERAL_CHUNKS, None])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])


def loss_of(given: Operands, labels: torch.Tensor | None = None, **options) -> torch.Tensor:
    return kd.linear_distillation_loss(
        given.hidden, given.weight, given.teacher, labels, student_bias=given.bias, **options
    )


@REDUCTIONS
@EACH_CHUNK
def test_gradcheck_in_float64(reduction, workspace_bytes):
    given = operands(3, width=9, hidden=5, dtype=torch.float64, bias=True, teacher_bias=True)
    teacher, labels = given.teacher, torch.tensor([0, -100, 8])

    def loss(hidden, weight, bias):
        return kd.linear_distillation_loss(
            hidden, weight, teacher, labels, student_bias=bias, divergence="jensen_shannon", temperature=1.7,
            ce_weight=0.3, student_softcap=4.0, reduction=reduction, workspace_bytes=1 if workspace_bytes else None,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, tuple(x.requires_grad_() for x in given[:3]))


@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH_CHUNK
def test_backward_twice_gives_the_same_gradients(reduction, dtype, workspace_bytes):
    given = operands(ROWS, width=WIDTH, dtype=dtype, bias=True).leaves()
    incoming = torch.linspace(-1, 2, ROWS) if reduction == "none" else torch.tensor(3.0)
    loss = loss_of(given, LABELS, reduction=reduction, workspace_bytes=workspace_bytes)
    first = torch.autograd.grad(loss, given[:3], incoming, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, given[:3], incoming, retain_graph=True)
    for x in first:
        x.zero_()  # what a caller does to its gradients is its own affair
    third = torch.autograd.grad(loss, given[:3], incoming)
    for a, b, c in zip(kept, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert (a != 0).any()


@REDUCTIONS
def test_different_incoming_gradients_on_one_graph(reduction):
    given = operands(ROWS, width=WIDTH, bias=True).leaves()
    loss = loss_of(given, LABELS, reduction=reduction)
    one = torch.autograd.grad(loss, given[:3], torch.ones_like(loss), retain_graph=True)
    zero = torch.autograd.grad(loss, given[:3], torch.zeros_like(loss), retain_graph=True)
    four = torch.autograd.grad(loss, given[:3], torch.full_like(loss, 4.0))
    for a, b, c in zip(one, zero, four, strict=True):
        assert (b == 0).all()
        assert_near("four times", c, 4 * a, 1e-6)


@REDUCTIONS
def test_gradients_of_one_operand_at_a_time(reduction):
    # torch.autograd.grad asks for fewer than forward was told of.
    given = operands(ROWS, width=WIDTH, bias=True).leaves()
    loss = loss_of(given, LABELS, reduction=reduction).sum()
    _, expected = losses(given.leaves(), LABELS, reduction=reduction)
    for name, leaf in zip(NAMES, given[:3], strict=True):
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert_near(name, gradient, expected[name], 1e-6)


@REDUCTIONS
def test_double_backward_is_a_clear_error(reduction):
    given = operands(5, width=20).leaves()
    loss = loss_of(given, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="no gradient of a gradient"):
        torch.autograd.grad(loss, given.hidden, create_graph=True)


@REDUCTIONS
@EACH_CHUNK
def test_tied_weights(reduction, workspace_bytes):
    # The output embedding is the input embedding: two gradients add up in one leaf.
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(WIDTH, 40, generator=generator) / 3
    mixing = torch.randn(40, 40, generator=generator) / 6
    tokens = torch.randint(0, WIDTH, (ROWS,), generator=generator)
    teacher = operands(ROWS, width=WIDTH).teacher

    def gradients(which, dtype):
        table, middle = (x.detach().to(dtype, copy=True).requires_grad_() for x in (embedding, mixing))
        hidden = torch.tanh(table[tokens] @ middle)
        of = kd.LinearTeacher(*(x.to(dtype) for x in teacher[:2]))
        which(
            hidden, table, of, LABELS, ce_weight=0.5, reduction=reduction, workspace_bytes=workspace_bytes
        ).sum().backward()
        return table.grad, middle.grad

    actual = gradients(kd.linear_distillation_loss, torch.float32)
    expected = gradients(kd.reference.linear_distillation_loss, torch.float64)
    for name, ours, theirs in zip(("embedding", "mixing"), actual, expected, strict=True):
        assert_near(name, ours, theirs, 4e-6)


def test_gradients_accumulate_in_the_leaves():
    given = operands(ROWS, width=WIDTH, bias=True).leaves()
    for _ in range(3):
        loss_of(given, LABELS).backward()
    _, once = losses(given.leaves(), LABELS)
    for name, gradient in given.gradients().items():
        assert_near(name, gradient, 3 * once[name], 1e-6)


@REDUCTIONS
@pytest.mark.parametrize("teacher_logits", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_a_teacher_of_inference_mode(reduction, teacher_logits, registered):
    given = operands(ROWS, width=WIDTH, teacher_bias=True, teacher_logits=teacher_logits)
    expected, exact = losses(given.to(torch.float64).leaves(), LABELS, reference=True, reduction=reduction)
    with torch.inference_mode():
        teacher = given.teacher.clone() if teacher_logits else kd.LinearTeacher(*(x.clone() for x in given.teacher))
    looking_on = FlopCounterMode(display=False) if registered else nullcontext()
    with looking_on:  # a dispatch mode is served by the registered operator
        actual, gradients = losses(given._replace(teacher=teacher).leaves(), LABELS, reduction=reduction)
    assert_near("loss", actual, expected, 2e-6)
    assert_gradients(gradients, exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
@REDUCTIONS
def test_activation_checkpointing(use_reentrant, reduction):
    given, other = operands(ROWS, width=WIDTH, bias=True).leaves(), operands(ROWS, width=WIDTH, bias=True).leaves()

    def step(hidden, weight, bias):
        teacher = given.teacher
        return kd.linear_distillation_loss(
            torch.tanh(hidden), weight, teacher, LABELS, student_bias=bias, reduction=reduction
        )

    checkpoint(step, *given[:3], use_reentrant=use_reentrant).sum().backward()
    step(*other[:3]).sum().backward()
    for a, b in zip(given[:3], other[:3], strict=True):
        assert torch.equal(a.grad, b.grad)


# Under autocast an fp32 operand's gradient is formed from 16-bit operands, and may be rounded to their dtype itself.
ONE_ROUNDING = 2.5e-3


@pytest.mark.parametrize("teacher_logits", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(teacher_logits, backward_inside, reduction, dtype):
    given = operands(ROWS, width=WIDTH, bias=True, teacher_bias=True, teacher_logits=teacher_logits)
    # A bias is added to logits in fp32: whether it is rounded before is not told from one that 16 bits hold.
    given = given._replace(bias=given.bias.to(dtype).float())
    if not teacher_logits:
        given = given._replace(teacher=given.teacher._replace(bias=given.teacher.bias.to(dtype).float()))
    rounded = given.to(dtype).to(torch.float64)
    if teacher_logits:
        rounded = rounded._replace(teacher=given.teacher.double())  # logits are taken as they come
    expected, exact = losses(rounded.leaves(), LABELS, reference=True, reduction=reduction)
    unrounded, _ = losses(given.to(torch.float64), LABELS, reference=True, reduction=reduction)
    leaves = given.leaves()
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(leaves, LABELS, reduction=reduction, workspace_bytes=SEVERAL_CHUNKS)
        if backward_inside:
            loss.sum().backward()
    if not backward_inside:
        loss.sum().backward()
    assert loss.dtype == torch.float32
    assert_near("loss", loss, expected, 4e-6)
    assert relative_error(loss, expected) < relative_error(loss, unrounded) / 4, "the operands were not rounded"
    for leaf in leaves[:3]:
        assert leaf.grad.dtype == torch.float32
    assert_gradients(leaves.gradients(), exact, bound=ONE_ROUNDING)


@REDUCTIONS
def test_autocast_leaves_what_it_casts_to_alone(reduction):
    given = operands(ROWS, width=WIDTH, dtype=torch.bfloat16, bias=True)
    expected, gradients = losses(given.leaves(), LABELS, reduction=reduction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, ours = losses(given.leaves(), LABELS, reduction=reduction)
    assert torch.equal(actual, expected)
    for name in NAMES:  # autocast reaches into none of the products
        assert ours[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], gradients[name]), name


def test_autocast_brings_dtypes_together():
    # As in a model whose norms run in fp32 and whose lm_head is in bf16.
    given = operands(ROWS, width=WIDTH)
    mixed = given._replace(weight=given.weight.bfloat16())
    expected, exact = losses(given.to(torch.bfloat16).to(torch.float64).leaves(), LABELS, reference=True)
    leaves = mixed.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(leaves, LABELS)
    loss.backward()
    assert_near("loss", loss, expected, 4e-6)
    assert leaves.hidden.grad.dtype == torch.float32
    assert leaves.weight.grad.dtype == torch.bfloat16
    assert_gradients(leaves.gradients(), exact, bound=ONE_ROUNDING)


def test_autocast_does_not_touch_float64():
    given = operands(ROWS, width=WIDTH, dtype=torch.float64)
    expected, _ = losses(given.leaves(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, gradients = losses(given.leaves(), LABELS)
    assert torch.equal(actual, expected)
    assert gradients["hidden"].dtype == torch.float64


COMPILERS = pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])


@COMPILERS
@REDUCTIONS
@pytest.mark.parametrize("teacher_logits", [False, True])
def test_compile_fullgraph(compiler, reduction, teacher_logits):
    if compiler == "inductor" and teacher_logits:
        pytest.skip("one of each is enough of a compiler that takes seconds")
    torch._dynamo.reset()
    made = operands(ROWS, width=WIDTH, bias=True, teacher_logits=teacher_logits)

    def step(hidden, weight, bias, teacher, labels):
        # compact is for eager mode alone; here it changes nothing.
        loss, stats = kd.linear_distillation_loss(
            hidden * 1, weight, kd.LinearTeacher(*teacher) if isinstance(teacher, tuple) else teacher, labels,
            student_bias=bias, divergence=kd.JensenShannon(0.3), temperature=2.0, ce_weight=0.5, reduction=reduction,
            workspace_bytes=SEVERAL_CHUNKS, compact=True, return_stats=True,
        )  # fmt: skip
        return 2 * loss.sum(), stats.divergence

    teacher = made.teacher if teacher_logits else tuple(made.teacher)
    one, two = made.leaves(), made.leaves()
    expected, expected_stat = step(*one[:3], teacher, LABELS)
    actual, stat = torch.compile(step, fullgraph=True, backend=compiler)(*two[:3], teacher, LABELS)
    assert_near("loss", actual, expected, 1e-6)
    assert_near("stat", stat, expected_stat, 1e-6)
    expected.backward()
    actual.backward()
    for name, gradient in two.gradients().items():
        assert_near(name, gradient, one.gradients()[name], 2e-6)


def test_compile_dynamic_shapes():
    torch._dynamo.reset()

    def step(hidden, weight, *teacher):
        return kd.linear_distillation_loss(hidden, weight, kd.LinearTeacher(*teacher), temperature=2.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, width in ((3, 50), (4, 60), (7, 33)):
        made = operands(rows, width=width)
        one, two = made.leaves(), made.leaves()
        compiled(one.hidden, one.weight, *made.teacher[:2]).backward()
        step(two.hidden, two.weight, *made.teacher[:2]).backward()
        assert_near("hidden", one.hidden.grad, two.hidden.grad, 2e-6)
        assert_near("weight", one.weight.grad, two.weight.grad, 2e-6)


def test_compile_under_autocast():
    torch._dynamo.reset()
    made = operands(ROWS, width=WIDTH)

    def step(hidden, weight, teacher_hidden, teacher_weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return kd.linear_distillation_loss(hidden, weight, kd.LinearTeacher(teacher_hidden, teacher_weight), LABELS)

    one, two = made.leaves(), made.leaves()
    step(*one[:2], *made.teacher[:2]).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*two[:2], *made.teacher[:2]).backward()
    for a, b in zip(one[:2], two[:2], strict=True):
        assert b.grad.dtype == torch.float32
        assert_near("gradient", b.grad, a.grad, ONE_ROUNDING)


def operator_arguments(
    given: Operands, *, labels=None, workspace_bytes=None, compact=False, per_row=False, gradients=(True,) * 3,
    mask=None, temperatures=None, weights=None, divergence=None, compute_dtype=None,
):  # fmt: skip
    which = divergence or kd.ForwardKL()
    double = given.hidden.dtype == torch.float64
    rows = given.hidden.shape[:-1]
    scale = torch.rand(
        rows, generator=torch.Generator().manual_seed(3), dtype=torch.float64 if double else torch.float32
    )
    teacher = given.teacher if isinstance(given.teacher, kd.LinearTeacher) else (given.teacher, None, None)
    strong = which.strong_set()
    wanted = [x is not None and x.requires_grad and form for x, form in zip(given[:3], gradients, strict=True)]
    options = RowOptions(
        divergence=which.name,
        parameters=tuple(which.parameters()),
        temperature=1.5,
        kd_weight=0.7,
        ce_weight=0.5 if labels is not None else 0.0,
        scale_by_temperature=True,
        vocab_size=given.weight.shape[0],
        student_logit_scale=1.0,
        student_softcap=0.0,
        teacher_logit_scale=1.0,
        teacher_softcap=0.0,
        scale_gradient=True,
        strong="" if strong is None else strong.name,
        strong_amount=0.0 if strong is None else strong.amount,
    )
    return (
        *given[:3], *teacher, labels, scale, temperatures, weights, mask, "native", *ops.packed(options), compute_dtype,
        torch.float64 if double else torch.float32, workspace_bytes, compact, per_row, wanted, False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("teacher_logits", [False, True])
def test_opcheck(dtype, per_row, teacher_logits):
    made = operands(2, 3, width=40, hidden=5, bias=True, teacher_bias=True, teacher_logits=teacher_logits, dtype=dtype)
    options = {"labels": torch.arange(6).view(2, 3), "workspace_bytes": 1, "per_row": per_row}
    for required in (NAMES, ("weight",)):
        torch.library.opcheck(ops.linear_loss, operator_arguments(made.leaves(required), **options))


def test_opcheck_with_every_tensor():
    made = operands(2, 3, width=40, hidden=5)
    tensors = {"temperatures": torch.rand(2, 3) + 1, "weights": torch.rand(3), "mask": torch.rand(2, 3, 40) < 0.4}
    divergence = kd.Decoupled(kd.Given(tensors["mask"]))
    for per_row in (False, True):
        arguments = operator_arguments(made.leaves(), divergence=divergence, per_row=per_row, **tensors)
        torch.library.opcheck(ops.linear_loss, arguments)
    torch.library.opcheck(ops.linear_loss, operator_arguments(made, divergence=divergence, **tensors))
    under_autocast = operator_arguments(made.leaves(), compute_dtype=torch.bfloat16)
    torch.library.opcheck(ops.linear_loss, under_autocast)
