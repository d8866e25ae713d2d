"""The adapters on a GPU: against themselves in fp64 on the CPU, and without waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from checks import assert_near, assert_rounded
from gpu_tools import synchronisations
from torch import Tensor

from kdkernels.integrations import (
    distillkit,
    liger,
    mdistiller,
    modelopt,
    nemo_automodel,
    torchtune,
    transformers,
    trl,
    verl,
)

pytestmark = pytest.mark.gpu


def _given(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 16, 1003, generator=generator).mul(2).to(dtype).unbind()
    labels = torch.randint(0, 1003, (3, 16), generator=generator)
    labels[:, :4] = -100
    return student, teacher, labels


@functools.cache
def items(device: torch.device) -> Tensor:
    """num_items_in_batch as the trainers give it: there already."""
    return torch.tensor(40, device=device)


@functools.cache
def _topk(device: torch.device) -> tuple[Tensor, Tensor]:
    """A teacher's top k, the same on every device: of fp32 logits, which have no ties."""
    values, ids = _given(torch.float32)[1].log_softmax(-1).topk(16)
    return values.to(device), ids.to(device)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the student's and the teacher's logits, and labels


def _verl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    values, ids = _topk(student.device)
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=-10.0))
    found = verl.compute_forward_kl_topk(student, values, ids, config, "bshd")
    return found["distillation_losses"].sum()


def _distillkit(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    values, ids = _topk(student.device)
    return distillkit.sparse_kl_div(student, ids, values, labels != -100, missing="symmetric_uniform")


def _of_log_probabilities(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return loss(student.flatten(0, 1).log_softmax(-1), teacher.flatten(0, 1).log_softmax(-1))


def _trainer(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    model = torch.nn.Identity()
    loss = transformers.DistillationLossFunction(model, lambda x: teacher, temperature=2.0)
    return loss({"logits": model(student)}, labels, num_items_in_batch=items(student.device))


LOSSES: dict[str, Loss] = {
    "TRL": lambda s, t, labels: trl.generalized_jsd_loss(
        s, t, labels, beta=0.5, temperature=2.0, num_items_in_batch=items(s.device)
    ),
    "transformers": _trainer,
    "torchtune": lambda s, t, labels: torchtune.SymmetricKLLoss(0.3)(
        s.flatten(0, 1), t.flatten(0, 1), labels.flatten()
    ),
    "ModelOpt": lambda s, t, labels: modelopt.LogitsDistillationLoss(2.0, "batchmean")(s, t),
    "NeMo Automodel": lambda s, t, labels: nemo_automodel.KDLoss(temperature=2.0)(s, t, labels, 40),
    "verl": _verl,
    "DistillKit": _distillkit,
    "mdistiller": lambda s, t, labels: mdistiller.dkd_loss(
        s.flatten(0, 1), t.flatten(0, 1), labels.flatten().clamp_min(0), 1.0, 8.0, 4.0
    ),
    "Liger, log-probabilities": _of_log_probabilities,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_as_in_double_on_the_cpu(name, dtype):
    student, teacher, labels = _given(dtype)
    exact = student.double().requires_grad_()
    expected = LOSSES[name](exact, teacher.double(), labels)
    expected.backward()
    leaf = student.cuda().requires_grad_()
    loss = LOSSES[name](leaf, teacher.cuda(), labels.cuda())
    loss.backward()
    # Its log_softmax and that one's backward are torch's, in the logits' dtype.
    rounded_before = name == "Liger, log-probabilities" and dtype == torch.bfloat16
    assert abs(loss.item() / expected.item() - 1) <= (1e-3 if rounded_before else 4e-6)
    if dtype == torch.float32:
        assert_near("gradient", leaf.grad.cpu(), exact.grad, 4e-6)
    elif rounded_before:
        assert_near("gradient", leaf.grad.cpu(), exact.grad, 1e-2)
    else:
        assert_rounded("gradient", leaf.grad.cpu(), exact.grad, 2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_host_does_not_wait(name):
    student, teacher, labels = (tensor.cuda() for tensor in _given(torch.float32))
    leaf = student.requires_grad_()
    LOSSES[name](leaf, teacher, labels).backward()  # what happens once is over
    with synchronisations("error"):
        LOSSES[name](leaf, teacher, labels).backward()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("whole", [True, False], ids=["loss", "per token"])
def test_from_hidden_states(beta, whole):
    """TRL's chunked loss, in bf16: against fp64 of the same operands."""
    generator = torch.Generator().manual_seed(3)
    hidden, teacher = (torch.randn(40, size, generator=generator) for size in (64, 96))
    weight, teacher_weight = (torch.randn(1003, size, generator=generator) / size**0.5 for size in (64, 96))
    mask = (torch.rand(40, generator=generator) < 0.7).long()
    operands = [tensor.bfloat16() for tensor in (hidden, teacher, weight, teacher_weight)]

    def losses(h: Tensor, t: Tensor, w: Tensor, tw: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if whole:
            loss, entropy, count = trl.chunked_divergence_loss(h, t, w, tw, mask, beta, temperature=2.0)
            assert count == mask.sum()
            return loss, entropy
        divergence, entropy = trl.ChunkedDivergenceFunction.apply(h, w, None, t, tw, None, beta, 2.0)
        return (divergence * mask).sum(), (entropy * mask).sum()

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        h, t, w, tw = (tensor.to(device, dtype) for tensor in operands)
        h.requires_grad_()
        w.requires_grad_()
        loss, entropy = losses(h, t, w, tw, mask.to(device))
        loss.backward()
        return [value.detach().double().cpu() for value in (loss, entropy, h.grad, w.grad)]

    loss, entropy, of_hidden, of_weight = run("cuda", torch.bfloat16)
    exact_loss, exact_entropy, exact_of_hidden, exact_of_weight = run("cpu", torch.float64)
    assert abs(loss / exact_loss - 1) <= 1e-4
    assert abs(entropy / exact_entropy - 1) <= 1e-5
    assert_near("dX", of_hidden, exact_of_hidden, 5e-3)
    assert_near("dW", of_weight, exact_of_weight, 5e-3)
