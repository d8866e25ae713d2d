"""The definitions in plain PyTorch, gradient by autograd: what correct means for every kernel.

Slow and memory-hungry on purpose (several full-vocabulary copies); any float dtype, fp64 for checks.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from kdkernels._arguments import Arguments, LossOptions, Transform, check
from kdkernels.divergences import (
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
    resolve,
)
from kdkernels.stats import RowStats


def _weighted(log_a: Tensor, log_ratio: Tensor) -> Tensor:
    """a·log_ratio with 0·anything = 0, in value and gradient."""
    alive = log_a > -torch.inf
    return torch.where(alive, log_a.exp() * torch.where(alive, log_ratio, 0), 0)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight·p + (1 - weight)·q), formed in log space, 0 < weight < 1."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _weighted(log_a, log_a - log_b)


def _alpha_beta(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    def power(x: float, y: float) -> Tensor:  # p^x q^y
        terms = [weight * log for weight, log in ((x, log_p), (y, log_q)) if weight != 0]
        return sum(terms[1:], terms[0]).exp() if terms else torch.ones_like(log_p)

    log_ratio = log_p - log_q
    if a == 0 and b == 0:
        return log_ratio.square() / 2
    if a == 0:
        return (_weighted(b * log_q, -b * log_ratio) - power(0, b) + power(b, 0)) / b**2
    if b == 0:
        return (_weighted(a * log_p, a * log_ratio) - power(a, 0) + power(0, a)) / a**2
    if a + b == 0:
        return (-a * log_ratio + power(a, -a) - 1) / a**2
    c = a + b
    return -(power(a, b) - a / c * power(c, 0) - b / c * power(0, c)) / (a * b)


def divergence(
    log_p: Tensor,  # (..., V)
    log_q: Tensor,  # (..., V)
    divergence: Divergence | str,
    labels: Tensor | None = None,
) -> Tensor:  # (...)
    """D(p, q) per row, from the log-probabilities of the teacher (``log_p``) and the student (``log_q``).

    Args:
        log_p, log_q: (..., V) log-probabilities; -inf is a probability of 0. A column that is -inf on both sides
            contributes nothing.
        divergence: which one.
        labels: for divergences that depend on the label; the pointwise ones do not.

    Returns:
        (...) tensor of the inputs' dtype, differentiable in ``log_q``.
    """
    which = resolve(divergence)
    dead = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_p, log_q = log_p.masked_fill(dead, 0), log_q.masked_fill(dead, 0)
    if isinstance(which, ForwardKL):
        terms = _kl(log_p, log_q)
    elif isinstance(which, ReverseKL):
        terms = _kl(log_q, log_p)
    elif isinstance(which, SymmetricKL):
        terms = (1 - which.weight) * _kl(log_p, log_q) + which.weight * _kl(log_q, log_p)
    elif isinstance(which, JensenShannon):
        log_m = _log_mixture(log_p, log_q, which.beta)
        terms = which.beta * _kl(log_p, log_m) + (1 - which.beta) * _kl(log_q, log_m)
    elif isinstance(which, SkewForwardKL):
        terms = _kl(log_p, _log_mixture(log_p, log_q, which.lam))
    elif isinstance(which, SkewReverseKL):
        terms = _kl(log_q, _log_mixture(log_q, log_p, which.lam))
    elif isinstance(which, TotalVariation):
        terms = (log_p.exp() - log_q.exp()).abs() / 2
    elif isinstance(which, AlphaBeta):
        terms = _alpha_beta(log_p, log_q, which.alpha, which.beta)
    else:
        raise TypeError(f"divergence: no reference for {which!r}")
    return terms.masked_fill(dead, 0).sum(-1)


def _transformed(logits: Tensor, transform: Transform) -> Tensor:
    logits = logits * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits


def _cross_entropy(logits: Tensor, labels: Tensor, counting: Tensor) -> Tensor:
    """-log softmax(logits)[label] per row; NaN where a counting row's label is out of range."""
    in_range = (labels >= 0) & (labels < logits.shape[-1])
    picked = torch.log_softmax(logits, -1).gather(-1, torch.where(in_range, labels, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(in_range | ~counting, -picked, torch.nan)


def rows(a: Arguments) -> tuple[Tensor, RowStats]:
    """Per-row loss before weights and reduction, and its statistics; rows that count for nothing are 0."""
    dtype = torch.float64 if torch.float64 in (a.student.dtype, a.teacher.dtype) else torch.float32
    counting = _counting(a)
    # Rows that do not count may hold anything, NaN included: they are replaced before the arithmetic.
    student = torch.where(counting[..., None], a.student[..., : a.vocab_size].to(dtype), 0)
    teacher = torch.where(counting[..., None], a.teacher[..., : a.vocab_size].to(dtype), 0)
    student, teacher = _transformed(student, a.student_transform), _transformed(teacher, a.teacher_transform)
    temperature = a.temperature.to(dtype) if isinstance(a.temperature, Tensor) else a.temperature
    if isinstance(temperature, Tensor):
        temperature = torch.where((temperature > 0) & (temperature < torch.inf), temperature, torch.nan)
    over_vocab = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    s, t = student / over_vocab, teacher / over_vocab
    distance = divergence(torch.log_softmax(t, -1), torch.log_softmax(s, -1), a.divergence)
    loss = torch.zeros_like(distance)
    if a.kd_weight != 0:
        loss = a.kd_weight * distance * (temperature**2 if a.scale_by_temperature else 1)
    hard = None
    if a.ce_weight > 0 and a.labels is not None:
        hard = _cross_entropy(student, a.labels, counting)
        loss = loss + a.ce_weight * hard

    def clean(x: Tensor) -> Tensor:
        return torch.where(counting, x, 0)

    stats = RowStats(
        clean(s.logsumexp(-1)).detach(),
        clean(t.logsumexp(-1)).detach(),
        clean(distance).detach(),
        None if hard is None else clean(hard).detach(),
    )
    return clean(loss), stats


def _counting(a: Arguments) -> Tensor:
    counting = torch.ones(a.student.shape[:-1], dtype=torch.bool, device=a.student.device)
    if a.labels is not None:
        counting = counting & (a.labels != a.ignore_index)
    if a.weight is not None:
        counting = counting & (a.weight != 0)
    return counting


def loss_from(a: Arguments) -> tuple[Tensor, RowStats]:
    """The reduced loss of checked arguments, and its statistics."""
    loss, stats = rows(a)
    weight = _counting(a).to(loss.dtype)
    if a.weight is not None:
        weight = weight * torch.where(weight != 0, a.weight.to(loss.dtype), 0)
    loss = loss * weight
    if a.reduction == "mean":
        norm = weight.sum() if a.normalizer is None else torch.as_tensor(a.normalizer, dtype=loss.dtype)
        norm = norm.to(loss.device)
        loss = torch.where(norm != 0, loss.sum() / torch.where(norm != 0, norm, 1), 0)
    elif a.reduction == "sum":
        loss = loss.sum()
    out = torch.float64 if a.student.dtype == torch.float64 else torch.float32
    hard = None if stats.cross_entropy is None else stats.cross_entropy.to(out)
    dense = RowStats(stats.student_lse.to(out), stats.teacher_lse.to(out), stats.divergence.to(out), hard)
    return loss.to(out), dense


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = ...,
    *,
    return_stats: Literal[False] = ...,
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = ...,
    *,
    return_stats: Literal[True],
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, RowStats]: ...
def distillation_loss(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor,  # (..., V)
    labels: Tensor | None = None,  # (...)
    *,
    return_stats: bool = False,
    inplace: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    """The same loss as :func:`kdkernels.distillation_loss`, with the same arguments, in plain PyTorch.

    ``inplace`` is accepted and changes nothing: autograd keeps its own copies here.
    """
    del inplace
    loss, stats = loss_from(check(student_logits, teacher, labels, **options))
    return (loss, stats) if return_stats else loss
