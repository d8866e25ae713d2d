"""Time and peak memory of head and loss, forward and backward, eager PyTorch against kdkernels."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from training import Loss, precision

import kdkernels as kd


@dataclass(frozen=True)
class Objective:
    """kd_weight · T² · divergence + ce_weight · cross-entropy, from hidden states and heads."""

    divergence: kd.Divergence
    temperature: float
    kd_weight: float
    ce_weight: float

    @cached_property
    def linear_loss(self) -> kd.LinearDistillationLoss:
        return kd.LinearDistillationLoss(
            divergence=self.divergence,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            return_stats=True,
        )

    def fused(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        teacher: kd.LinearTeacher | kd.TopKTeacher,
        labels: Tensor,
        record: Callable[[kd.RowStats], None] | None = None,
    ) -> Tensor:
        """The loss by kdkernels; its statistics, which it has anyway, go to ``record``."""
        loss, stats = self.linear_loss(hidden, weight, teacher, labels)
        if record is not None:
            record(stats)
        return loss

    def eager(
        self, hidden: Tensor, weight: Tensor, *, teacher: kd.LinearTeacher | kd.TopKTeacher, labels: Tensor
    ) -> Tensor:
        """The same as it is usually written in PyTorch; bfloat16 logits are upcast, as Transformers does."""
        student_logits = F.linear(hidden, weight).float().flatten(0, -2)
        log_q = F.log_softmax(student_logits / self.temperature, dim=-1)
        if isinstance(teacher, kd.TopKTeacher):
            log_p, log_q = bucketed(teacher, log_q)
        else:
            log_p = F.log_softmax(F.linear(*teacher).float().flatten(0, -2) / self.temperature, dim=-1)
        divergence = eager_divergence(self.divergence, log_p, log_q)
        cross_entropy = F.cross_entropy(student_logits, labels.flatten())
        return self.kd_weight * self.temperature**2 * divergence + self.ce_weight * cross_entropy


def bucketed(teacher: kd.TopKTeacher, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities of the tokens that the teacher names, and of all others as one more token."""
    ids = teacher.ids.long().flatten(0, -2)
    strong_p, strong_q = teacher.logprobs.float().flatten(0, -2), log_q.gather(-1, ids.clamp(min=0))
    # A negative id is no token: next to no probability for both models, as 0·log 0 would be NaN.
    log_p, log_q = (with_the_rest(strong.masked_fill(ids < 0, -100.0)) for strong in (strong_p, strong_q))
    return log_p, log_q


def with_the_rest(log_probs: Tensor) -> Tensor:
    mass = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)  # rounding may take a sum of probabilities to 1
    return torch.cat([log_probs, torch.log(-torch.expm1(mass))], dim=-1)


def eager_divergence(divergence: kd.Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over the rows of the divergence between teacher p and student q."""
    if isinstance(divergence, kd.ForwardKL):
        return kl_div(log_p, log_q)
    if isinstance(divergence, kd.ReverseKL):
        return kl_div(log_q, log_p)
    if isinstance(divergence, kd.SkewForwardKL):
        return kl_div(log_p, log_mixture(log_p, log_q, divergence.lam))
    if isinstance(divergence, kd.JensenShannon):
        log_m, beta = log_mixture(log_p, log_q, divergence.beta), divergence.beta
        return beta * kl_div(log_p, log_m) + (1 - beta) * kl_div(log_q, log_m)
    if isinstance(divergence, kd.CAKD) and isinstance(divergence.strong, kd.TopK):
        strong = log_p >= log_p.topk(divergence.strong.k, dim=-1).values[:, -1:]
        strong_p, strong_q, scd = split(log_p, log_q, strong)
        weak_p, weak_q, wcd = split(log_p, log_q, ~strong)
        bcd = strong_p.exp() * (strong_p - strong_q) + weak_p.exp() * (weak_p - weak_q)
        return (bcd + divergence.alpha * scd + divergence.beta * wcd).mean()
    raise TypeError(f"no eager form of {divergence}")


def kl_div(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q); PyTorch takes the second distribution first."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def split(log_p: Tensor, log_q: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-masses of a set of tokens, and KL(p‖q) of the distributions inside it, row by row."""
    mass_p = log_p.masked_fill(~inside, -torch.inf).logsumexp(-1)
    mass_q = log_q.masked_fill(~inside, -torch.inf).logsumexp(-1)
    log_p, log_q = log_p - mass_p[:, None], log_q - mass_q[:, None]
    return mass_p, mass_q, (log_p.exp() * (log_p - log_q)).masked_fill(~inside, 0).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share · p + (1 - share) · q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


@dataclass(frozen=True)
class Cost:
    """What the way from hidden states to loss and gradients takes."""

    milliseconds: float
    peak_mebibytes: float | None  # above the inputs; None where it cannot be measured
    loss: float


def measure(loss: Loss, hidden: Tensor, weight: Tensor, runs: int) -> Cost:
    """Median time and peak memory of the loss and of its gradients for hidden states and head."""
    value = forward_backward(loss, hidden, weight).item()
    peak = peak_memory(lambda: forward_backward(loss, hidden, weight), hidden.device)
    times = []
    for _ in range(runs):
        synchronize(hidden.device)
        start = time.perf_counter()
        forward_backward(loss, hidden, weight)
        synchronize(hidden.device)
        times.append(1e3 * (time.perf_counter() - start))
    return Cost(statistics.median(times), None if peak is None else peak / 2**20, value)


def forward_backward(loss: Loss, hidden: Tensor, weight: Tensor) -> Tensor:
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]  # their gradients are gone with them
    with precision(hidden.device):
        value = loss(*leaves)
    value.backward()
    return value.detach()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that the run has allocated at once at most, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        return peak_resident_memory(run)
    return None


def peak_resident_memory(run: Callable[[], object]) -> int | None:
    """The same by Linux's count of the process's resident memory; None on another system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library keeps would hide what the run takes from it
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = resident_memory("VmRSS")
        run()
        return max(0, resident_memory("VmHWM") - before)
    except OSError:
        return None


def resident_memory(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == entry:
            return 1024 * int(value.split()[0])
    raise OSError(f"/proc/self/status has no {entry}")
