"""The definitions in plain PyTorch, gradient by autograd: what correct means for every kernel.

Slow and memory-hungry on purpose (several full-vocabulary copies); any float dtype, fp64 for checks.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from kdkernels._arguments import Arguments, LossOptions, Transform, check
from kdkernels._ids import first_occurrences, out_of_range
from kdkernels._linear_arguments import check_linear
from kdkernels.divergences import (
    AdaptiveKL,
    AlphaBeta,
    Decoupled,
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
from kdkernels.strong_sets import Given, Label, StrongSet, TopK, TopP
from kdkernels.teachers import LinearTeacher, TopKTeacher


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


def strong_tokens(
    scores: Tensor,  # (..., V)
    log_p: Tensor,  # (..., V)
    strong: StrongSet,
    labels: Tensor | None = None,  # (...)
) -> Tensor:  # (..., V) bool
    """Which tokens belong to S; ``scores`` are the teacher's logits, or anything in their order."""
    if isinstance(strong, Label):
        if labels is None:
            raise ValueError("labels are needed for a divergence whose strong set is Label(), got None")
        return labels.unsqueeze(-1) == torch.arange(scores.shape[-1], device=scores.device)
    if isinstance(strong, Given):
        return strong.mask[..., : scores.shape[-1]].expand(scores.shape)
    if isinstance(strong, TopK):
        return scores >= scores.topk(strong.k, -1).values[..., -1:]
    if not isinstance(strong, TopP):
        raise TypeError(f"strong: no reference for {strong!r}")
    if strong.mass == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    ordered, order = scores.sort(-1, descending=True)
    held = log_p.gather(-1, order).double().exp().cumsum(-1)
    last = (held < strong.mass * held[..., -1:]).sum(-1, keepdim=True)
    return scores >= ordered.gather(-1, last.clamp(max=scores.shape[-1] - 1))


class DecoupledTerms(NamedTuple):
    """Per row (...), before any weight: differentiable in log_q, but for the teacher's mass."""

    bcd: Tensor
    scd: Tensor
    wcd: Tensor
    strong_mass_teacher: Tensor
    strong_mass_student: Tensor
    weak_mass_teacher: Tensor


def _within(log_p: Tensor, log_q: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a set of tokens: both models' log-masses, and KL(p‖q) of the distributions inside it."""
    log_p, log_q = log_p.masked_fill(~inside, -torch.inf), log_q.masked_fill(~inside, -torch.inf)
    # A set without mass (or without tokens) has no distribution; its numbers are put in after the arithmetic.
    some_p, some_q = (log_p > -torch.inf).any(-1), (log_q > -torch.inf).any(-1)
    log_p = torch.where(some_p[..., None], log_p, 0)
    log_q = torch.where(some_q[..., None], log_q, 0)
    mass_p, mass_q = log_p.logsumexp(-1), log_q.logsumexp(-1)
    divergence = _kl(log_p - mass_p[..., None], log_q - mass_q[..., None]).sum(-1)
    divergence = torch.where(some_q, divergence, torch.inf)
    return (
        torch.where(some_p, mass_p, -torch.inf),
        torch.where(some_q, mass_q, -torch.inf),
        torch.where(some_p, divergence, 0),
    )


def decoupled_terms(
    log_p: Tensor,  # (..., V)
    log_q: Tensor,  # (..., V)
    strong: Tensor,  # (..., V) bool
) -> DecoupledTerms:
    """BCD, SCD and WCD, and the sets' masses."""
    in_s, in_w = _within(log_p, log_q, strong), _within(log_p, log_q, ~strong)
    binary = _kl(in_s[0], in_s[1]) + _kl(in_w[0], in_w[1])
    one_set = strong.all(-1) | ~strong.any(-1)
    return DecoupledTerms(
        torch.where(one_set, 0, binary), in_s[2], in_w[2], in_s[0].exp(), in_s[1].exp(), in_w[0].exp()
    )


def _decoupled(terms: DecoupledTerms, which: Decoupled) -> Tensor:
    strong_mass, weak_mass = (terms.strong_mass_teacher, terms.weak_mass_teacher) if which.mass_weighted else (1, 1)
    parts = ((which.bcd, terms.bcd), (which.scd, strong_mass * terms.scd), (which.wcd, weak_mass * terms.wcd))
    total = torch.zeros_like(terms.bcd)
    for weight, term in parts:
        weight = weight.detach().to(term) if isinstance(weight, Tensor) else term.new_full((), weight)
        total = total + torch.where(weight != 0, weight * term, 0)  # 0·inf is 0
    return total


def _adaptive_kl(log_p: Tensor, log_q: Tensor, head: Tensor) -> Tensor:
    apart = (log_p.exp() - log_q.exp()).abs().detach()
    head_gap = torch.where(head, apart, 0).sum(-1)
    gap = apart.sum(-1)
    by_head = torch.where(gap > 0, head_gap / torch.where(gap > 0, gap, 1), 1)
    forward, reverse = _kl(log_p, log_q).sum(-1), _kl(log_q, log_p).sum(-1)
    return torch.where(by_head > 0, by_head * forward, 0) + torch.where(by_head < 1, (1 - by_head) * reverse, 0)


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
        labels: (...) int64, for divergences whose strong set is the label.

    Returns:
        (...) tensor of the inputs' dtype, differentiable in ``log_q``.
    """
    which = resolve(divergence)
    strong = which.strong_set()
    return _divergence(log_p, log_q, which, None if strong is None else strong_tokens(log_p, log_p, strong, labels))


def _divergence(log_p: Tensor, log_q: Tensor, which: Divergence, strong: Tensor | None) -> Tensor:
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
    elif isinstance(which, Decoupled) and strong is not None:
        return _decoupled(
            decoupled_terms(log_p.masked_fill(dead, -torch.inf), log_q.masked_fill(dead, -torch.inf), strong), which
        )
    elif isinstance(which, AdaptiveKL) and strong is not None:
        return _adaptive_kl(log_p.masked_fill(dead, -torch.inf), log_q.masked_fill(dead, -torch.inf), strong)
    elif isinstance(which, AlphaBeta):
        terms = _alpha_beta(log_p, log_q, which.alpha, which.beta)
    else:
        raise TypeError(f"divergence: no reference for {which!r}")
    return terms.masked_fill(dead, 0).sum(-1)


# The least mass that "bucket" takes a sparse teacher to leave outside its ids.
LEAST_MASS = 1e-7


class SparseTerms(NamedTuple):
    """Per row (...); differentiable in log_q, but for the teacher's mass."""

    divergence: Tensor
    strong_mass_teacher: Tensor
    strong_mass_student: Tensor


def sparse_divergence(
    log_q: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    scores: Tensor,  # (..., K)
    tail: str,
    divergence: Divergence,
    given: Tensor | None = None,  # (..., K)
) -> SparseTerms:
    """D between a sparse teacher and the student; see :class:`kdkernels.TopKTeacher`.

    Args:
        log_q: the student's log-probabilities.
        ids: the tokens the teacher names; negative: none; a repeated one counts once.
        scores: their log-probabilities, at the temperature of ``log_q``: up to a constant a row, for "renormalize" and
            "teacher".
        tail: what becomes of the mass the teacher does not tell.
        divergence: ForwardKL; with "renormalize" also ReverseKL, JensenShannon.
        given: the log-probabilities as given, whose mass is reported; the scores where there are none.
    """
    vocab_size = log_q.shape[-1]
    alive = first_occurrences(ids, vocab_size)
    at = torch.where(alive, ids, 0).long()
    strong_q = torch.where(alive, log_q.gather(-1, at), -torch.inf)
    strong_p = torch.where(alive, scores, -torch.inf)
    outside = torch.ones_like(log_q, dtype=torch.bool)
    outside = torch.cat([outside, outside[..., :1]], -1)  # one more column, for ids that name no token
    outside = outside.scatter(-1, torch.where(alive, ids, vocab_size).long(), False)[..., :-1]

    def mass(logs: Tensor) -> Tensor:
        some = (logs > -torch.inf).any(-1, keepdim=True)
        return torch.where(some[..., 0], torch.where(some, logs, 0).logsumexp(-1), -torch.inf)

    mass_p, mass_q, weak_q = mass(strong_p), mass(strong_q), mass(log_q.masked_fill(~outside, -torch.inf))
    reported = mass_p if given is None else mass(torch.where(alive, given, -torch.inf))
    some_p, some_q = mass_p > -torch.inf, mass_q > -torch.inf
    inside_p = torch.where(alive & some_p[..., None], strong_p - torch.where(some_p, mass_p, 0)[..., None], -torch.inf)
    inside_q = torch.where(alive & some_q[..., None], strong_q - torch.where(some_q, mass_q, 0)[..., None], -torch.inf)
    inside_p = torch.where(some_p[..., None] | ~alive, inside_p, 0)  # whatever: it is not used, but must not be NaN
    within = torch.where(some_p, torch.where(some_q, _divergence(inside_p, inside_q, divergence, None), torch.inf), 0)
    # -inf - -inf must not meet autograd
    finite_q = torch.where(some_q, mass_q, 0)
    if tail == "renormalize":
        total = within
    elif tail == "teacher":
        total = torch.where(some_p, torch.where(some_q, within - finite_q, torch.inf), 0)
    elif tail == "drop":
        share = mass_p.exp()
        total = torch.where(some_p, share * (within + torch.where(some_p, mass_p, 0) - finite_q), 0)
        total = torch.where(some_p & ~some_q, torch.inf, total)
    else:
        some_weak = outside.any(-1) & alive.any(-1)
        weak_mass = torch.where(some_weak, (-torch.expm1(mass_p)).clamp(min=LEAST_MASS), 0)
        strong_mass = torch.where(some_p, 1 - weak_mass, 0)
        binary = _kl(strong_mass.log(), mass_q) + _kl(weak_mass.log(), weak_q)
        total = torch.where(some_weak, binary, 0) + torch.where(strong_mass > 0, strong_mass * within, 0)
    return SparseTerms(total, reported.exp(), mass_q.exp())


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
    student = _transformed(student, a.student_transform)
    temperature = a.temperature.to(dtype) if isinstance(a.temperature, Tensor) else a.temperature
    if isinstance(temperature, Tensor):
        temperature = torch.where((temperature > 0) & (temperature < torch.inf), temperature, torch.nan)
    over_vocab = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    s = student / over_vocab
    distance, teacher_lse, more = (_to_logits if a.sparse is None else _to_sparse)(a, s, over_vocab, counting)
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
        clean(teacher_lse).detach(),
        clean(distance).detach(),
        None if hard is None else clean(hard).detach(),
        **{name: clean(stat).detach() for name, stat in more.items()},
    )
    return clean(loss), stats


def _to_logits(
    a: Arguments, s: Tensor, temperature: Tensor | float, counting: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """D between a teacher of logits and the student's ``s``, the teacher's normaliser, and more statistics."""
    teacher = torch.where(counting[..., None], a.teacher[..., : a.vocab_size].to(s.dtype), 0)
    teacher = _transformed(teacher, a.teacher_transform)
    t = teacher / temperature
    log_p, log_q = torch.log_softmax(t, -1), torch.log_softmax(s, -1)
    strong_set, more = a.divergence.strong_set(), {}
    strong = None if strong_set is None else strong_tokens(teacher, log_p.detach(), strong_set, a.labels)
    if isinstance(a.divergence, Decoupled) and strong is not None:
        terms = decoupled_terms(log_p, log_q, strong)
        distance = _decoupled(terms, a.divergence)
        more = dict(zip(DecoupledTerms._fields[:5], terms[:5], strict=True))
    else:
        distance = _divergence(log_p, log_q, a.divergence, strong)
    if isinstance(strong_set, Label) and a.labels is not None:
        distance = torch.where((a.labels >= 0) & (a.labels < a.vocab_size) | ~counting, distance, torch.nan)
    return distance, t.logsumexp(-1), more


def _to_sparse(
    a: Arguments, s: Tensor, temperature: Tensor | float, counting: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of a sparse teacher."""
    assert a.sparse is not None
    ids = torch.where(counting[..., None], a.sparse.ids, -1)
    given = a.teacher.to(s.dtype)
    scores = given * a.sparse.teacher_temperature / temperature
    terms = sparse_divergence(torch.log_softmax(s, -1), ids, scores, a.sparse.tail, a.divergence, given)
    distance = torch.where(out_of_range(ids, a.vocab_size), torch.nan, terms.divergence)
    alive = first_occurrences(ids, a.vocab_size)
    scores = torch.where(alive, scores, -torch.inf)
    best = torch.where(alive, ids, 0).long().gather(-1, scores.argmax(-1, keepdim=True))
    agrees = (s.gather(-1, best)[..., 0] >= s.amax(-1)) & alive.any(-1)
    more = {
        "strong_mass_teacher": terms.strong_mass_teacher,
        "strong_mass_student": terms.strong_mass_student,
        "top1_agreement": agrees.to(s.dtype),
    }
    return distance, scores.logsumexp(-1), more


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
    return loss.to(out), RowStats(*(None if stat is None else stat.to(out) for stat in stats))  # type: ignore[arg-type]


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | TopKTeacher,
    labels: Tensor | None = ...,
    *,
    return_stats: Literal[False] = ...,
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | TopKTeacher,
    labels: Tensor | None = ...,
    *,
    return_stats: Literal[True],
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, RowStats]: ...
def distillation_loss(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | TopKTeacher,  # logits (..., V)
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


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """hidden @ weight.T + bias (..., V): operands, product and sum in ``dtype``, under autocast too."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).mT
        return logits if bias is None else logits + bias.to(dtype)


@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: LinearTeacher | TopKTeacher | Tensor,
    labels: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    logits_dtype: torch.dtype = ...,
    workspace_bytes: int | None = ...,
    compact: bool = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: LinearTeacher | TopKTeacher | Tensor,
    labels: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    logits_dtype: torch.dtype = ...,
    workspace_bytes: int | None = ...,
    compact: bool = ...,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, RowStats]: ...
def linear_distillation_loss(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor,  # (V_s, H_s)
    teacher: LinearTeacher | TopKTeacher | Tensor,  # hidden (..., H_t), weight (V_t, H_t); or logits (..., V_t)
    labels: Tensor | None = None,  # (...)
    *,
    student_bias: Tensor | None = None,  # (V_s,)
    logits_dtype: torch.dtype = torch.float32,
    workspace_bytes: int | None = None,
    compact: bool = False,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    """The same loss as :func:`kdkernels.linear_distillation_loss`, with the same arguments, in plain PyTorch.

    Both models' logits are formed whole, in fp32, or in fp64 where any operand is fp64; operands are cast before the
    product, so that nothing is rounded to their dtype. Gradients of ``student_hidden``, ``student_weight`` and
    ``student_bias`` come from autograd, each in its tensor's dtype; a teacher's hidden states and weights get none.

    ``logits_dtype``, ``workspace_bytes`` and ``compact`` are accepted and change nothing, nor does autocast: logits are
    never rounded here, rows never cut into chunks or left out.

    Returns:
        As :func:`kdkernels.linear_distillation_loss`: float64 where ``student_hidden`` is, else float32.
    """
    del compact
    a = check_linear(
        student_hidden, student_weight, teacher, labels, student_bias, logits_dtype, workspace_bytes, **options
    )
    operands = (a.hidden, a.weight, a.bias, a.teacher, a.teacher_weight, a.teacher_bias)
    double = any(x is not None and x.dtype == torch.float64 for x in operands)
    dtype = torch.float64 if double else torch.float32
    student = _linear(a.hidden, a.weight, a.bias, dtype)
    of_teacher = a.teacher if a.teacher_weight is None else _linear(a.teacher, a.teacher_weight, a.teacher_bias, dtype)
    loss, stats = loss_from(Arguments(**vars(a.rows), student=student, teacher=of_teacher))
    out = torch.float64 if a.hidden.dtype == torch.float64 else torch.float32
    loss = loss.to(out)
    if not return_stats:
        return loss
    return loss, RowStats(*(None if stat is None else stat.to(out) for stat in stats))  # type: ignore[arg-type]
