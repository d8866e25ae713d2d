"""The ids of a sparse teacher's rows, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def first_occurrences(ids: Tensor, vocab_size: int) -> Tensor:  # (..., K) -> (..., K) bool
    """Which ids name a token that none before them in the row names: not padding, not repeated, not out of range."""
    ordered, order = ids.sort(dim=-1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    first &= (ordered >= 0) & (ordered < vocab_size)
    return torch.empty_like(first).scatter_(-1, order, first)


def out_of_range(ids: Tensor, vocab_size: int) -> Tensor:  # (..., K) -> (...) bool
    """Rows that name a token outside the vocabulary."""
    return (ids >= vocab_size).any(-1)
