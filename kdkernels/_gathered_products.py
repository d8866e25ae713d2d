"""Products with a few rows of an lm_head for each token: logits at given ids, and the gradients that come of those.

N·K·H work for K ids a token, where all logits take N·V·H. Triton's kernels gather rows into registers; plain PyTorch
gathers them into memory, a piece at a time. Sums are in fp32 (fp64), in an order that depends on the ids alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import triton

with suppress(ImportError):
    from kdkernels.backends import _triton_gathered as kernels

PIECE_BYTES = 8 << 20  # of gathered rows in plain PyTorch
LEAST_COLUMNS = 64  # of a weight's gradient that are summed at a time there
# Of the Triton kernels: ids and columns of a tile of logits; rows and columns of a tile of a sum.
LOGITS_TILE = (16, 256)
SUM_TILE = (4, 1024)
LANE_COLUMNS = 8
# Entries of one token that a program adds up by itself.
PART = 256


def in_triton(device: torch.device, backend: str) -> bool:
    """Whether Triton's kernels form the products, whoever sweeps the rows: on a GPU wherever it is installed."""
    return triton.why_not(device) is None and (device.type != "cpu" or backend == "triton")


class Segments(NamedTuple):
    """What the gradient of a weight is summed from: an entry for each id of each token, sorted by id, then by token."""

    tokens: Tensor  # (E,) int32; V and last: none
    rows: Tensor  # (E,) int32: the token (of the text) it belongs to
    factors: Tensor  # (E,)
    offsets: Tensor  # (V + 1,) int32: token v has the entries [offsets[v], offsets[v + 1])


def segments(
    places: Tensor,  # (n, K) int32; -1: none
    gradient: Tensor,  # (n, K), of the logits
    vocabulary: int,
) -> Segments:
    tokens, order = torch.where(places >= 0, places, vocabulary).view(-1).sort(stable=True)
    each = torch.arange(vocabulary + 1, dtype=torch.int32, device=places.device)
    return Segments(
        tokens=tokens,
        rows=(order // places.shape[1]).to(torch.int32),
        factors=gradient.view(-1).index_select(0, order),
        offsets=torch.searchsorted(tokens, each, out_int32=True),
    )


def logits(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    scale: float,
    places: Tensor,  # (n, K) int32; -1: none
    out: Tensor,  # (n, K) fp32 or fp64, written
    *,
    fused: bool,
) -> None:
    """out = scale·(hidden @ weightᵀ + bias) at each token's places; -inf where there is none."""
    if fused:
        _logits_in_triton(hidden, weight, bias, scale, places, out)
        return
    for rows, ids, found in _pieces(places, weight, out.dtype):
        out[rows, ids] = torch.bmm(found, hidden[rows].to(out.dtype).unsqueeze(2)).squeeze(2)
    if bias is not None:
        out.add_(bias.index_select(0, places.clamp(min=0).view(-1)).view(places.shape))
    out.mul_(scale).masked_fill_(places < 0, -torch.inf)


def of_hidden(
    gradient: Tensor,  # (n, K), of the logits: 0 where there is none
    places: Tensor,  # (n, K) int32; -1: none
    weight: Tensor,  # (V, H)
    out: Tensor,  # (n, H), written
    *,
    fused: bool,
) -> None:
    """out = gradient @ weight[places], token by token."""
    if fused:
        _of_hidden_in_triton(gradient, places, weight, out)
        return
    total = gradient.new_empty(0)
    for rows, ids, found in _pieces(places, weight, gradient.dtype):
        part = torch.bmm(gradient[rows, ids].unsqueeze(1), found).squeeze(1)
        total = part if ids.start == 0 else total + part
        if ids.stop == places.shape[1]:
            out[rows] = total


def of_weight(
    entries: Segments,
    hidden: Tensor,  # (n, H)
    out: Tensor,  # (V, H), written
    *,
    add: bool,
    fused: bool,
) -> None:
    """out = the sum of factor·hidden over each token's entries, 0 where it has none; or that added to out."""
    if fused:
        _of_weight_in_triton(entries, hidden, out, add)
        return
    _, rows, factors, offsets = entries
    if rows.device.type == "cpu":  # which alone can be asked how many there are
        rows, factors = rows[: int(offsets[-1])], factors[: int(offsets[-1])]
    step = max(LEAST_COLUMNS, PIECE_BYTES // (factors.element_size() * out.shape[0]))
    for start in range(0, out.shape[1], step):
        block = slice(start, start + step)
        part = torch.nn.functional.embedding_bag(
            rows,
            hidden[:, block].to(factors.dtype),
            offsets,
            mode="sum",
            per_sample_weights=factors,
            include_last_offset=True,
        )
        if add:
            out[:, block] += part
        else:
            out[:, block] = part


def _pieces(places: Tensor, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of tokens and ids, and the weight's rows there (n', K', H) in ``dtype``: PIECE_BYTES of them at a time."""
    (n, k), size = places.shape, weight.shape[1]
    at_a_time = max(1, PIECE_BYTES // (dtype.itemsize * max(1, size)))
    ids_each = min(k, at_a_time)
    rows_each = at_a_time // ids_each if ids_each == k else 1
    for first in range(0, n, rows_each):
        for start in range(0, k, ids_each):
            rows, ids = slice(first, min(first + rows_each, n)), slice(start, min(start + ids_each, k))
            block = places[rows, ids].clamp(min=0)
            found = weight.index_select(0, block.reshape(-1)).to(dtype)
            yield rows, ids, found.view(*block.shape, size)


def _tile(width: int) -> dict[str, int]:
    """How a sum of rows is compiled: columns of a block, and as many warps as have lanes for them."""
    rows, most = SUM_TILE
    block = max(16, min(most, 1 << max(0, width - 1).bit_length()))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, block // (32 * LANE_COLUMNS))}


def _blocks(width: int, block: int) -> int:
    return -(-width // block)


def _logits_in_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, places: Tensor, out: Tensor
) -> None:
    (n, k), (ids, block) = places.shape, LOGITS_TILE
    with triton._on(out.device):
        kernels.logits_kernel[(n, _blocks(k, ids))](
            hidden,
            weight,
            out if bias is None else bias.contiguous(),
            places,
            out,
            k,
            hidden.shape[1],
            *hidden.stride(),
            *weight.stride(),
            scale,
            HAS_BIAS=bias is not None,
            IDS=ids,
            BLOCK=block,
            num_warps=4,
        )


def _of_hidden_in_triton(gradient: Tensor, places: Tensor, weight: Tensor, out: Tensor) -> None:
    width, tile = out.shape[1], _tile(out.shape[1])
    if width == 0:
        return
    with triton._on(out.device):
        kernels.of_hidden_kernel[(out.shape[0], _blocks(width, tile["BLOCK"]))](
            gradient, places, weight, out, places.shape[1], width, *weight.stride(), **tile
        )


def _of_weight_in_triton(entries: Segments, hidden: Tensor, out: Tensor, add: bool) -> None:
    tokens, rows, factors, offsets = entries
    (vocabulary, width), tile = out.shape, _tile(out.shape[1])
    if width == 0:
        return
    blocks = _blocks(width, tile["BLOCK"])
    with triton._on(out.device):
        kernels.of_weight_kernel[(vocabulary, blocks)](
            rows, factors, offsets, hidden, out, width, *hidden.stride(), ADD=add, PART=PART, **tile
        )
        if hidden.shape[0] <= PART:  # a token has no more entries than there are rows
            return
        number, windows = tokens.numel(), _blocks(tokens.numel(), PART)
        parts = torch.empty((windows, 2, width), dtype=torch.float32, device=out.device)
        kernels.parts_kernel[(windows, blocks, 2)](
            *entries, hidden, parts, number, vocabulary, width, *hidden.stride(), PART=PART, **tile
        )
        del tile["ROWS"]
        kernels.sum_of_parts_kernel[(windows, blocks)](
            tokens, offsets, parts, out, number, vocabulary, width, ADD=add, PART=PART, **tile
        )
