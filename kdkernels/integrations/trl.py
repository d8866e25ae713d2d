r"""TRL's distillation losses, computed by kdkernels: functions with TRL's signatures, and what puts them in its place.

For TRL 1.16. ``patch_trl()`` before training; the trainers are used as ever:

>>> from kdkernels.integrations.trl import patch_trl
>>> patch_trl()  # doctest: +SKIP
>>> from trl.experimental.gkd import GKDTrainer  # or trl.DistillationTrainer  # doctest: +SKIP

TRL's conventions (GKD, Agarwal et al., arXiv 2306.13649). With p the teacher, q the student, both at temperature T,
the divergence of a token is

    beta·KL(p ‖ M) + (1 - beta)·KL(q ‖ M),    M = beta·p + (1 - beta)·q

which is :class:`kdkernels.JensenShannon`; beta = 0 means KL(p ‖ q), beta = 1 KL(q ‖ p). Nothing is multiplied by T².
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.integrations._conventions import gathered, on_device

__all__ = [
    "ChunkedDivergenceFunction",
    "chunked_divergence_loss",
    "generalized_jsd_loss",
    "patch_trl",
    "patched_trl",
    "unpatch_trl",
]

#: The versions of TRL that this was written and tested for.
SUPPORTED = "1.16"
IGNORE_INDEX = -100


def generalized_jsd_loss(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    labels: Tensor | None = None,  # (...)
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    r"""``GKDTrainer.generalized_jsd_loss``: the divergence above, from logits.

    Against TRL's own: logits of 16 bits are computed with in fp32, and their loss is fp32. Rows that do not count are
    not read, whatever they hold; TRL's gradient is NaN in such a row if its logits are not finite. A token that both
    models mask with a logit of -inf counts for nothing; TRL's loss is then NaN. The host does not wait for a GPU. The
    logits are read where they lie (``logits[:, :-1]``, as the trainer gives them) and the teacher's get no gradient.

    Args:
        student_logits: (..., V) of any float dtype, the last dimension contiguous. TRL's trainer: (B, S, V).
        teacher_logits: likewise; the dtype may be another.
        labels: (...) integers, of which only whether they are -100 counts: those rows do not. None: all rows do.
        beta: 0 <= beta <= 1.
        temperature: T > 0.
        reduction: "batchmean": the sum over tokens that count and the vocabulary, divided by the number of those
            tokens; without labels, by the size of the first dimension. "sum". "mean": divided by that number of tokens
            *and* by V. 0 where no token counts (TRL: NaN for "mean").
        num_items_in_batch: a number, or a tensor of one on any device: divides the sum, whatever ``reduction`` says.
            Divided by 0, the loss is 0.

    Returns:
        () float32, float64 for a float64 student.

    Raises:
        ValueError: ``reduction`` is another. TRL then returns the terms of all tokens and all of the vocabulary, a
            tensor as large as the logits, which is never formed here.
        ValueError, TypeError: as :func:`kdkernels.distillation_loss`.
    """
    rows = student_logits.shape[:-1]
    weight = None
    if labels is not None:
        if labels.shape != rows:
            raise ValueError(f"labels must have one entry per token, shape {tuple(rows)}, got {tuple(labels.shape)}")
        weight = (labels != IGNORE_INDEX).float()
    kd_weight = 1.0
    if num_items_in_batch is not None:
        reduction = "mean"
        num_items_in_batch = on_device(num_items_in_batch, student_logits.device)
    elif reduction == "batchmean":
        reduction = "mean"
        if labels is None:
            num_items_in_batch = max(student_logits.shape[0], 1)
    elif reduction == "mean":
        kd_weight = 1 / student_logits.shape[-1]
    elif reduction != "sum":
        raise ValueError(
            f"reduction must be 'batchmean', 'sum' or 'mean', got {reduction!r}; TRL returns a tensor of the logits' "
            "shape for others, which is not formed here (kdkernels.distillation_loss has a loss per token)"
        )
    return kd.distillation_loss(
        student_logits,
        teacher_logits,
        divergence=kd.JensenShannon(beta),
        temperature=temperature,
        kd_weight=kd_weight,
        scale_by_temperature=False,
        weight=weight,
        reduction=reduction,
        normalizer=num_items_in_batch,
    )


def chunked_divergence_loss(
    student_hidden_states: Tensor,  # (B, K, H_s)
    teacher_hidden_states: Tensor,  # (B, K, H_t)
    student_lm_head_weight: Tensor,  # (V, H_s)
    teacher_lm_head_weight: Tensor,  # (V, H_t)
    completion_mask: Tensor,  # (B, K)
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,  # (V,)
    teacher_lm_head_bias: Tensor | None = None,  # (V,)
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
    compact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""``_chunked_divergence_loss`` of TRL's ``DistillationTrainer``: the divergence above, from hidden states.

    A model's logits are softcap·tanh(scale·(hidden @ weightᵀ + bias) / softcap), formed in fp32 a chunk of tokens at a
    time. The gradients are formed in the same pass: four matrix products, and one for the entropy. TRL's own function
    takes six, and eight where 0 < beta < 1, since it forms all logits anew for the mixture and again in backward.

    The student's entropy, which the trainer logs, is log V - KL(q ‖ uniform): reverse KL from a teacher of logits 0. It
    is off by some 1e-5 nats a token, as TRL's own.

    Args:
        student_hidden_states, teacher_hidden_states: (B, K, H) of any float dtype; any leading dimensions. Finite where
            ``completion_mask`` is 0 too, unless ``compact``.
        student_lm_head_weight, teacher_lm_head_weight: (V, H). Products are computed in the hidden states' dtype, or in
            torch.autocast's where that is enabled. A weight of another dtype is cast to it as a whole; without
            autocast, its gradient is rounded to it once. A DTensor (FSDP2) is gathered, and so is what DeepSpeed ZeRO-3
            has partitioned, as TRL does it (tested without DeepSpeed). A teacher's rows beyond V are not used.
        completion_mask: (B, K); 0: the token does not count.
        beta: 0 <= beta <= 1.
        num_items_in_batch: a number, or a tensor of one on any device, that divides the sum. None: the number of tokens
            that count. Divided by 0, the loss is 0.
        student_lm_head_bias, teacher_lm_head_bias: (V,).
        student_logit_scale, teacher_logit_scale: multiply logits before all else.
        student_final_logit_softcapping, teacher_final_logit_softcapping: softcaps.
        temperature: T > 0, after those.
        entropy: False: save its product; it is NaN. (The trainer then logs None.) Not an argument of TRL's.
        compact: True: leave masked tokens out of the products. The host waits for the device once, twice with the
            entropy (TRL's waits too, and so does its trainer, for what it logs). Pays where more than a tenth of the
            tokens are masked: docs/linear.md. Not an argument of TRL's.

    Returns:
        The loss, (), fp32 (fp64 for fp64 hidden states); the entropies' sum over tokens that count, (), in nats at
        temperature T, no gradient; the number of those tokens, () int64. Where none counts: 0, 0, 0.

    Raises:
        ValueError, TypeError: as :func:`kdkernels.linear_distillation_loss`.
    """
    valid = completion_mask.reshape(student_hidden_states.shape[:-1]) != 0
    head = (student_lm_head_weight, student_lm_head_bias)
    teacher_head = (teacher_lm_head_weight, teacher_lm_head_bias)
    with _partitions_gathered(*head, *teacher_head):
        student = _operands(student_hidden_states, *head)
        scale, softcap = student_logit_scale, student_final_logit_softcapping
        loss = _divergence(
            student,
            kd.LinearTeacher(*_operands(teacher_hidden_states, *teacher_head)),
            beta,
            temperature,
            (scale, softcap, teacher_logit_scale, teacher_final_logit_softcapping),
            weight=valid.float(),
            normalizer=on_device(num_items_in_batch, student_hidden_states.device),
            compact=compact,
        )
        if entropy:
            entropies = _entropies(student, temperature, scale, softcap, weight=valid.float(), compact=compact)
            entropy_sum = torch.where(valid, entropies, 0).sum()
        else:
            entropy_sum = loss.new_full((), math.nan)
    return loss, entropy_sum, valid.sum()


class ChunkedDivergenceFunction:
    """``trl.kernels.chunked_divergence.ChunkedDivergenceFunction``: divergence and entropy of each token.

    No autograd.Function: what it returns has a history of its own. Backward forms the logits again, six products in
    all and one for the entropy; where the sum is what is wanted, :func:`chunked_divergence_loss` takes fewer.
    """

    @staticmethod
    def apply(
        student_hidden: Tensor,  # (N, H_s)
        student_weight: Tensor,  # (V, H_s)
        student_bias: Tensor | None,  # (V,)
        teacher_hidden: Tensor,  # (N, H_t)
        teacher_weight: Tensor,  # (V, H_t)
        teacher_bias: Tensor | None,  # (V,)
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
        *,
        entropy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Divergence (N,) and, without gradient, the student's entropy (N,), NaN unless ``entropy``.

        Both float32 (float64 for float64 hidden states). The arguments are those of :func:`chunked_divergence_loss`;
        parameters that DeepSpeed ZeRO-3 has partitioned are not gathered, and raise a ValueError.
        """
        student = _operands(student_hidden, student_weight, student_bias)
        divergence = _divergence(
            student,
            kd.LinearTeacher(*_operands(teacher_hidden, teacher_weight, teacher_bias)),
            beta,
            temperature,
            (
                student_logit_scale,
                student_final_logit_softcapping,
                teacher_logit_scale,
                teacher_final_logit_softcapping,
            ),
            reduction="none",
        )
        if not entropy:
            return divergence, torch.full_like(divergence, math.nan, requires_grad=False)
        return divergence, _entropies(student, temperature, student_logit_scale, student_final_logit_softcapping)


Operands = tuple[Tensor, Tensor, Tensor | None]  # hidden (..., H), weight (V, H), bias (V,)


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
    """A model's operands as kdkernels takes them: whole, and of one dtype unless autocast sees to that."""
    weight, bias = gathered(weight), None if bias is None else gathered(bias)
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    return hidden, weight, bias


def _partitions_gathered(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """In it, parameters that DeepSpeed ZeRO-3 has partitioned are whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


def _divergence(
    student: Operands,
    teacher: kd.LinearTeacher,
    beta: float,
    temperature: float,
    transforms: tuple[float, float | None, float, float | None],  # logit scale and softcap, the student's and teacher's
    **options: Any,
) -> Tensor:
    hidden, weight, bias = student
    scale, softcap, teacher_scale, teacher_softcap = transforms
    return kd.linear_distillation_loss(
        hidden,
        weight,
        teacher,
        student_bias=bias,
        divergence=kd.JensenShannon(beta),
        temperature=temperature,
        scale_by_temperature=False,
        vocab_size=weight.shape[0],
        student_logit_scale=scale,
        student_softcap=softcap,
        teacher_logit_scale=teacher_scale,
        teacher_softcap=teacher_softcap,
        **options,
    )


@torch.no_grad()
def _entropies(
    student: Operands, temperature: float, scale: float, softcap: float | None, **options: Any
) -> Tensor:  # (...)
    """Of the student's distribution: log V - KL(q ‖ uniform). In rows that are skipped, anything."""
    hidden, weight, bias = student
    vocab_size = weight.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(vocab_size, dtype=dtype, device=hidden.device)  # one row, read for every token
    divergences = kd.linear_distillation_loss(
        hidden,
        weight,
        zeros.expand(*hidden.shape[:-1], vocab_size),
        student_bias=bias,
        divergence="reverse_kl",
        temperature=temperature,
        scale_by_temperature=False,
        reduction="none",
        student_logit_scale=scale,
        student_softcap=softcap,
        **options,
    )
    return math.log(vocab_size) - divergences


# What is replaced now: its owner, its name there, TRL's own.
_replaced: list[tuple[Any, str, Any]] = []
_GKD = "trl.experimental.gkd.gkd_trainer:GKDTrainer"
# Trainers with arguments beside those of generalized_jsd_loss, and the values for which these change nothing.
_OTHER_TRAINERS: Mapping[str, Mapping[str, Sequence[object]]] = {
    "trl.experimental.gold.gold_trainer:GOLDTrainer": {"logits_are_probs": (False,)},
    "trl.experimental.iw_opd.iw_opd_trainer:IWOPDTrainer": {"top_k": (0,), "add_tail": (True, False)},
}


def patch_trl(entropy: bool = True, compact: bool = False) -> None:
    """Puts the losses above where TRL's trainers look for theirs.

    - ``DistillationTrainer``: ``_chunked_divergence_loss``, and ``ChunkedDivergenceFunction`` where that is from.
    - ``experimental.gkd.GKDTrainer``: ``generalized_jsd_loss``.
    - ``experimental.gold.GOLDTrainer``: likewise, unless ``logits_are_probs`` is true, as in its ULD loss.
    - ``experimental.iw_opd.IWOPDTrainer``: likewise, where ``top_k`` is 0; its ``loss_top_k`` is 1 unless set.

    What is excepted goes to TRL's own function. The last two trainers are left alone where they cannot be imported.
    Trainers that exist already use the losses too. Called again, it changes the options alone.

    Args:
        entropy: False: ``DistillationTrainer`` does without the student's entropy, whose matrix product is one in five,
            and logs None for it.
        compact: True: masked tokens are left out of ``DistillationTrainer``'s products. See
            :func:`chunked_divergence_loss`.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL lacks what is to be replaced, or has it with other arguments. Then TRL is as
            :func:`unpatch_trl` leaves it.
    """
    version = importlib.import_module("trl").__version__
    unpatch_trl()
    for owner, name, original, replacement in _plan(version, entropy, compact):
        setattr(owner, name, replacement)
        _replaced.append((owner, name, original))


def unpatch_trl() -> None:
    """Puts TRL's own losses back where :func:`patch_trl` replaced them; else does nothing."""
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)


@contextmanager
def patched_trl(entropy: bool = True, compact: bool = False) -> Iterator[None]:
    """:func:`patch_trl` for the length of a ``with``; after it, TRL's own losses are back."""
    patch_trl(entropy, compact)
    try:
        yield
    finally:
        unpatch_trl()


def _plan(version: str, entropy: bool, compact: bool) -> list[tuple[Any, str, Any, Any]]:
    """All that is to be replaced, found and checked before anything is: owner, name, TRL's own, ours."""
    loss = functools.partial(chunked_divergence_loss, entropy=entropy, compact=compact)

    class PerToken(ChunkedDivergenceFunction):
        apply = staticmethod(functools.partial(ChunkedDivergenceFunction.apply, entropy=entropy))

    find = functools.partial(_find, version)
    trainer, kernels = "trl.trainer.distillation_trainer", "trl.kernels.chunked_divergence"
    find(f"{kernels}:ChunkedDivergenceFunction.forward", ChunkedDivergenceFunction.apply, ("ctx",))
    plan: list[tuple[Any, str, Any, Any]] = [
        (*find(f"{trainer}:_chunked_divergence_loss", chunked_divergence_loss), loss),
        (*find(f"{trainer}:ChunkedDivergenceFunction"), PerToken),
        (*find(f"{kernels}:ChunkedDivergenceFunction"), PerToken),
        (*find(f"{_GKD}.generalized_jsd_loss", generalized_jsd_loss), staticmethod(generalized_jsd_loss)),
    ]
    for place, beside in _OTHER_TRAINERS.items():
        try:
            importlib.import_module(place.partition(":")[0])
        except Exception:  # of whatever kind: a trainer that is not for this environment, and of which none is needed
            continue
        owner, name, original = find(f"{place}.generalized_jsd_loss", generalized_jsd_loss, tuple(beside))
        plan.append((owner, name, original, staticmethod(_where_they_agree(getattr(owner, name), beside))))
    return plan


def _find(
    version: str, place: str, like: Callable[..., Any] | None = None, beside: Sequence[str] = ()
) -> tuple[Any, str, Any]:
    """What lies at "module:name" or "module:class.name": its owner, its name, and itself.

    Its arguments have to be those of ``like`` that are not keyword-only, but for those named ``beside``.
    """
    told = f"kdkernels.integrations.trl is for trl {SUPPORTED}; nothing is replaced"
    module, _, path = place.partition(":")
    *classes, name = path.split(".")
    try:
        owner = importlib.import_module(module)
        for part in classes:
            owner = getattr(owner, part)
        original = vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise RuntimeError(f"trl {version} has no {place} ({type(error).__name__}: {error}). {told}") from error

    def arguments(function: Callable[..., Any]) -> list[tuple[str, object]]:
        given = inspect.signature(function).parameters.values()
        return [(one.name, one.default) for one in given if one.name not in beside and one.kind != one.KEYWORD_ONLY]

    theirs = getattr(owner, name)
    if like is not None and arguments(theirs) != arguments(like):
        raise RuntimeError(f"trl {version}: {place} has the arguments {inspect.signature(theirs)}. {told}")
    return owner, name, original


def _where_they_agree(theirs: Callable[..., Any], beside: Mapping[str, Sequence[object]]) -> Callable[..., Any]:
    """generalized_jsd_loss where the arguments ``beside`` its own have one of these values, else TRL's function."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if all(given[name] in values for name, values in beside.items()):
            return generalized_jsd_loss(**{name: value for name, value in given.items() if name not in beside})
        return theirs(*args, **kwargs)

    return loss
