"""The logits or hidden states of a case, and what is known of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import linear_inputs
from benchmarks.inputs import Data
from benchmarks.linear_inputs import WEIGHT_DEVIATION
from benchmarks.sparse_cases import Case

FALL = 1.4
NOISE = 0.5
CHUNK = 2**26  # columns of teacher logits at once
DESCRIPTION = (
    f"The teacher's logits are {FALL:g} times exponential random numbers: its probabilities fall as a power of the "
    "rank, as language models' do. Given of it are the true log-probabilities of its most likely tokens. Zipfian ids: "
    f"{FALL:g}·log(token number) is taken off, so that how often a token is among them falls as 1/number. The "
    f"student's logits are the teacher's + {NOISE:g}·normal; labels are the teacher's most likely tokens. Hidden "
    f"states are normal with standard deviation 1, weights with {WEIGHT_DEVIATION:g}, the teacher independent of both."
)


@dataclass(frozen=True)
class SparseData(Data):
    """Of a sparse teacher, ``teacher`` holds the log-probabilities (N, K)."""

    ids: Tensor  # (N, K) int64
    tail: str
    ce_weight: float = 0.0

    def ours(self, student: Tensor, teacher: Tensor, inplace: bool = False) -> Tensor:
        """Our loss of these logits and log-probabilities."""
        known = kd.TopKTeacher(self.ids, teacher, self.tail)
        return kd.distillation_loss(student, known, self.labels, ce_weight=self.ce_weight, inplace=inplace)

    def exact(self, student: Tensor) -> Tensor:
        """The sum of the rows' losses by the reference, of these logits in fp64."""
        known = kd.TopKTeacher(self.ids, self.teacher.double(), self.tail)
        return kd.reference.distillation_loss(student, known, self.labels, ce_weight=self.ce_weight, reduction="sum")

    def rows(self, *index: Tensor | slice) -> SparseData:
        """Some of the rows."""
        return replace(
            self,
            student=self.student.detach()[index],
            teacher=self.teacher[index],
            labels=None if self.labels is None else self.labels[index],
            ids=self.ids[index],
        )


def _teacher_logits(case: Case, generator: torch.Generator) -> Iterator[tuple[slice, Tensor]]:
    """The teacher's logits in fp32, some rows at a time, and which."""
    device = generator.device
    common = -FALL * torch.arange(1, case.width + 1, device=device).log() if case.zipf else None
    step = max(1, CHUNK // case.width)
    for start in range(0, case.rows, step):
        rows = slice(start, min(start + step, case.rows))
        logits = torch.empty(rows.stop - start, case.width, device=device).exponential_(generator=generator).mul_(FALL)
        yield rows, logits if common is None else logits.add_(common)


def _most_likely(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of the teacher's most likely tokens."""
    found = logits.log_softmax(-1).topk(case.ids, -1)
    return found.values, found.indices


def draw(case: Case, device: str, seed: int = 0) -> SparseData:
    """The inputs of a case from logits."""
    generator = torch.Generator(device).manual_seed(seed)
    student = torch.empty(case.rows, case.width, dtype=getattr(torch, case.dtype), device=device)
    logprobs = torch.empty(case.rows, case.ids, device=device)
    ids = torch.empty(case.rows, case.ids, dtype=torch.int64, device=device)
    for rows, logits in _teacher_logits(case, generator):
        logprobs[rows], ids[rows] = _most_likely(case, logits)
        student[rows] = logits + NOISE * torch.randn(logits.shape, generator=generator, device=device)
    labels = ids[:, 0].contiguous() if case.ce_weight else None
    return SparseData(student.requires_grad_(), logprobs, labels, kd.ForwardKL(), ids, case.tail, case.ce_weight)


def draw_hidden(case: Case, device: str, seed: int = 0) -> linear_inputs.Data:
    """The inputs of a case from hidden states."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    known = [_most_likely(case, logits) for _, logits in _teacher_logits(case, generator)]
    logprobs, ids = (torch.cat(parts) for parts in zip(*known, strict=True))
    hidden = torch.randn(case.rows, case.hidden, generator=generator, device=device)
    weight = WEIGHT_DEVIATION * torch.randn(case.width, case.hidden, generator=generator, device=device)
    return linear_inputs.Data(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        kd.TopKTeacher(ids, logprobs, case.tail),
        kd.ForwardKL(),
    )


def facts(ids: Tensor, logprobs: Tensor) -> dict[str, float]:
    """The teacher's mean mass of these ids (N, K), and the part of the rows that the commonest of them is in."""
    return {
        "teacher_mass": float(logprobs.double().exp().sum(-1).mean()),
        "commonest_id": float(ids.flatten().bincount().max()) / len(ids),
    }
