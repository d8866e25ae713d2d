"""The losses that a case can name: every divergence by its own name, and the decoupled ones with their strong sets.

The decoupled weights are not all 1, where the sum would be plain forward KL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kdkernels as kd

MASKED_SHARE = 0.01


@dataclass(frozen=True)
class Rows:
    """What a loss is built for: rows of logits, and where masks come from."""

    leading: tuple[int, ...]
    width: int
    generator: torch.Generator

    def mask(self, *shape: int) -> Tensor:  # (*shape, V) bool
        """About 1 % of the tokens by lot, and always the first, so that no row's strong set is empty."""
        device = self.generator.device
        inside = torch.rand(*shape, self.width, generator=self.generator, device=device) < MASKED_SHARE
        inside[..., 0] = True
        return inside


def _decoupled(strong: kd.StrongSet) -> kd.Decoupled:
    return kd.Decoupled(strong, bcd=1.0, scd=2.0, wcd=0.5)


GIVEN_PER_ROW = "decoupled given per row"

#: Losses over a split vocabulary.
FAMILY: dict[str, Callable[[Rows], kd.Divergence]] = {
    "decoupled label": lambda rows: _decoupled(kd.Label()),
    "dkd": lambda rows: kd.DKD(),
    "decoupled top-k 32": lambda rows: _decoupled(kd.TopK(32)),
    "decoupled top-p 0.5": lambda rows: _decoupled(kd.TopP(0.5)),
    "decoupled given": lambda rows: _decoupled(kd.Given(rows.mask())),
    GIVEN_PER_ROW: lambda rows: _decoupled(kd.Given(rows.mask(*rows.leading))),
    "adaptive_kl": lambda rows: kd.AdaptiveKL(),
}


def build(name: str, rows: Rows) -> kd.Divergence:
    """The divergence of this name."""
    return FAMILY[name](rows) if name in FAMILY else kd.divergences.BY_NAME[name]()


def reads_labels(divergence: kd.Divergence) -> bool:
    return isinstance(divergence.canonical().strong_set(), kd.Label)


def of_rows(divergence: kd.Divergence, index: tuple[Tensor | slice, ...]) -> kd.Divergence:
    """The divergence for some of the rows: their part of a mask that has one row each."""
    if not isinstance(divergence, kd.Decoupled) or not isinstance(divergence.strong, kd.Given):
        return divergence
    mask = divergence.strong.mask
    return divergence if mask.dim() == 1 else replace(divergence, strong=kd.Given(mask[index]))
