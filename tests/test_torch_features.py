"""Both losses among torch's machinery: compiled once whatever changes, registered, checkpointed, on several ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import ranks
import torch
from checks import assert_near
from feature_cases import EACH_CASE, EACH_LOSS, TOKENS, Batch, Student, batch, loss_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels import ops
from kdkernels.backends.native import RowOptions

# --- torch.compile ---


class Compiled:
    """A step compiled whole, for any sizes: its value and gradients are eager mode's, and how often that took."""

    def __init__(self, step, *, dynamic: bool | None = True, backend: str = "aot_eager") -> None:
        torch._dynamo.reset()
        self.step = step
        self.counter = CompileCounterWithBackend(backend)
        self.compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=self.counter)

    def check(self, given: Batch, *, slack: float = 1.0, **options) -> int:
        """Fails unless this batch comes out as in eager mode; how many graphs were compiled up to now."""
        one, two = given.leaves(), given.leaves()
        actual, expected = self.compiled(one, **options), self.step(two, **options)
        assert_near("loss", actual, expected, slack * 1e-6)
        actual.sum().backward()
        expected.sum().backward()
        for ours, theirs in zip(one.gradients(), two.gradients(), strict=True):
            assert_near("gradient", ours, theirs, slack * 2e-6)
        return self.counter.frame_count


def step_of(loss: str, case: str, given: Batch, **options) -> Tensor:
    first, *others = given.student
    return 2 * loss_of(loss, case, given._replace(student=(torch.tanh(first), *others)), **options)


NUMBERS = {
    "floats": {"temperature": 1.5, "kd_weight": 0.9, "ce_weight": 0.1, "strong": 0.5, "normalizer": 7},
    "tensors": {
        "temperature": torch.tensor(1.5),
        "kd_weight": 0.9,
        "ce_weight": 0.1,
        "strong": torch.tensor(0.5),
        "normalizer": torch.tensor(7),
    },
}


def like(number: float | Tensor, value: float) -> float | Tensor:
    return torch.full_like(number, value) if isinstance(number, Tensor) else type(number)(value)


@EACH_LOSS
@EACH_CASE
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_compiled_once(loss, case, numbers):
    step = Compiled(partial(step_of, loss, case))
    given, numbers = batch(loss, case, 3, 7), dict(numbers)
    once = step.check(given, **numbers)
    for name, value in [
        ("temperature", 2.0), ("temperature", 0.7), ("kd_weight", 0.4), ("kd_weight", -0.5), ("ce_weight", 0.6),
        ("strong", 2.0), ("strong", 0.25), ("normalizer", 11), ("normalizer", 23),
    ]:  # fmt: skip
        numbers[name] = like(numbers[name], value)
        assert step.check(given, **numbers) == once, f"another {name} was compiled again"
    for rows in ((3, 9), (2, 4)):
        assert step.check(batch(loss, case, *rows), **numbers) == once, "another number of tokens was compiled again"


@EACH_LOSS
def test_a_temperature_per_token_is_compiled_once(loss):
    step = Compiled(partial(step_of, loss, "dense"))
    for rows in (5, 9, 9):
        temperature = torch.rand(rows) + 0.5
        assert step.check(batch(loss, "dense", rows), temperature=temperature, reduction="none") == 1


def test_numbers_of_divergence_set_and_logits_are_compiled_once():
    def step(given: Batch, beta: float, k: int, mass: float, scale: float, cap: float) -> Tensor:
        call = partial(loss_of, "logits", "dense", given, student_logit_scale=scale, teacher_softcap=cap)
        return (
            call(divergence=kd.JensenShannon(beta))
            + call(divergence=kd.Decoupled(kd.TopK(k), wcd=beta))
            + call(divergence=kd.CAKD(1.0, torch.tensor(2.0), kd.TopP(mass)))
        )

    compiled = Compiled(step)
    given = batch("logits", "dense", 7)
    for numbers in ((0.3, 3, 0.5, 0.5, 20.0), (0.6, 4, 0.5, 0.7, 9.0), (0.6, 9, 0.25, 2.0, 12.5)):
        assert compiled.check(given, **dict(zip(("beta", "k", "mass", "scale", "cap"), numbers, strict=True))) == 1


# By default the compiler takes a number for a constant until it sees another.
@pytest.mark.parametrize(("loss", "reduction"), [("logits", "mean"), ("hidden", "none")])  # which computes twice
def test_by_default_the_first_change_is_compiled_again(loss, reduction):
    step = Compiled(partial(step_of, loss, "dense", reduction=reduction), dynamic=None)
    given = batch(loss, "dense", 7)
    weights = [0.9, 0.8, 0.6, 0.3]
    counts = [step.check(given, temperature=2 * w, kd_weight=w, ce_weight=1 - w) for w in weights]
    assert counts == [1, 2, 2, 2]
    step = Compiled(partial(step_of, loss, "dense", reduction=reduction), dynamic=None)
    assert [step.check(given, temperature=torch.tensor(w)) for w in weights] == [1, 1, 1, 1]


def test_cross_entropy_that_comes_in_is_another_graph():
    step = Compiled(partial(step_of, "logits", "dense"))
    given = batch("logits", "dense", 7)
    assert [step.check(given, ce_weight=w) for w in (0.0, 0.25, 0.5)] == [1, 2, 2]


def test_a_sparse_tail_that_knows_one_temperature_is_compiled_once():
    def step(given: Batch, temperature: float) -> Tensor:
        teacher = kd.TopKTeacher(*given.teacher, "bucket", temperature)
        return kd.distillation_loss(*given.student, teacher, given.labels, temperature=temperature)

    compiled = Compiled(step)
    given = batch("logits", "sparse", 7)
    once = compiled.check(given, temperature=1.5)
    assert [compiled.check(given, temperature=t) for t in (2.0, 0.75)] == [once, once]


# --- The registered operators ---


def options_of(case: str, given: Batch, *, tail: str = "bucket") -> RowOptions:
    sparse = case == "sparse"
    divergence = kd.CAKD(0.5, 1.5, kd.TopK(5)).canonical() if case == "decoupled" else kd.JensenShannon(0.3)
    if sparse:
        divergence = kd.ForwardKL()
    strong = divergence.strong_set()
    return RowOptions(
        divergence=divergence.name,
        parameters=divergence.parameters(),
        temperature=1.0 if sparse else 1.5,
        kd_weight=0.7,
        ce_weight=0.5,
        scale_by_temperature=True,
        vocab_size=given.student[-1].shape[-1 if len(given.student) == 1 else 0],
        student_logit_scale=1.0,
        student_softcap=0.0,
        teacher_logit_scale=1.0,
        teacher_softcap=0.0,
        scale_gradient=True,
        strong="" if strong is None else strong.name,
        strong_amount=0.0 if strong is None else strong.amount,
        tail=tail if sparse else "",
    )


def operator_arguments(loss: str, case: str, given: Batch, options: RowOptions, *, per_row: bool = False) -> tuple:
    *teacher, last = given.teacher
    ids = teacher.pop() if case == "sparse" else None
    scale = torch.rand(given.labels.shape, generator=torch.Generator().manual_seed(3))
    labels = given.labels.clamp_min(0)
    if loss == "logits":
        return (*given.student, last, labels, scale, None, None, ids, "native", *ops.packed(options), True, False)
    of_teacher = (last, None, None) if case == "sparse" else (*teacher, last, None)
    return (
        *given.student, None, *of_teacher, labels, scale, None, None, ids, "native", *ops.packed(options), None,
        torch.float32, None, False, per_row, [True, True, False], False,
    )  # fmt: skip


def strided(given: Batch) -> Batch:
    """Leaves without the last token of each sequence: views whose rows do not lie evenly."""
    weight, of_teacher = given.student[1:], given.teacher[1:]
    if of_teacher and of_teacher[0].dim() > 2:  # log-probabilities
        of_teacher = (of_teacher[0][:, :-1],)
    return Batch(
        (given.student[0].detach()[:, :-1].requires_grad_(), *weight),
        (given.teacher[0][:, :-1], *of_teacher),
        given.labels[:, :-1],
    )


@EACH_LOSS
@EACH_CASE
def test_opcheck_of_rows_that_do_not_lie_evenly(loss, case):
    given = strided(batch(loss, case, 2, 4, width=29).leaves())
    options = options_of(case, given)
    torch.library.opcheck(
        ops.row_loss if loss == "logits" else ops.linear_loss, operator_arguments(loss, case, given, options)
    )


def as_numbers(options: RowOptions) -> Tensor:
    numbers = [getattr(options, name) for name in ops.NUMBERS]
    return torch.tensor([*numbers, *options.parameters], dtype=torch.float64)


@EACH_LOSS
@EACH_CASE
def test_numbers_in_a_tensor_are_those_of_the_options(loss, case):
    plain, changing = {
        "logits": (ops.row_loss, ops.row_loss_changing), "hidden": (ops.linear_loss, ops.linear_loss_changing)
    }[loss]  # fmt: skip
    given = batch(loss, case, 7, width=29)
    options = options_of(case, given)
    others = replace(options, temperature=9.0, kd_weight=0.0, ce_weight=0.1, strong_amount=1.0)
    for per_row in (False, True) if loss == "hidden" else (False,):
        one, two = given.leaves(), given.leaves()
        expected = plain(*operator_arguments(loss, case, one, options, per_row=per_row))[0]
        arguments = operator_arguments(loss, case, two, others, per_row=per_row)
        actual = changing(as_numbers(options), *arguments)[0]
        assert torch.equal(actual, expected)
        actual.sum().backward()
        expected.sum().backward()
        for ours, theirs in zip(two.gradients(), one.gradients(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("loss", "per_row"), [("logits", False), ("hidden", False), ("hidden", True)])
def test_opcheck_of_changing_numbers(loss, per_row):
    given = strided(batch(loss, "decoupled", 2, 4, width=29).leaves())
    options = options_of("decoupled", given)
    torch.library.opcheck(
        ops.row_loss_changing if loss == "logits" else ops.linear_loss_changing,
        (as_numbers(options), *operator_arguments(loss, "decoupled", given, options, per_row=per_row)),
    )


# --- A model ---


@EACH_LOSS
@EACH_CASE
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(loss, case, use_reentrant):
    given = batch(loss, case, 3, 7)
    models = [Student(), Student()]

    def step(model: Student, embedded: Tensor) -> Tensor:
        return loss_of(loss, case, given._replace(student=model.head(loss, model.body(embedded))), ce_weight=0.3)

    for model, again in zip(models, (True, False), strict=True):
        embedded = model.embedding(TOKENS)
        call = partial(checkpoint, step, model, use_reentrant=use_reentrant) if again else partial(step, model)
        call(embedded).backward()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# A gradient that is rounded to bf16 once.
ONE_ROUNDING = 2.5e-3


@EACH_LOSS
@EACH_CASE
def test_autocast(loss, case):
    model, given = Student(), batch(loss, case, 3, 7)
    options = {"temperature": 2.0, "ce_weight": 0.3}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = model.head(loss, model.body(model.embedding(TOKENS)))
        actual = loss_of(loss, case, given._replace(student=student), **options)
    assert student[0].dtype == torch.bfloat16
    for x in student:
        x.retain_grad()
    actual.backward()
    # What the products see: bf16, the teacher's operands too; logits and log-probabilities as they come.
    exact = given._replace(student=tuple(x.bfloat16().double() for x in student)).leaves()
    if loss == "hidden" and case != "sparse":
        exact = exact._replace(teacher=tuple(x.bfloat16() for x in given.teacher))
    exact = exact._replace(teacher=tuple(x.double() if x.is_floating_point() else x for x in exact.teacher))
    expected = loss_of(loss, case, exact, reference=True, **options)
    expected.backward()
    assert actual.dtype == torch.float32
    assert_near("loss", actual, expected, 4e-6)
    for x, gradient in zip(student, exact.gradients(), strict=True):
        assert x.grad.dtype == x.dtype
        assert_near("gradient", x.grad, gradient, ONE_ROUNDING)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)
def test_ranks_with_unequal_tokens_are_one_batch(tmp_path):
    torch.multiprocessing.spawn(ranks.train, (tmp_path,), nprocs=ranks.RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks.RANKS)]
    for name, expected in ranks.of_one_process().items():
        for of_rank in found:
            for ours, theirs in zip(of_rank[name], expected, strict=True):
                assert_near(f"gradient of {name}", ours, theirs, 2e-6)
