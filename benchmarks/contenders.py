"""Who runs in a CUDA case, and what exactly is timed of each.

Every peer is imported only when it is about to run, so that one that is not installed, or fails, is a line that says
why. TRL's and fla's fused losses start from hidden states and are no peers here; what TRL offers on logits is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F

import kdkernels as kd
from benchmarks.cases import Case, Field
from benchmarks.loading import load
from benchmarks.losses import FAMILY
from benchmarks.peers import EAGER, Loss, eager

FIELDS: tuple[Field, ...] = ("ours", "eager", "compiled", "kernels", "all")
CUDA, TRITON, IN_PLACE = "kdkernels, CUDA", "kdkernels, Triton", "kdkernels, in place"
OURS = (CUDA, TRITON)


@dataclass(frozen=True)
class Contender:
    """An implementation.

    Attributes:
        timed: what a timed call does, for the result file.
        make: builds the loss for a case's inputs, or raises what keeps it from running; None for ours.
        backend: the backend of ours asked for by name; None: the automatic choice.
    """

    name: str
    timed: str
    make: Callable[[Any], Loss] | None = None
    backend: Literal["native", "triton"] | None = None

    def context(self) -> AbstractContextManager[None]:
        return nullcontext() if self.backend is None else kd.backends.use(self.backend)


def _liger(divergence: str, dtype: torch.dtype) -> Loss:
    """Liger's losses take (log-)probabilities of both models: the softmaxes, which a user must do first, are timed.

    Forward KL is LigerKLDIVLoss. It has no reverse: LigerJSD at beta = 1 is documented to be it. A gradient flows
    back through the student's softmax by autograd. The mean is over rows in all of them.
    """
    if divergence == "total_variation":
        distance = importlib.import_module("liger_kernel.transformers.tvd").LigerTVDLoss(reduction="batchmean")
        return lambda student, teacher: distance(
            F.softmax(student, -1, dtype=dtype), F.softmax(teacher, -1, dtype=dtype)
        )
    if divergence == "forward_kl":
        module: Any = importlib.import_module("liger_kernel.transformers.kl_div")
        loss = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        beta = {"reverse_kl": 1.0, "jensen_shannon": 0.5}[divergence]
        loss = importlib.import_module("liger_kernel.transformers.jsd").LigerJSD(beta=beta)
    return lambda student, teacher: loss(
        F.log_softmax(student, -1, dtype=dtype), F.log_softmax(teacher, -1, dtype=dtype)
    )


def _speculators_module() -> ModuleType:
    """speculators' fused losses. Its packages import a serving stack first; the module alone needs only one function
    of them, whether this is an NPU."""
    given = {"speculators.utils.util": {"is_npu_available": lambda: False}}
    return load("speculators.losses.fused", given=given)


def _speculators(divergence: str) -> Loss:
    names = {
        "forward_kl": "fused_kl_div_loss",
        "reverse_kl": "fused_reverse_kl_div_loss",
        "jensen_shannon": "fused_js_div_loss",
        "total_variation": "fused_tv_loss",
    }
    loss = getattr(_speculators_module(), names[divergence])
    return lambda student, teacher: loss(student.unsqueeze(0), teacher.unsqueeze(0)).mean()


def _trl(divergence: str) -> Loss:
    beta = {"forward_kl": 0, "reverse_kl": 1, "jensen_shannon": 0.5}[divergence]
    loss = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    return lambda student, teacher: loss(student, teacher, beta=beta)


SPECULATORS_RUNS = ("forward_kl", "jensen_shannon")  # each other would cost a minute of its autotuner
TRL_RUNS = ("forward_kl", "reverse_kl", "jensen_shannon")


def _candidates(divergence: str) -> list[tuple[Field, Contender]]:
    ours = "kd.distillation_loss on the logits as they are, and its backward"
    softmaxes = "softmax" if divergence == "total_variation" else "log_softmax"
    liger = {
        "forward_kl": "LigerKLDIVLoss(reduction='batchmean', log_target=True)",
        "reverse_kl": "LigerJSD(beta=1)",
        "jensen_shannon": "LigerJSD(beta=0.5)",
        "total_variation": "LigerTVDLoss(reduction='batchmean')",
    }.get(divergence)
    found: list[tuple[Field, Contender]] = [
        ("ours", Contender(CUDA, f"{ours}; backend 'native'", backend="native")),
        ("ours", Contender(TRITON, f"{ours}; backend 'triton'", backend="triton")),
        ("kernels", Contender(IN_PLACE, f"{ours}; inplace=True, the automatic choice of backend")),
    ]
    if divergence in EAGER or divergence in FAMILY:
        note = "log-softmaxes of both models' logits in fp32 (softmaxes for total variation), the divergence in"
        if divergence in FAMILY:
            note = (
                "(log-)softmaxes in fp32, the strong set as a mask (by topk, or by sort and cumsum), the divergence in"
            )
        found += [
            (
                "eager",
                Contender(
                    "eager", f"{note} plain PyTorch, and its backward", lambda data: eager(data.divergence, data.labels)
                ),
            ),
            (
                "compiled",
                Contender(
                    "torch.compile",
                    "torch.compile(dynamic=False) of what 'eager' runs; its compilation is not timed",
                    lambda data: eager(data.divergence, data.labels, compiled=True),
                ),
            ),
        ]
    if liger is not None:
        found += [
            (
                "kernels",
                Contender(
                    f"Liger, {name}",
                    f"F.{softmaxes} of both models' logits to {name}, {liger} on them, and the backward of both",
                    lambda data, dtype=dtype: _liger(divergence, dtype),  # type: ignore[misc]
                ),
            )
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        ]
    if divergence in SPECULATORS_RUNS:
        note = "speculators.losses.fused on the logits, the mean of its rows, and the backward; its tuning is not timed"
        found.append(("all", Contender("speculators", note, lambda data: _speculators(divergence))))
    if divergence in TRL_RUNS:
        note = "GKDTrainer.generalized_jsd_loss on the logits, in their dtype as TRL does, and its backward"
        found.append(("all", Contender("TRL", note, lambda data: _trl(divergence))))
    return found


def contenders(case: Case, without: tuple[str, ...] = ()) -> list[Contender]:
    """Who runs in a case: those of its field and of the narrower ones, but for names with a word of ``without``."""
    fields = FIELDS[: FIELDS.index(case.field) + 1]
    return [
        contender
        for field, contender in _candidates(case.divergence)
        if field in fields and not any(word.lower() in contender.name.lower() for word in without)
    ]
