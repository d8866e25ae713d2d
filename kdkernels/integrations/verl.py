"""verl's top-k distillation loss of its FSDP workers (verl 0.9.1, ``verl.trainer.distillation.fsdp.losses``).

verl looks the function up when it calls it, so that assigning this one to its module is all it takes::

    import verl.trainer.distillation.fsdp.losses as verl_losses
    from kdkernels.integrations.verl import compute_forward_kl_topk

    verl_losses.compute_forward_kl_topk = compute_forward_kl_topk

in each worker's process: a module with these lines, named in ``VERL_USE_EXTERNAL_MODULES``, is imported with verl.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from kdkernels.losses import distillation_loss
from kdkernels.teachers import TopKTeacher


def compute_forward_kl_topk(
    student_logits: Tensor,  # (bsz, seqlen, V)
    teacher_topk_log_probs: Tensor,  # (bsz, seqlen, K), or nested with values (bsz·seqlen, K)
    teacher_topk_ids: Tensor,  # the same
    config: Any,
    data_format: str,
) -> dict[str, Tensor]:
    r"""Forward KL over the teacher's K tokens, per token of text, and verl's figures about them.

    With S the ids of a row, p the teacher's probabilities as they come and q the student's over the whole vocabulary,

    .. math:: \sum_{u \in S} p_u (\log p_u - \log q_u)

    nothing renormalised and not reduced: :class:`~kdkernels.TopKTeacher` with ``tail="drop"``. With
    c = ``log_prob_min_clamp``, both logarithms are max(log, c), in the factor p too; a token whose log q is below c
    then has no gradient. The logits are at their temperature already, as verl hands them over; there is no T².

    Beside the loss and its gradient, log q needs one more reading of the logits where there is a clamp, the student's
    own top K another; they yield (bsz, seqlen, K), nothing of the size of the vocabulary.

    Differences from verl. Logarithms are fp32 from 16-bit logits, where verl rounds them to the logits' dtype, and fp64
    from fp64. ``distillation_losses`` alone carries a gradient; verl's ``student_mass`` and ``overlap_token_advantage``
    carry one too, and are only reported. A teacher's log-probability of -inf contributes 0, not NaN. Of an id that
    comes again in its row, the first counts in the loss (each, where a clamp is above its log q); verl has such ids
    only in rows that it masks out.

    Args:
        student_logits: float, the last dimension contiguous; read in place.
        teacher_topk_log_probs: float log-probabilities at temperature 1; get no gradient. Nested ones stand for one
            packed row, (1, total, K), as in verl; under Ulysses sequence parallelism the rank's part is taken, by
            verl's own function.
        teacher_topk_ids: int32 or int64, in [0, V).
        config: with ``distillation_loss.log_prob_min_clamp``, a number or None; the rest has no effect
            (``use_chunked_topk``: nothing is chunked).
        data_format: has no effect, as in verl.

    Returns:
        Each (bsz, seqlen): ``distillation_losses``; ``student_mass`` Q_S and ``teacher_mass`` P_S;
        ``overlap_count``, int64, how many of the ids are among the student's K most likely; and
        ``overlap_token_advantage``, the mean of -p (log p - log q) over those, 0 where there are none. The floats are
        fp32, of fp64 logits fp64. In the last four an id that comes again counts again, as in verl.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that disagree; see :func:`kdkernels.distillation_loss`.
    """
    floor = config.distillation_loss.log_prob_min_clamp
    ids = _of_this_rank(teacher_topk_ids)
    logits = student_logits.detach()
    log_p = _of_this_rank(teacher_topk_log_probs).detach()
    log_p = log_p.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    teacher = TopKTeacher(ids, log_p, "drop")

    read = student_logits if floor is None else logits
    losses, stats = distillation_loss(read, teacher, reduction="none", return_stats=True)
    index = ids.long().contiguous()
    log_q = logits.gather(-1, index).to(log_p) - stats.student_lse.unsqueeze(-1)
    student_mass, teacher_mass = log_q.exp().sum(-1), log_p.exp().sum(-1)
    if floor is not None:
        below = log_q < floor
        log_p, log_q = log_p.clamp_min(floor), log_q.clamp_min(floor)
        losses = distillation_loss(
            student_logits, TopKTeacher(ids.masked_fill(below, -1), log_p, "drop"), reduction="none"
        )
        losses = losses + torch.where(below, log_p.exp() * (log_p - floor), 0).sum(-1)

    own = logits.topk(ids.shape[-1], sorted=False).indices.sort().values
    place = torch.searchsorted(own, index).clamp_max(ids.shape[-1] - 1)
    shared = own.gather(-1, place) == index
    count = shared.sum(-1)
    advantage = torch.where(shared & (log_p > -torch.inf), log_p.exp() * (log_q - log_p), 0).sum(-1)
    return {
        "distillation_losses": losses,
        "student_mass": student_mass,
        "teacher_mass": teacher_mass,
        "overlap_count": count,
        "overlap_token_advantage": advantage / count.clamp_min(1),
    }


def _of_this_rank(x: Tensor) -> Tensor:
    """The values of a nested tensor as one packed row, (1, total, K), of which a sequence-parallel rank has a part."""
    if x.is_nested:
        x = x.values().unsqueeze(0)
    ulysses = sys.modules.get("verl.utils.ulysses")  # whoever has set its group has imported it
    if ulysses is None or ulysses.get_ulysses_sequence_parallel_world_size() == 1:
        return x
    part: Tensor = ulysses.slice_input_tensor(x, dim=1)
    return part
