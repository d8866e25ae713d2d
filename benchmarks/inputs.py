"""The logits, labels and masks of a case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import Case
from benchmarks.losses import Rows, build, of_rows, reads_labels

CLOSE_NOISE = 0.05
LIKELY = 8
HEIGHTS = (8.0, 14.0)
DESCRIPTION = (
    "Random normal logits (standard deviation 1), drawn in the case's dtype; the teacher's independent of the "
    f"student's, or, where a case says 'close models', the student's + {CLOSE_NOISE}·normal, or, where it says "
    f"'peaked', 0.8·student + 0.6·normal, and then {LIKELY} tokens of each row raised by {HEIGHTS[0]:.0f} to "
    f"{HEIGHTS[1]:.0f}, the teacher's by up to 1 more or less than the student's. Labels by lot, of peaked rows one of "
    "the raised tokens; masks by lot, 1 % of the tokens."
)


@dataclass(frozen=True)
class Data:
    student: Tensor  # (..., V), a leaf that requires grad
    teacher: Tensor  # (..., V)
    labels: Tensor | None  # (...)
    divergence: kd.Divergence

    def ours(self, student: Tensor, teacher: Tensor, inplace: bool = False) -> Tensor:
        """Our loss of these logits."""
        return kd.distillation_loss(student, teacher, self.labels, divergence=self.divergence, inplace=inplace)

    def exact(self, student: Tensor) -> Tensor:
        """The sum of the rows' losses by the reference, of these logits in fp64."""
        return kd.reference.distillation_loss(
            student, self.teacher.double(), self.labels, divergence=self.divergence, reduction="sum"
        )

    def rows(self, *index: Tensor | slice) -> Data:
        """Some of the rows, by an index of the leading dimensions."""
        return Data(
            self.student.detach()[index],
            self.teacher[index],
            None if self.labels is None else self.labels[index],
            of_rows(self.divergence, index),
        )

    def contiguous(self) -> Data:
        student = self.student.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        return Data(student, self.teacher.contiguous(), self.labels, self.divergence)


def draw(case: Case, device: str, seed: int = 0) -> Data:
    """The inputs of a case. A view's are (B, S, V) logits without their last token, neither copied nor contiguous."""
    generator = torch.Generator(device).manual_seed(seed)
    batch = case.leading if case.kind != "view" else (case.leading[0], case.leading[1] + 1)
    dtype = getattr(torch, case.dtype)

    def normal() -> Tensor:
        return torch.randn(*batch, case.width, generator=generator, dtype=dtype, device=device)

    student = normal()
    teacher = normal()
    likely = None
    if case.close:
        teacher.mul_(CLOSE_NOISE).add_(student)
    if case.peaked:
        teacher.mul_(0.6).add_(student, alpha=0.8)
        likely = _raise_likely(student, teacher, generator)
    divergence = build(case.divergence, Rows(case.leading, case.width, generator))
    labels = None
    if case.kind == "masked" or reads_labels(divergence):
        labels = torch.randint(0, case.width, case.leading, generator=generator, device=device)
        if likely is not None:
            labels = likely[..., 0].contiguous()
    if case.kind == "masked" and labels is not None:
        labels[torch.randperm(case.rows, generator=generator, device=device)[: case.rows // 2]] = -100
    if case.kind == "view":
        student, teacher = student[:, :-1], teacher[:, :-1]
    return Data(student.detach().requires_grad_(), teacher, labels, divergence)


def _raise_likely(student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:  # (..., LIKELY)
    """Raises a few tokens of each row, the same for both models and by nearly the same; returns which."""
    shape, device = (*student.shape[:-1], LIKELY), student.device
    likely = torch.randint(0, student.shape[-1], shape, generator=generator, device=device)
    low, high = HEIGHTS
    height = low + (high - low) * torch.rand(shape, generator=generator, device=device)
    apart = 2 * torch.rand(shape, generator=generator, device=device) - 1
    student.scatter_add_(-1, likely, height.to(student.dtype))
    teacher.scatter_add_(-1, likely, (height + apart).to(teacher.dtype))
    return likely
