"""verl's top-k distillation loss against the adapter.

Importing any part of verl imports ray, so its file of losses is loaded by its path, as is ``verl.utils.ulysses``. Of
``verl.workers.config`` it takes two names for its annotations, for which there is a stand-in.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from checks import assert_near, assert_rounded, logits_pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkernels.integrations.verl import compute_forward_kl_topk

VERL = importlib.util.find_spec("verl")
if VERL is None:
    pytest.skip("verl is not installed: `make integrations` installs it", allow_module_level=True)

NAMES = {"distillation_losses", "student_mass", "teacher_mass", "overlap_count", "overlap_token_advantage"}


def installed(name: str) -> ModuleType:
    path = Path(VERL.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ULYSSES = installed("verl.utils.ulysses")
CONFIG = ModuleType("verl.workers.config")
CONFIG.DistillationConfig = CONFIG.DistillationLossConfig = SimpleNamespace
PACKAGES = {name: ModuleType(name) for name in ("verl", "verl.utils", "verl.workers")}
with patch.dict(sys.modules, PACKAGES | {"verl.utils.ulysses": ULYSSES, "verl.workers.config": CONFIG}):
    theirs = installed("verl.trainer.distillation.fsdp.losses").compute_forward_kl_topk


def config(clamp=None, chunked=False):
    loss = SimpleNamespace(log_prob_min_clamp=clamp, use_chunked_topk=chunked, chunked_topk_chunk_size=3)
    return SimpleNamespace(distillation_loss=loss)


def nested(x, lengths=(4, 9)):
    """Two sequences, as verl's jagged tensors hold them."""
    offsets = torch.tensor([0, lengths[0], sum(lengths)])
    return torch.nested.nested_tensor_from_jagged(x[0], offsets)


def batch(rows=13, k=20, vocabulary=1000, dtype=torch.float32):
    student, teacher = logits_pair(1, rows, vocabulary, dtype=dtype)
    log_p, ids = teacher.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1).topk(k)
    return student, nested(log_p), nested(ids.int())


def run(function, student, log_p, ids, options):
    """Everything it returns, and the gradient of the losses under a random weight for each."""
    leaf = student.clone().requires_grad_()
    out = function(leaf, log_p, ids, options, "thd")
    assert out.keys() == NAMES
    weight = torch.randn(out["distillation_losses"].shape, generator=torch.Generator().manual_seed(1))
    (out["distillation_losses"] * weight).sum().backward()
    return out, leaf.grad


def assert_same(actual, expected, bound=2e-6):
    for name in NAMES:
        assert_near(name, actual[0][name], expected[0][name], bound)
    assert torch.equal(actual[0]["overlap_count"], expected[0]["overlap_count"])
    assert_near("gradient", actual[1], expected[1], bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chunked", [False, True], ids=["", "chunked"])
@pytest.mark.parametrize("clamp", [None, -10.0, -7.0, -2.0, -1e-3])
def test_values_and_gradient(dtype, chunked, clamp):
    # verl's losses are fp32 from fp64 logits too, and its chunks are fp32 inside: 2e-6 is all it allows.
    student, log_p, ids = batch(dtype=dtype)
    options = config(clamp, chunked)
    expected, actual = (run(f, student, log_p, ids, options) for f in (theirs, compute_forward_kl_topk))
    assert_same(actual, expected)
    assert expected[0]["distillation_losses"].dtype == torch.float32
    assert actual[0]["distillation_losses"].dtype == dtype
    assert (actual[0]["overlap_count"] > 0).any()


def test_the_clamp_matters():
    student, log_p, ids = batch()
    log_q = student.log_softmax(-1).gather(-1, ids.values()[None].long())
    assert 0.1 < (log_q < -7).float().mean() < 0.9
    assert (log_p.values() < -2).any()
    free, clamped = (run(compute_forward_kl_topk, student, log_p, ids, config(c)) for c in (None, -7.0))
    assert (free[0]["distillation_losses"] > clamped[0]["distillation_losses"]).any()
    assert (free[1] - clamped[1]).norm() > 0.01 * free[1].norm()


def test_every_token_below_the_clamp():
    student, log_p, ids = batch()
    actual, expected = (run(f, student, log_p, ids, config(0.0)) for f in (compute_forward_kl_topk, theirs))
    assert (actual[0]["distillation_losses"] == 0).all()
    assert_same(actual, expected)
    assert (actual[1] == 0).all()


def test_a_gradient_through_the_losses_alone():
    """verl's masses carry a graph, which nothing of it uses."""
    student, log_p, ids = batch()
    for clamp in (None, -7.0):
        outs = [
            f(student.requires_grad_(), log_p, ids, config(clamp), "thd") for f in (theirs, compute_forward_kl_topk)
        ]
        attached = [{name for name, value in out.items() if value.requires_grad} for out in outs]
        assert attached == [{"distillation_losses", "student_mass", "overlap_token_advantage"}, {"distillation_losses"}]
    with torch.no_grad():
        assert not compute_forward_kl_topk(student, log_p, ids, config(), "thd")["distillation_losses"].requires_grad


@pytest.mark.parametrize("clamp", [None, -7.0])
def test_bf16(clamp):
    """Against verl on the same logits in fp32; on bf16 ones it rounds every logarithm to three digits."""
    student, log_p, ids = batch(dtype=torch.bfloat16)
    expected = run(theirs, student.float(), log_p, ids, config(clamp))
    actual = run(compute_forward_kl_topk, student, log_p, ids, config(clamp))
    assert_near("losses", actual[0]["distillation_losses"], expected[0]["distillation_losses"], 2e-6)
    assert_near("mass", actual[0]["student_mass"], expected[0]["student_mass"], 2e-6)
    # The gradient is rounded to bf16, then times each loss's weight once more.
    assert_near("gradient", actual[1], expected[1], 4e-3)
    leaf = student.clone().requires_grad_()
    compute_forward_kl_topk(leaf, log_p, ids, config(clamp), "thd")["distillation_losses"].sum().backward()
    exact = student.double().requires_grad_()
    compute_forward_kl_topk(exact, log_p, ids, config(clamp), "thd")["distillation_losses"].sum().backward()
    assert_rounded("gradient", leaf.grad, exact.grad, 4e-6)
    rounded = run(theirs, student, log_p, ids, config(clamp))[0]["distillation_losses"]
    with pytest.raises(AssertionError, match="relative error"):
        assert_near("verl's losses", rounded, expected[0]["distillation_losses"], 1e-3)


def test_views_of_logits_and_teachers_that_are_not_nested():
    student, teacher = logits_pair(2, 6, 300)
    log_p, ids = teacher[:, :-1].log_softmax(-1).topk(8)
    leaf = student.requires_grad_()
    out = compute_forward_kl_topk(leaf[:, :-1], log_p, ids, config(), "bshd")
    q = student.detach()[:, :-1].log_softmax(-1).gather(-1, ids)
    assert_near("losses", out["distillation_losses"], (log_p.exp() * (log_p - q)).sum(-1), 2e-6)
    out["distillation_losses"].sum().backward()
    assert (leaf.grad[:, -1] == 0).all()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("clamp", [None, -7.0])
def test_sequence_parallel(monkeypatch, rank, clamp):
    """13 rows over two ranks: verl appends a row of id 0 and log-probability 0, K times each."""
    student, log_p, ids = batch()
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", ULYSSES)
    monkeypatch.setattr(ULYSSES, "_ULYSSES_SEQUENCE_PARALLEL_GROUP", "the group")
    two = SimpleNamespace(get_world_size=lambda group: 2, get_rank=lambda group: rank)
    monkeypatch.setattr(ULYSSES, "dist", two)
    padded = torch.cat([student, torch.zeros(1, 1, 1000)], 1)
    part = padded[:, 7 * rank : 7 * rank + 7]
    valid = 7 - rank
    compared = []
    for function in (compute_forward_kl_topk, theirs):
        out, gradient = run(function, part, log_p, ids, config(clamp))
        assert all(value.shape == (1, 7) for value in out.values())
        assert gradient.isfinite().all()
        compared.append(({name: value[:, :valid] for name, value in out.items()}, gradient[:, :valid]))
    assert_same(*compared)


@pytest.mark.parametrize("clamp", [None, -5.0])
def test_a_repeated_id(clamp):
    """The first counts in the loss, where verl counts each; in the other figures each counts."""
    student, log_p, ids = batch(k=3)
    ids.values()[:, 2] = ids.values()[:, 0]
    student.scatter_(-1, ids.values()[None].long(), 9.0)  # above the clamp
    actual, expected = (run(f, student, log_p, ids, config(clamp))[0] for f in (compute_forward_kl_topk, theirs))
    for name in NAMES - {"distillation_losses"}:
        assert_near(name, actual[name], expected[name], 2e-6)
    alone = torch.nested.nested_tensor_from_jagged(ids.values()[:, :2], ids.offsets())
    first = torch.nested.nested_tensor_from_jagged(log_p.values()[:, :2], log_p.offsets())
    once = run(theirs, student, first, alone, config(clamp))[0]
    assert_near("losses", actual["distillation_losses"], once["distillation_losses"], 2e-6)
    assert not torch.allclose(expected["distillation_losses"], once["distillation_losses"])


def test_a_token_the_teacher_forbids():
    student, log_p, ids = batch()
    log_p.values()[:, 5] = -torch.inf
    assert theirs(student, log_p, ids, config(), "thd")["distillation_losses"].isnan().all()
    out, gradient = run(compute_forward_kl_topk, student, log_p, ids, config())
    assert all(value.isfinite().all() for value in out.values())
    assert gradient.isfinite().all()
    assert_same(*(run(f, student, log_p, ids, config(-7.0)) for f in (compute_forward_kl_topk, theirs)))


def test_no_rows_and_wrong_rows():
    student, log_p, ids = batch()
    empty = student[:, :0].requires_grad_()
    out = compute_forward_kl_topk(empty, log_p.values()[None, :0], ids.values()[None, :0], config(-7.0), "thd")
    assert all(value.shape == (1, 0) for value in out.values())
    out["distillation_losses"].sum().backward()
    with pytest.raises(ValueError, match=r"teacher\.ids"):
        compute_forward_kl_topk(student[:, :-1], log_p, ids, config(), "thd")


class Allocations(TorchDispatchMode):
    """The memory of every result as large as ``least`` elements."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.at = least, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() >= self.least:
                self.at.add(x.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("clamp", [None, -7.0])
def test_nothing_of_the_size_of_the_vocabulary_but_the_gradient(clamp):
    student, log_p, ids = batch()
    student.requires_grad_()
    sizes = []
    for function in (compute_forward_kl_topk, theirs):
        with Allocations(student.numel()) as allocations:
            out = function(student, log_p, ids, config(clamp), "thd")  # kept: freed memory would be used again
        sizes.append(len(allocations.at - {student.untyped_storage().data_ptr()}))
        del out
    assert sizes[0] <= 1 <= sizes[1]
