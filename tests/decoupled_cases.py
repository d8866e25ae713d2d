"""The decoupled divergences every backend is tested on, and inputs at the edges of their strong sets."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import kdkernels as kd

# By name: a divergence for rows of ``width`` tokens. A mask depends on the width alone, so that it fits any rows.
FAMILY = {
    "label": lambda width: kd.Decoupled(kd.Label()),
    "label_weighted": lambda width: kd.Decoupled(kd.Label(), bcd=0.5, scd=2.0, wcd=3.0),
    "dkd": lambda width: kd.DKD(),
    "dkd_2_0.5": lambda width: kd.DKD(2.0, 0.5),
    "top_1": lambda width: kd.Decoupled(kd.TopK(1), 1.0, 2.0, 0.5),
    "top_5": lambda width: kd.Decoupled(kd.TopK(min(5, width))),
    "top_32_no_tail": lambda width: kd.Decoupled(kd.TopK(min(32, width)), wcd=0.0),
    "top_all": lambda width: kd.Decoupled(kd.TopK(width), 1.0, 0.7, 1.0),
    "top_most": lambda width: kd.Decoupled(kd.TopK(max(1, width * 3 // 4)), 1.0, 0.7, 2.0),
    "cakd_top_k": lambda width: kd.CAKD(0.7, 1.3, kd.TopK(min(20, width))),
    "top_p_0.5": lambda width: kd.Decoupled(kd.TopP(0.5)),
    "cakd_top_p": lambda width: kd.CAKD(2.0, 0.5, kd.TopP(0.9)),
    "top_p_1": lambda width: kd.Decoupled(kd.TopP(1.0), scd=0.5),
    "given": lambda width: kd.Decoupled(kd.Given(mask_of(width)), 1.0, 2.0, 0.5),
    "cakd_given": lambda width: kd.CAKD(1.0, 2.0, kd.Given(mask_of(width))),
    "given_none": lambda width: kd.Decoupled(kd.Given(torch.zeros(width, dtype=torch.bool)), wcd=2.0),
    "given_all": lambda width: kd.CAKD(3.0, 1.0, kd.Given(torch.ones(width, dtype=torch.bool))),
    "no_bcd": lambda width: kd.Decoupled(kd.TopK(min(3, width)), bcd=0.0),
    "adaptive_kl": lambda width: kd.AdaptiveKL(),
    "adaptive_kl_0.9": lambda width: kd.AdaptiveKL(0.9),
}


def mask_of(width: int, seed: int = 0) -> Tensor:  # (width,)
    return torch.rand(width, generator=torch.Generator().manual_seed(seed)) < 0.3


def labels_for(rows: int, width: int, seed: int = 0) -> Tensor:  # (rows,)
    return torch.randint(0, width, (rows,), generator=torch.Generator().manual_seed(seed))


def light_weak_set(rows: int, width: int, strong: int, gap: float = 16.0) -> tuple[Tensor, Tensor]:
    """Student and teacher (rows, width) whose weak set, all but the first ``strong`` tokens, holds about e^-gap."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(rows, width, generator=generator) for _ in range(2))
    shift = gap + torch.tensor(width / strong).log()
    return student.index_add(1, torch.arange(strong), shift.expand(rows, strong)), teacher.index_add(
        1, torch.arange(strong), shift.expand(rows, strong)
    )


def tied(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """A teacher of few distinct logits: every edge of a top-k falls into a tie."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, width, generator=generator), torch.randint(
        0, 6, (rows, width), generator=generator
    ).float()


def on_device(divergence: kd.Divergence, device: str) -> kd.Divergence:
    """The divergence with its mask and its weights, where those are Tensors, on a device."""
    moved = {}
    for field in dataclasses.fields(divergence):
        value = getattr(divergence, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device)
        elif isinstance(value, kd.Given):
            moved[field.name] = kd.Given(value.mask.to(device))
    return dataclasses.replace(divergence, **moved)
