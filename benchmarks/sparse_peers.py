"""Who runs in a case of a sparse teacher, and what exactly is timed of each.

The frameworks compute these losses inside their trainers, on their own batches and process groups; here are the same
forms on (N, V) logits, each with the name of a framework that has it. All of them take 16-bit logits to fp32, since a
log-softmax rounded to 8 bits leaves nothing of a small difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import contenders, linear_inputs, linear_peers
from benchmarks.contenders import CUDA, IN_PLACE, TRITON
from benchmarks.linear_peers import COMPILED, EAGER_NAME, OURS
from benchmarks.peers import Loss
from benchmarks.sparse_cases import Case
from benchmarks.sparse_inputs import SparseData

GATHERED = "eager, gathered first"

#: student (N, V) logits, ids (N, K), log-probabilities (N, K) -> scalar, the mean over rows
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _with_tail(logprobs: Tensor) -> Tensor:  # (N, K) -> (N, K + 1)
    """One more token that has the probability the others leave."""
    mass = logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, (-mass.expm1()).log()], -1)


def bucket(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """TRL's server distillation with ``loss_add_tail``; DistillKit's ``symmetric_uniform``."""
    log_q = F.log_softmax(student.float(), -1).gather(-1, ids)
    return _forward_kl(_with_tail(logprobs), _with_tail(log_q))


def renormalize(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """NeMo-RL without ``zero_outside_topk``: all logits in fp32, then a softmax of those at the ids."""
    return _within(student.float().gather(-1, ids), logprobs)


def renormalize_gathered(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """axolotl's ``top_k_before_softmax``: only the logits at the ids are taken to fp32."""
    return _within(student.gather(-1, ids).float(), logprobs)


def _within(logits: Tensor, logprobs: Tensor) -> Tensor:
    """Of the student's logits at the ids (N, K)."""
    return _forward_kl(F.log_softmax(logprobs, -1), F.log_softmax(logits, -1))


def teacher(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """DistillKit's ``sparse_kl_div`` with missing mass taken as zero, its default."""
    logits = student.float()
    log_q = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    return _forward_kl(F.log_softmax(logprobs, -1), log_q)


def drop(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """verl's ``compute_forward_kl_topk``, without its clamp and its metrics."""
    return _forward_kl(logprobs, F.log_softmax(student.float(), -1).gather(-1, ids))


FORMS: dict[str, Form] = {"bucket": bucket, "renormalize": renormalize, "teacher": teacher, "drop": drop}
NOTES = {
    "bucket": "log-softmax of all logits in fp32, gather, the rest of both masses as one more token, KL of the two",
    "renormalize": "all logits in fp32, gather, log-softmaxes over the ids, their KL",
    "teacher": "all logits in fp32, gather, their logsumexp off, KL from the teacher's normalised log-probabilities",
    "drop": "log-softmax of all logits in fp32, gather, Σ p (log p - log q)",
}
GATHERED_NOTE = "gather, then fp32 and log-softmaxes over the ids, their KL"
COMPILED_NOTE = "torch.compile(dynamic=False) of what 'eager' runs; its compilation is not timed"


def with_cross_entropy(form: Form, labels: Tensor | None, weight: float) -> Form:
    """The loss with cross-entropy added; the form itself where the weight is 0."""
    if not weight or labels is None:
        return form

    def both(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        logits = student.float()
        return form(logits, ids, logprobs) + weight * F.cross_entropy(logits, labels)

    return both


def _of_logits(form: Form, compiled: bool = False) -> Callable[[SparseData], Loss]:
    def make(data: SparseData) -> Loss:
        loss = with_cross_entropy(form, data.labels, data.ce_weight)
        if compiled:
            loss = torch.compile(loss, dynamic=False)
        return lambda student, logprobs: loss(student, data.ids, logprobs)

    return make


def _from_logits(case: Case, device: str) -> list[contenders.Contender]:
    ours = "kd.distillation_loss of the logits and a TopKTeacher, and its backward"
    backends: dict[str, Literal["native", "triton"]] = {OURS: "native"}
    if torch.device(device).type == "cuda":
        backends = {CUDA: "native", TRITON: "triton"}
    found = [
        contenders.Contender(name, f"{ours}; backend {backend!r}", backend=backend)
        for name, backend in backends.items()
    ]
    found.append(contenders.Contender(IN_PLACE, f"{ours}; inplace=True, the automatic choice of backend"))
    if case.field == "ours":
        return found
    form = FORMS[case.tail]
    note = f"{NOTES[case.tail]}{'; F.cross_entropy of the fp32 logits' if case.ce_weight else ''}, and its backward"
    found.append(contenders.Contender(EAGER_NAME, note, _of_logits(form)))
    if case.tail == "renormalize" and not case.ce_weight:
        note = f"{GATHERED_NOTE}, and its backward"
        found.append(contenders.Contender(GATHERED, note, _of_logits(renormalize_gathered)))
    if case.field == "compiled":
        found.append(contenders.Contender(COMPILED, COMPILED_NOTE, _of_logits(form, compiled=True)))
    return found


def logits_at(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:  # (N, H), (V, H), (N, K) -> (N, K)
    """The logits at the ids alone, from the rows of the weight that they name."""
    return (F.embedding(ids, weight) @ hidden.unsqueeze(-1)).squeeze(-1)


#: hidden states (N, H), weight (V, H), ids (N, K), log-probabilities (N, K) -> scalar
HiddenForm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _whole(form: Form) -> HiddenForm:
    return lambda hidden, weight, ids, logprobs: form(F.linear(hidden, weight), ids, logprobs)


def _gathered(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    return _within(logits_at(hidden, weight, ids).float(), logprobs)


def _of_hidden(form: HiddenForm, compiled: bool = False) -> Callable[[linear_inputs.Data], linear_peers.Loss]:
    def make(data: linear_inputs.Data) -> linear_peers.Loss:
        loss = torch.compile(form, dynamic=False) if compiled else form
        ids, logprobs = data.teacher[:2]
        return lambda: loss(data.student_hidden, data.student_weight, ids, logprobs)

    return make


def _from_hidden(case: Case) -> list[linear_peers.Contender]:
    found = [linear_peers.ours(logits) for logits in case.logits]
    if case.field == "ours":
        return found
    whole = _whole(FORMS[case.tail])
    note = f"F.linear in the operands' dtype, which rounds the logits to it; {NOTES[case.tail]}"
    found.append(linear_peers.Contender(EAGER_NAME, note, _of_hidden(whole), rounds=True))
    if case.tail == "renormalize":
        note = f"the weight's rows at the ids by F.embedding, their products in the operands' dtype; {GATHERED_NOTE}"
        found.append(linear_peers.Contender(GATHERED, note, _of_hidden(_gathered), rounds=True))
    if case.field == "compiled":
        make = _of_hidden(whole, compiled=True)
        found.append(linear_peers.Contender(COMPILED, COMPILED_NOTE, make, compiles=True, rounds=True))
    return found


Who = TypeVar("Who", contenders.Contender, linear_peers.Contender)


def _wanted(found: list[Who], words: Sequence[str], without: Sequence[str]) -> list[Who]:
    if ("ours" in words) != ("peers" in words):
        found = [one for one in found if one.name.startswith(OURS) == ("ours" in words)]
    return [one for one in found if not any(word.lower() in one.name.lower() for word in without)]


def of_logits(
    case: Case, device: str, words: Sequence[str] = (), without: Sequence[str] = ()
) -> list[contenders.Contender]:
    """Who runs in a case from logits, ours first.

    Args:
        words: of --only: "ours" or "peers" without the other leaves the other out.
        without: words of names to leave out.
    """
    return _wanted(_from_logits(case, device), words, without)


def of_hidden(case: Case, words: Sequence[str] = (), without: Sequence[str] = ()) -> list[linear_peers.Contender]:
    """Who runs in a case from hidden states, ours first; ``words`` and ``without`` as for :func:`of_logits`."""
    return _wanted(_from_hidden(case), words, without)
