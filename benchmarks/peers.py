"""The losses as people write them in PyTorch: what ours are measured against."""

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


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = F.softmax(student.float(), -1), F.softmax(teacher.float(), -1)
    return 0.5 * (p - q).abs().sum(-1).mean()


EAGER: dict[str, Loss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}


def strong_tokens(teacher: Tensor, log_p: Tensor, strong: kd.StrongSet, labels: Tensor | None) -> Tensor:
    """The strong set as a mask (N, V)."""
    if isinstance(strong, kd.Given):
        return strong.mask.expand(teacher.shape)
    if isinstance(strong, kd.TopK):
        return teacher >= teacher.topk(strong.k, -1).values[:, -1:]
    if isinstance(strong, kd.TopP):
        ordered = log_p.exp().sort(-1, descending=True).values
        last = (ordered.cumsum(-1) < strong.mass).sum(-1, keepdim=True).clamp(max=ordered.shape[-1] - 1)
        return log_p.exp() >= ordered.gather(-1, last)
    assert labels is not None
    return torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, labels[:, None], True)


def _within(log_p: Tensor, log_q: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both models' log-masses of a set of tokens, and the KL of their distributions inside it."""
    mass_p = log_p.masked_fill(~inside, -torch.inf).logsumexp(-1)
    mass_q = log_q.masked_fill(~inside, -torch.inf).logsumexp(-1)
    log_ratio = (log_p - mass_p[:, None]) - (log_q - mass_q[:, None])
    p = (log_p - mass_p[:, None]).exp()
    return mass_p, mass_q, (p * log_ratio).masked_fill(~inside, 0).sum(-1)


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor | None, divergence: kd.Decoupled) -> Tensor:
    """The three terms from log-softmaxes, a mask and masked sums."""
    log_q, log_p = _log_softmaxes(student, teacher)
    inside = strong_tokens(teacher, log_p, divergence.strong, labels)
    strong_p, strong_q, scd = _within(log_p, log_q, inside)
    weak_p, weak_q, wcd = _within(log_p, log_q, ~inside)
    bcd = strong_p.exp() * (strong_p - strong_q) + weak_p.exp() * (weak_p - weak_q)
    if divergence.mass_weighted:
        scd, wcd = strong_p.exp() * scd, weak_p.exp() * wcd
    return (divergence.bcd * bcd + divergence.scd * scd + divergence.wcd * wcd).mean()


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, divergence: kd.DKD) -> Tensor:
    """As classifiers' codebases do: two probabilities a row, then softmaxes again with the label's logit far down."""
    student, teacher = student.float(), teacher.float()
    label = labels[:, None]
    q, p = F.softmax(student, -1), F.softmax(teacher, -1)
    q_label, p_label = q.gather(-1, label), p.gather(-1, label)
    pairs = torch.cat([q_label, 1 - q_label], -1), torch.cat([p_label, 1 - p_label], -1)
    target = F.kl_div(pairs[0].log(), pairs[1], reduction="batchmean")
    rest_q = F.log_softmax(student.scatter(-1, label, -1000.0), -1)
    rest_p = F.log_softmax(teacher.scatter(-1, label, -1000.0), -1)
    others = F.kl_div(rest_q, rest_p, log_target=True, reduction="batchmean")
    return divergence.alpha * target + divergence.beta * others


def adaptive_kl(student: Tensor, teacher: Tensor, labels: Tensor | None, divergence: kd.AdaptiveKL) -> Tensor:
    """Forward and reverse KL, mixed by how far apart the models are on the head and on the tail."""
    log_q, log_p = _log_softmaxes(student, teacher)
    with torch.no_grad():
        head = strong_tokens(teacher, log_p, kd.TopP(divergence.mu), labels)
        apart = (log_p.exp() - log_q.exp()).abs()
        by_head = (apart * head).sum(-1) / apart.sum(-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    return (by_head * forward + (1 - by_head) * reverse).mean()


EAGER_DECOUPLED: dict[type[kd.Divergence], Callable[..., Tensor]] = {
    kd.Decoupled: decoupled,
    kd.DKD: dkd,
    kd.AdaptiveKL: adaptive_kl,
}


def eager(divergence: kd.Divergence, labels: Tensor | None, compiled: bool = False) -> Loss:
    """The eager form of a divergence, or that form under torch.compile.

    Raises:
        KeyError: there is none.
    """
    wrap = (lambda loss: torch.compile(loss, dynamic=False)) if compiled else (lambda loss: loss)
    if divergence.name in EAGER:
        return wrap(EAGER[divergence.name])
    split = wrap(EAGER_DECOUPLED[type(divergence)])
    return lambda student, teacher: split(student, teacher, labels, divergence)
