"""Who runs in a case of hidden states and lm_head weights, and what exactly is timed of each.

Every peer is imported only when it is about to run, so that one that is not installed, or fails, is a line that says
why. All of them compute the mean over tokens at temperature 1 from (N, H) hidden states and (V, H) weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks.linear_cases import GIB, MIB, Case
from benchmarks.linear_inputs import Data
from benchmarks.loading import load
from benchmarks.peers import EAGER

Loss = Callable[[], Tensor]

BARE, BARE_OF_STUDENT = "the four products alone", "the three products alone"
_INTO_OUTPUTS = "matrix products over the whole batch into outputs that exist, in the operands' dtype"
BARE_TIMED = {
    BARE: f"four {_INTO_OUTPUTS}: both models' logits, G·W and Gᵀ·X for a random G",
    BARE_OF_STUDENT: f"three {_INTO_OUTPUTS}: the student's logits, G·W and Gᵀ·X for a random G",
}
OURS = "kdkernels"
EAGER_NAME, COMPILED = "eager", "torch.compile"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
#: beta of the generalised Jensen-Shannon divergence, in TRL and in Liger.
BETAS = {"forward_kl": 0.0, "jensen_shannon": 0.5}


@dataclass(frozen=True)
class Contender:
    """An implementation.

    Attributes:
        curve: which line of the plot it is a point of.
        timed: what a timed call does, for the result file; its backward belongs to every one.
        make: builds the loss of a case's inputs, or raises what keeps it from running.
        size: the setting that makes it another point of the same curve.
        compiles: it runs torch.compile, whose caches are emptied first.
        rounds: its logits have the operands' dtype.
    """

    curve: str
    timed: str
    make: Callable[[Data], Loss]
    size: str = ""
    compiles: bool = False
    rounds: bool = False

    @property
    def name(self) -> str:
        return f"{self.curve}, {self.size}" if self.size else self.curve

    @property
    def ours(self) -> bool:
        return self.curve.startswith(OURS)


def mebibytes(count: int) -> str:
    return f"{count / GIB:g} GiB" if count >= GIB else f"{count / MIB:g} MiB"


def ours(logits: str, workspace: int | None = None, labels: Tensor | None = None, compact: bool = False) -> Contender:
    def make(data: Data) -> Loss:
        hidden = data.student_hidden
        if kd.backends.choose(hidden.device, hidden.dtype) == "reference":
            raise RuntimeError(f"no kernels of kdkernels serve {hidden.device}")
        return lambda: kd.linear_distillation_loss(
            data.student_hidden,
            data.student_weight,
            data.teacher,
            labels,
            divergence=data.divergence,
            logits_dtype=getattr(torch, logits),
            workspace_bytes=workspace,
            compact=compact,
        )

    timed = f"kd.linear_distillation_loss(logits_dtype=torch.{logits}"
    size = ""
    if workspace is None:
        timed += "), the default workspace"
    else:
        timed, size = f"{timed}, workspace_bytes=…)", mebibytes(workspace)
    return Contender(f"{OURS}, {SHORT[logits]} logits", timed, make, size, rounds=logits != "float32")


def _plain(divergence: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    loss = EAGER[divergence]
    return lambda student, weight, teacher, teacher_weight: loss(
        F.linear(student, weight), F.linear(teacher, teacher_weight)
    )


def _eager(divergence: str, compiled: bool) -> Contender:
    def make(data: Data) -> Loss:
        loss = _plain(divergence)
        if compiled:
            loss = torch.compile(loss, dynamic=False)
        return lambda: loss(data.student_hidden, data.student_weight, data.teacher_hidden, data.teacher_weight)

    note = (
        "F.linear of both models in the operands' dtype, which rounds the logits to it, log-softmaxes of them in fp32, "
        "the divergence in plain PyTorch"
    )
    if compiled:
        note = f"torch.compile(dynamic=False) of what 'eager' runs ({note}); its compilation is not timed"
    return Contender(COMPILED if compiled else EAGER_NAME, note, make, compiles=compiled, rounds=True)


def trl_module() -> ModuleType:
    """TRL's chunked divergence. Its trainer's packages import datasets and more; of them the module needs one
    function, which gathers a weight that DeepSpeed has sharded and else does nothing."""
    given = {"trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *parameters: nullcontext()}}
    return load("trl.kernels.chunked_divergence", given=given)


TRL_CHUNK = 4096  # TRL 1.16's own


def _trl(divergence: str, chunk: int = TRL_CHUNK) -> Contender:
    def make(data: Data) -> Loss:
        module = trl_module()
        vars(module)["TOKEN_CHUNK_SIZE"] = chunk

        def loss() -> Tensor:
            apply = module.ChunkedDivergenceFunction.apply
            rows, _ = apply(
                data.student_hidden,
                data.student_weight,
                None,
                data.teacher_hidden,
                data.teacher_weight,
                None,
                BETAS[divergence],
            )
            return rows.sum() / len(rows)

        return loss

    note = (
        f"trl.kernels.chunked_divergence.ChunkedDivergenceFunction(beta={BETAS[divergence]:g}), the mean of its rows: "
        "fp32 logits in tiles of tokens × 32768 columns, formed again in backward; dX and dW accumulated in fp32; it "
        "computes the student's entropy too"
    )
    if chunk == TRL_CHUNK:
        return Contender("TRL", f"{note}; tiles of {TRL_CHUNK} tokens, its own choice", make)
    return Contender("TRL", f"{note}; TOKEN_CHUNK_SIZE changed in the module", make, f"{chunk} tokens")


def _liger_fused(divergence: str, accumulate: torch.dtype | None) -> Contender:
    def make(data: Data) -> Loss:
        module = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
        loss = module.LigerFusedLinearJSD(jsd_beta=BETAS[divergence], accum_dtype=accumulate)
        return lambda: loss(
            data.student_hidden, data.student_weight, data.teacher_hidden, data.teacher_weight, None
        ).float()

    where = "in the weight's dtype, its default" if accumulate is None else "in fp32 (accum_dtype)"
    name = "Liger, fused_linear_jsd" + ("" if accumulate is None else " with fp32 dW")
    note = (
        f"LigerFusedLinearJSD(jsd_beta={BETAS[divergence]:g}) without labels: logits, log-softmaxes and divergence in "
        f"fp32, dW accumulated {where}; its chunks follow from V / H and cannot be chosen; backward waits for the GPU"
    )
    return Contender(name, note, make)


LIGER_CHUNK = 1024  # LigerFusedLinearJSDLoss's own


def _liger_chunked(divergence: str, chunk: int = LIGER_CHUNK) -> Contender:
    def make(data: Data) -> Loss:
        module = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
        loss = module.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[divergence], compiled=True, chunk_size=chunk
        )
        labels = torch.zeros(len(data.student_hidden), dtype=torch.int64, device=data.student_hidden.device)
        return lambda: loss(data.student_hidden, data.student_weight, data.teacher_hidden, data.teacher_weight, labels)

    note = (
        f"LigerFusedLinearJSDLoss(weight_hard_loss=0, weight_soft_loss=1, beta={BETAS[divergence]:g}, compiled=True): "
        "logits, log-softmaxes and divergence in the operands' dtype, dW accumulated in the weight's; every label "
        "counts; backward waits for the GPU; its compilation is not timed"
    )
    size = "" if chunk == LIGER_CHUNK else f"{chunk} rows"
    note += f"; chunk_size={LIGER_CHUNK}, its default" if chunk == LIGER_CHUNK else "; chunk_size set"
    return Contender("Liger, chunked", note, make, size, compiles=True, rounds=True)


def fla_module() -> ModuleType:
    """fla's fused KL divergence, without what fla.modules and fla.ops import besides."""
    given = {"fla": {"__version__": "unknown"}}
    return load("fla.modules.fused_kl_div.ops", bare=("fla.ops", "fla.ops.utils"), given=given)


def _fla(accumulate_in_fp32: bool) -> Contender:
    def make(data: Data) -> Loss:
        loss = fla_module().FusedKLDivLoss(reduction="batchmean", accumulate_grad_in_fp32=accumulate_in_fp32)
        return lambda: loss(data.student_hidden, data.teacher_hidden, data.student_weight, data.teacher_weight)

    name = "fla" if accumulate_in_fp32 else "fla with dW in the weight's dtype"
    product = "dW by an fp32 product, its default" if accumulate_in_fp32 else "dW accumulated in the weight's dtype"
    note = (
        f"fla's FusedKLDivLoss(accumulate_grad_in_fp32={accumulate_in_fp32}): logits in the operands' dtype, "
        f"log-softmaxes in fp32, their gradient in the operands' dtype, {product}; its chunks follow from V / H, eight "
        "at most"
    )
    return Contender(name, note, make, rounds=True)


def _peers(case: Case) -> Iterator[Contender]:
    if case.kind == "sizes":
        for chunk in case.chunks:
            if chunk != TRL_CHUNK:
                yield _trl(case.divergence, chunk)
        for chunk in case.chunks:
            if chunk != LIGER_CHUNK:
                yield _liger_chunked(case.divergence, chunk)
        return
    yield _eager(case.divergence, compiled=False)
    if case.field == "all":
        yield _eager(case.divergence, compiled=True)
    if case.divergence not in BETAS:
        return
    yield _trl(case.divergence)
    yield _liger_fused(case.divergence, None)
    yield _liger_fused(case.divergence, torch.float32)
    if case.divergence == "forward_kl":
        yield _fla(accumulate_in_fp32=True)
        yield _fla(accumulate_in_fp32=False)
    if case.field == "all":
        yield _liger_chunked(case.divergence)


def contenders(case: Case, device: str, words: Sequence[str] = (), without: Sequence[str] = ()) -> list[Contender]:
    """Who runs in a case, ours first.

    Args:
        device: on a CPU only ours, eager and torch.compile run.
        words: of --only: "ours" or "peers" without the other leaves the other out.
        without: words of names to leave out.
    """
    found = []
    if "ours" in words or "peers" not in words:
        sizes = case.workspaces if case.kind == "sizes" else (None, *case.workspaces)
        found += [ours(logits, size) for size in sizes for logits in case.logits]
    if ("peers" in words or "ours" not in words) and case.field != "ours":
        found += _peers(case)
    if torch.device(device).type == "cpu":
        found = [contender for contender in found if contender.ours or contender.curve in (EAGER_NAME, COMPILED)]
    return [contender for contender in found if not any(word.lower() in contender.name.lower() for word in without)]
