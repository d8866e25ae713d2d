"""Rows of unequal length, one after the other in flat tensors, as tensors padded to the longest."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(
    ids: Tensor,  # (E,)
    logprobs: Tensor,  # (E,)
    counts: Tensor,  # (...)
    width: int | None = None,
) -> tuple[Tensor, Tensor]:  # (..., K) each
    """The rows' ids and log-probabilities, in order; where a row has no more: -1 and -inf.

    Args:
        ids, logprobs: all rows' entries, in the order of the rows.
        counts: how many each row has; any integer dtype.
        width: K, at least as many as any row has; None: as many as the longest has, at least 1.
    """
    if width is None:
        width = max(1, int(counts.max()) if counts.numel() else 0)
    there = torch.arange(width, device=counts.device) < counts.unsqueeze(-1)
    return (
        torch.full(there.shape, -1, dtype=ids.dtype, device=ids.device).masked_scatter_(there, ids),
        torch.full(there.shape, -torch.inf, dtype=logprobs.dtype, device=ids.device).masked_scatter_(there, logprobs),
    )
