"""Hidden states and weights of a case, and the exact gradients in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks.linear_cases import DIVERGENCES, Case

WEIGHT_DEVIATION = 0.02
CHECKED_ROWS = 16
CHECKED_TOKENS = 64
CHUNK_BYTES = 2**28
DESCRIPTION = (
    "Hidden states normal with standard deviation 1, weights with 0.02, all independent: logits with a standard "
    "deviation of about 1. Accuracy: weights such that the logits' standard deviation is 1; the teacher has the "
    "student's hidden states, and its weight with normal noise added, by which the logits differ by the noise named."
)


@dataclass(frozen=True)
class Data:
    student_hidden: Tensor  # (N, H_s), a leaf that requires grad
    student_weight: Tensor  # (V, H_s), a leaf that requires grad
    teacher: kd.LinearTeacher | kd.TopKTeacher  # hidden (N, H_t) and weight (V, H_t); or ids and logprobs (N, K)
    divergence: kd.Divergence

    @property
    def teacher_hidden(self) -> Tensor:  # (N, H_t)
        assert isinstance(self.teacher, kd.LinearTeacher)
        return self.teacher.hidden

    @property
    def teacher_weight(self) -> Tensor:  # (V, H_t)
        assert isinstance(self.teacher, kd.LinearTeacher)
        return self.teacher.weight

    def exact_teacher(self) -> Callable[[slice], Tensor | kd.TopKTeacher]:
        """The teacher of some rows in fp64, as the reference takes it: its logits, or what is known of them."""
        teacher = self.teacher
        if isinstance(teacher, kd.TopKTeacher):
            return lambda rows: teacher._replace(ids=teacher.ids[rows], logprobs=teacher.logprobs[rows].double())
        weight = teacher.weight.double()
        return lambda rows: F.linear(teacher.hidden[rows].double(), weight)

    def forget_gradients(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None


def draw(case: Case, device: str, noise: float | None = None, seed: int = 0) -> Data:
    """The inputs of a case; with ``noise``, of two models whose logits differ by so much."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(rows: int, columns: int, deviation: float = 1.0) -> Tensor:
        return deviation * torch.randn(rows, columns, generator=generator, device=device)

    if noise is None:
        student = normal(case.rows, case.student).to(dtype)
        student_weight = normal(case.width, case.student, WEIGHT_DEVIATION).to(dtype)
        teacher = normal(case.rows, case.teacher).to(dtype)
        teacher_weight = normal(case.width, case.teacher, WEIGHT_DEVIATION).to(dtype)
    else:
        deviation = 1 / math.sqrt(case.student)
        student = teacher = normal(case.rows, case.student).to(dtype)
        student_weight = normal(case.width, case.student, deviation).to(dtype)
        teacher_weight = (student_weight + normal(case.width, case.student, noise * deviation)).to(dtype)
    return Data(
        student.clone().requires_grad_(),
        student_weight.requires_grad_(),
        kd.LinearTeacher(teacher, teacher_weight.detach()),
        DIVERGENCES[case.divergence],
    )


def _spread(count: int, most: int | None, device: torch.device) -> Tensor:
    """Some of ``count`` places, evenly spread; None: all of them."""
    return torch.linspace(0, count - 1, min(most or count, count)).long().to(device)


class Exact:
    """The loss, some rows of the hidden states' gradient and some of the weight's, in fp64 from materialised logits."""

    def __init__(self, data: Data, rows: int | None = CHECKED_ROWS, tokens: int | None = CHECKED_TOKENS) -> None:
        hidden, weight = data.student_hidden.detach(), data.student_weight.detach().double()
        teacher_of = data.exact_teacher()
        count, width = len(hidden), len(weight)
        self.rows, self.tokens = _spread(count, rows, hidden.device), _spread(width, tokens, hidden.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        self.weight_gradient = weight.new_zeros(len(self.tokens), weight.shape[1])
        parts = []
        step = max(1, CHUNK_BYTES // (8 * width))
        for start in range(0, count, step):
            chunk = slice(start, start + step)
            inputs = hidden[chunk].double()
            logits = F.linear(inputs, weight).requires_grad_()
            teacher = teacher_of(chunk)
            loss = kd.reference.distillation_loss(logits, teacher, divergence=data.divergence, reduction="sum") / count
            (gradient,) = torch.autograd.grad(loss, logits)
            self.loss += loss.detach()
            self.weight_gradient += gradient[:, self.tokens].T @ inputs
            inside = self.rows[(self.rows >= start) & (self.rows < start + step)]
            parts.append(gradient[inside - start] @ weight)
        self.hidden_gradient = torch.cat(parts)

    def errors(self, data: Data, loss: Tensor) -> dict[str, float]:
        """Relative errors of a loss and of the gradients in ``data``; NaN for a gradient that is not there."""
        return {
            "loss_error": float((loss.double() - self.loss).abs() / self.loss.abs()),
            "hidden_error": _relative(data.student_hidden.grad, self.rows, self.hidden_gradient),
            "weight_error": _relative(data.student_weight.grad, self.tokens, self.weight_gradient),
        }

    def rounded(self, dtype: torch.dtype) -> dict[str, float]:
        """The same errors of the exact gradients rounded to a dtype: no gradient of that dtype has less."""
        hidden, weight = self.hidden_gradient, self.weight_gradient
        return {
            "hidden_error": float((hidden.to(dtype) - hidden).norm() / hidden.norm()),
            "weight_error": float((weight.to(dtype) - weight).norm() / weight.norm()),
        }


def _relative(gradient: Tensor | None, index: Tensor, exact: Tensor) -> float:
    return math.nan if gradient is None else float((gradient[index].double() - exact).norm() / exact.norm())
