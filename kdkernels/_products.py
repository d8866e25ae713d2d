"""The matrix products of a fused lm_head: 16-bit operands, results in fp32 where they are asked for in fp32.

On an NVIDIA GPU that is one call of cuBLAS. Elsewhere PyTorch has no such product: blocks of the operands are taken to
fp32 first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 8 << 20  # of a weight in fp32, where it has to be converted


def _mixed(device: torch.device) -> bool:
    """Whether a product of 16-bit operands can be written in fp32."""
    return device.type == "cuda" and torch.version.hip is None and hasattr(torch.ops.aten.addmm, "dtype_out")


def _direct(a: Tensor, b: Tensor, out: Tensor) -> bool:
    return a.dtype == b.dtype and (out.dtype == a.dtype or (out.dtype == torch.float32 and _mixed(a.device)))


def _product(a: Tensor, b: Tensor, out: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = beta·out + alpha·a @ b, for dtypes that :func:`_direct` allows."""
    if 0 in (*a.shape, *b.shape):
        out.mul_(beta) if beta else out.zero_()
    elif out.dtype == a.dtype:
        if alpha == 1 and beta == 0:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif alpha == 1 and beta == 0:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight (V, H), so many at a time that they take BLOCK_BYTES in fp32."""
    rows = max(64, BLOCK_BYTES // (4 * max(1, weight.shape[1])))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def logits(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    scale: float,
    out: Tensor,  # (n, V), written
) -> None:
    """out = scale·(hidden @ weightᵀ + bias)."""
    if _direct(hidden, weight, out):
        _product(hidden, weight.t(), out, alpha=scale)
    else:
        wide = _wide(out.dtype)
        x = hidden.to(wide)
        for block in _blocks(weight):
            part = torch.empty((x.shape[0], block.stop - block.start), dtype=wide, device=out.device)
            target = out[:, block] if out.dtype == wide else part
            _product(x, weight[block].to(wide).t(), target, alpha=scale)
            if target is part:
                out[:, block] = part
    if bias is not None:
        out.add_(bias, alpha=scale)


def of_hidden(
    gradient: Tensor,  # (n, V), of the logits
    weight: Tensor,  # (V, H)
    scale: float,
    out: Tensor,  # (n, H), written
) -> None:
    """out = scale·gradient @ weight."""
    if _direct(gradient, weight, out):
        _product(gradient, weight, out, alpha=scale)
        return
    wide = _wide(gradient.dtype)
    total = torch.zeros(out.shape, dtype=wide, device=out.device)
    for block in _blocks(weight):
        _product(gradient[:, block].to(wide), weight[block].to(wide), total, alpha=scale, beta=1.0)
    out.copy_(total)


def of_weight(
    gradient: Tensor,  # (n, V), of the logits
    hidden: Tensor,  # (n, H)
    scale: float,
    out: Tensor,  # (V, H), written
    *,
    add: bool,
) -> None:
    """out = scale·gradientᵀ @ hidden, or that added to out."""
    beta = 1.0 if add else 0.0
    if _direct(gradient, hidden, out):
        _product(gradient.t(), hidden, out, alpha=scale, beta=beta)
        return
    wide = _wide(gradient.dtype)
    x = hidden.to(wide)
    for block in _blocks(out):
        g = gradient[:, block].to(wide).t()
        if out.dtype == wide:
            _product(g, x, out[block], alpha=scale, beta=beta)
        else:
            part = torch.empty((block.stop - block.start, x.shape[1]), dtype=wide, device=out.device)
            _product(g, x, part, alpha=scale)
            out[block] = part + out[block] if add else part
