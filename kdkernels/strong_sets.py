"""Which tokens of a row are strongly correlated: how a decoupled divergence splits the vocabulary.

The rest of the vocabulary is the weak set. Sets go by the teacher's logits after its transform; the temperature moves
no token of :class:`TopK` and decides the masses of :class:`TopP`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class StrongSet:
    """Base class: how a row's strong set S is chosen."""

    name: ClassVar[str]

    @property
    def amount(self) -> float:
        """The number a kernel of this ``name`` takes."""
        return 0.0


@dataclass(frozen=True)
class Label(StrongSet):
    """S is the row's label alone (DKD, arXiv 2203.08679). Needs ``labels``."""

    name: ClassVar[str] = "label"


@dataclass(frozen=True)
class TopK(StrongSet):
    """Every token whose teacher logit is at least the k-th largest: k tokens, and all that tie with the last of them.

    Args:
        k: 1 <= k <= vocabulary size.
    """

    k: int
    name: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"TopK: k must be an int, got {type(self.k).__name__}")
        if self.k < 1:
            raise ValueError(f"TopK: k must be at least 1, got {self.k}")

    @property
    def amount(self) -> float:
        return float(self.k)


@dataclass(frozen=True)
class TopP(StrongSet):
    """The smallest set {teacher logit >= threshold} that holds at least this much of the teacher's probability.

    Args:
        mass: 0 < mass <= 1, at the loss's temperature.
    """

    mass: float
    name: ClassVar[str] = "top_p"

    def __post_init__(self) -> None:
        if isinstance(self.mass, bool) or not isinstance(self.mass, (int, float)):
            raise TypeError(f"TopP: mass must be a number, got {type(self.mass).__name__}")
        if not 0 < self.mass <= 1:
            raise ValueError(f"TopP: mass must lie in (0, 1], got {self.mass}")

    @property
    def amount(self) -> float:
        return float(self.mass)


@dataclass(frozen=True, eq=False)
class Given(StrongSet):
    """S as given: a boolean mask, (V,) for all rows or (..., V) with the rows of the student's logits.

    Args:
        mask: True where a token is in S; contiguous in its last dimension, on the logits' device. May be as wide as
            either model's logits or as ``vocab_size``.
    """

    mask: Tensor
    name: ClassVar[str] = "given"

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor):
            raise TypeError(f"Given: mask must be a boolean Tensor, got {type(self.mask).__name__}")
        if self.mask.dtype != torch.bool:
            raise TypeError(f"Given: mask must be a boolean Tensor, got {self.mask.dtype}")
        if self.mask.dim() < 1:
            raise ValueError("Given: mask must be (V,) or (..., V), got a scalar")
