"""Both losses among torch's machinery on a GPU: whole steps in CUDA graphs, captured by hand and by torch.compile."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from checks import assert_near
from feature_cases import EACH_CASE, EACH_LOSS, Batch, batch, loss_of
from gpu_tools import captured, synchronisations
from test_torch_features import Compiled, step_of
from torch import Tensor

pytestmark = pytest.mark.gpu

ROWS, WIDTH, HIDDEN = 90, 5008, 64


def some(loss: str, case: str, *rows: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Batch:
    return batch(loss, case, *(rows or (ROWS,)), width=WIDTH, hidden=HIDDEN, dtype=dtype, device="cuda", seed=seed)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are older than the side stream
@EACH_LOSS
@EACH_CASE
def test_a_captured_step_replayed_with_everything_changed(backend, loss, case):
    static = some(loss, case).leaves()
    settings = {
        "temperature": torch.linspace(0.5, 3.0, ROWS, device="cuda"),
        "weight": torch.linspace(0.0, 2.0, ROWS, device="cuda"),
        "normalizer": torch.tensor(70.0, device="cuda"),
        "strong": torch.tensor(0.5, device="cuda"),
    }

    def step() -> Tensor:
        for x in static.student:
            x.grad = None
        value = loss_of(loss, case, static, ce_weight=0.3, **settings)
        (2.0 * value).backward()
        return value.detach()

    graph, replayed = captured(step)
    gradients = static.gradients()
    graph.replay()
    before = replayed.clone()

    static.copy_(some(loss, case, seed=1))
    settings["temperature"].copy_(settings["temperature"].flip(0))
    settings["weight"].copy_(settings["weight"].flip(0))
    settings["normalizer"].fill_(33.0)
    settings["strong"].fill_(2.0)
    for _ in range(2):
        graph.replay()
    replayed, gradients = replayed.clone(), [x.clone() for x in gradients]
    expected = step()
    torch.cuda.synchronize()
    assert not torch.equal(replayed, before)
    assert torch.equal(replayed, expected)
    for ours, theirs in zip(gradients, static.gradients(), strict=True):
        assert theirs.any()
        assert torch.equal(ours, theirs)


# Numbers that change reach the kernels through a tensor on the CPU: see kdkernels.ops.
WEIGHTS = (0.9, 0.6, 0.25)


def numbers_for(weight: float) -> dict[str, float]:
    return {"temperature": 2 * weight, "kd_weight": weight, "ce_weight": 1 - weight, "strong": 3 * weight}


@EACH_LOSS
@EACH_CASE
def test_compiled_numbers_change(loss, case):
    step = Compiled(partial(step_of, loss, case), dynamic=None, backend="inductor")
    given = some(loss, case, dtype=torch.float32)
    counts = [step.check(given, slack=10, **numbers_for(weight)) for weight in WEIGHTS]
    assert counts == [1, 2, 2]


@EACH_LOSS
def test_compiled_numbers_that_change_do_not_wait_for_the_device(loss):
    step = Compiled(partial(step_of, loss, "dense"), dynamic=None, backend="inductor")
    given = some(loss, "dense", dtype=torch.float32)
    for weight in WEIGHTS[:2]:
        step.check(given, slack=10, **numbers_for(weight))
    leaves = given.leaves()
    with synchronisations("error"):
        step.compiled(leaves, **numbers_for(WEIGHTS[2])).backward()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # the compiler's first, which holds its memory
@pytest.mark.parametrize("tensors", [False, True])
@EACH_LOSS
def test_the_compilers_own_cuda_graphs_keep_no_number(loss, tensors):
    torch._dynamo.reset()
    step = partial(step_of, loss, "decoupled")
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    given = some(loss, "decoupled", dtype=torch.float32)
    for weight in WEIGHTS:
        numbers: dict[str, float | Tensor] = {**numbers_for(weight)}
        if tensors:
            for name in ("temperature", "strong"):
                numbers[name] = torch.tensor(numbers[name], device="cuda")
            numbers |= {"kd_weight": 0.7, "ce_weight": 0.3}
        for _ in range(3):  # runs, is captured, is replayed
            torch.compiler.cudagraph_mark_step_begin()
            one, two = given.leaves(), given.leaves()
            actual, expected = compiled(one, **numbers), step(two, **numbers)
            actual.backward()
            expected.backward()
            assert_near("loss", actual, expected, 1e-5)
            for ours, theirs in zip(one.gradients(), two.gradients(), strict=True):
                assert_near("gradient", ours, theirs, 2e-5)
            del actual, one  # in the graphs' memory
