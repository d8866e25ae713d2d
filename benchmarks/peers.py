"""The losses as people write them in PyTorch, and what else computes them: what ours are measured against."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

Loss = Callable[[Tensor, Tensor], Tensor]  # student (N, V), teacher (N, V) -> scalar, the mean over rows


def _log_softmaxes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    # 16-bit logits are taken to fp32, as training code does: their log-softmax would be rounded to 8 bits.
    return F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_softmaxes(student, teacher)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_softmaxes(student, teacher)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    log_q, log_p = _log_softmaxes(student, teacher)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    teacher_part = F.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
    student_part = F.kl_div(log_m, log_q, log_target=True, reduction="batchmean")
    return beta * teacher_part + (1 - beta) * student_part


EAGER: dict[str, Loss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


def ours(divergence: str) -> Loss:
    return lambda student, teacher: kd.distillation_loss(student, teacher, divergence=divergence)


def implementations(divergence: str) -> dict[str, Loss]:
    """Every implementation of a divergence, by the name it has in the tables."""
    return {
        "eager": EAGER[divergence],
        "torch.compile": torch.compile(EAGER[divergence], dynamic=False),
        "kdkernels": ours(divergence),
    }


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = F.softmax(student.float(), -1), F.softmax(teacher.float(), -1)
    return 0.5 * (p - q).abs().sum(-1).mean()
