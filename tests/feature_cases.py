"""Both losses, each of a dense teacher, a decoupled divergence and a sparse teacher, for tests of torch's machinery."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from checks import logits_pair
from linear_cases import operands
from sparse_cases import top_k
from torch import Tensor, nn

import kdkernels as kd

LOSSES = ("logits", "hidden")
CASES = ("dense", "decoupled", "sparse")
EACH_LOSS = pytest.mark.parametrize("loss", LOSSES)
EACH_CASE = pytest.mark.parametrize("case", CASES)
WIDTH, HIDDEN = 53, 8


class Batch(NamedTuple):
    """What a loss gets that is a tensor."""

    student: tuple[Tensor, ...]  # logits (..., V); or hidden states (..., H) and weight (V, H)
    teacher: tuple[Tensor, ...]  # logits; hidden states and weight; or ids and log-probabilities (..., K)
    labels: Tensor  # (...)

    def leaves(self) -> Batch:
        """The same numbers, of which the student's require grad."""
        return self._replace(student=tuple(x.detach().clone().requires_grad_() for x in self.student))

    def gradients(self) -> list[Tensor]:
        assert all(x.grad is not None for x in self.student)
        return [x.grad for x in self.student if x.grad is not None]

    def copy_(self, other: Batch) -> None:
        with torch.no_grad():
            for ours, theirs in zip((*self.student, *self.teacher, self.labels), other.flat(), strict=True):
                ours.copy_(theirs)

    def flat(self) -> tuple[Tensor, ...]:
        return (*self.student, *self.teacher, self.labels)


def batch(
    loss: str,
    case: str,
    *rows: int,
    width: int = WIDTH,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    """A batch of its own numbers for each seed; every fourth label is ignored."""
    labels = torch.randint(0, width, rows, generator=torch.Generator().manual_seed(seed))
    labels.view(-1)[1::4] = -100
    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    if loss == "logits":
        logits, of_teacher = logits_pair(*rows, width, dtype=dtype, seed=seed)
        student, teacher = (logits,), (of_teacher,)
    else:
        made = operands(*rows, width=width, hidden=hidden, teacher_hidden=hidden + 8, dtype=dtype, seed=seed)
        student, teacher = (made.hidden, made.weight), tuple(made.teacher[:2])
        of_teacher = teacher[0].float() @ teacher[1].float().T
    if case == "sparse":
        teacher = tuple(top_k(of_teacher.float(), 10)[:2])
    return Batch(tuple(x.to(device) for x in student), tuple(x.to(device) for x in teacher), labels.to(device))


def loss_of(
    loss: str,
    case: str,
    given: Batch,
    *,
    strong: float | Tensor = 0.5,
    tail: str = "renormalize",
    reference: bool = False,
    **options,
) -> Tensor:
    """``strong``: the decoupled divergence's weight of its strong set."""
    teacher: Tensor | kd.LinearTeacher | kd.TopKTeacher = given.teacher[0]
    if case == "sparse":
        teacher = kd.TopKTeacher(*given.teacher, tail)
    elif loss == "hidden":
        teacher = kd.LinearTeacher(*given.teacher)
    if case == "decoupled":
        options["divergence"] = kd.CAKD(strong, 1.5, kd.TopK(5))
    where = kd.reference if reference else kd
    which = where.distillation_loss if loss == "logits" else where.linear_distillation_loss
    return which(*given.student, teacher, given.labels, **options)


TOKENS = torch.randint(0, WIDTH, (3, 7), generator=torch.Generator().manual_seed(1))


class Student(nn.Module):
    """A model of two layers and no attention, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(WIDTH, HIDDEN)
        self.mixing = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, WIDTH, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def body(self, embedded: Tensor) -> Tensor:
        return torch.tanh(self.mixing(embedded))

    def head(self, loss: str, hidden: Tensor) -> tuple[Tensor, ...]:
        """What a loss is told of the student: logits, or hidden states and weight."""
        return (self.lm_head(hidden),) if loss == "logits" else (hidden, self.lm_head.weight)

    def forward(self, loss: str, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.head(loss, self.body(self.embedding(tokens)))
