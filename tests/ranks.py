"""What each rank does in the test of DistributedDataParallel: a module of its own, which a new process can import."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from feature_cases import CASES, LOSSES, TOKENS, Batch, Student, batch, loss_of
from torch import Tensor, nn

RANKS = 2
# Sequences of each rank: of three, so that the ranks' tokens are not as many.
SEQUENCES = (slice(0, 2), slice(2, 3))


def _loss(loss: str, case: str, model: nn.Module, sequences: slice, **options) -> Tensor:
    given = batch(loss, case, *TOKENS.shape)
    # A weight has no sequences.
    teacher = tuple(x[sequences] if x.dim() > 2 else x for x in given.teacher)
    student = model(loss, TOKENS[sequences])
    return loss_of(loss, case, Batch(student, teacher, given.labels[sequences]), temperature=2.0, **options)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def train(rank: int, results: Path) -> None:
    """Saves the gradients that this rank is left with, by loss and case."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{results / 'store'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=30),
    )
    found = {}
    for loss in LOSSES:
        for case in CASES:
            model = nn.parallel.DistributedDataParallel(Student())
            counted = (batch(loss, case, *TOKENS.shape).labels[SEQUENCES[rank]] != -100).sum()
            dist.all_reduce(counted)
            # The ranks' gradients are averaged, not added up.
            _loss(loss, case, model, SEQUENCES[rank], ce_weight=0.3, normalizer=counted / RANKS).backward()
            found[f"{loss}, {case}"] = _gradients(model)
    torch.save(found, results / f"{rank}.pt")
    dist.destroy_process_group()


def of_one_process() -> dict[str, list[Tensor]]:
    """The gradients of the whole batch."""
    found = {}
    for loss in LOSSES:
        for case in CASES:
            model = Student()
            _loss(loss, case, model, slice(None), ce_weight=0.3).backward()
            found[f"{loss}, {case}"] = _gradients(model)
    return found
