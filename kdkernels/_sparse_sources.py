"""Sparse teachers from a dense one: the top of its logits, or draws from it. Rows are taken a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdkernels._arguments import FLOAT_DTYPES, check_float, check_number
from kdkernels.teachers import MOST_IDS, TAILS

# Bytes of what is copied of the logits at a time. Rows of 128k tokens come by the hundred: enough for every core.
CHUNK_BYTES = 2**26
# Ids are int32.
LARGEST_VOCABULARY = 2**31 - 1


def check_tail(tail: object) -> None:
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")


def check_positive(name: str, value: object) -> None:
    check_number(name, value)
    if value <= 0:  # type: ignore[operator]  # a number, as was just checked
        raise ValueError(f"{name} must be positive, got {value}")


def check_count(name: str, value: object, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 1 <= value <= most:
        raise ValueError(f"{name} must lie in [1, {most}], got {value}")
    return value


def _check_dtype(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    return dtype


def _check_dense(logits: object, temperature: float, vocab_size: int | None) -> Tensor:
    """The logits of tokens, without padding columns, detached."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a Tensor (..., V), got {type(logits).__name__}")
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have at least one column (..., V), got shape {tuple(logits.shape)}")
    check_positive("temperature", temperature)
    width = logits.shape[-1]
    return logits.detach()[..., : width if vocab_size is None else check_count("vocab_size", vocab_size, width)]


def _chunks(logits: Tensor, rows: int) -> Iterator[Tensor]:
    """The rows in order, so many at a time, as views (n, V): also of logits[:, :-1], whose rows are no one matrix."""
    if logits.dim() <= 2:
        yield from torch.atleast_2d(logits).split(rows)
        return
    try:
        flat = logits.view(-1, logits.shape[-1])
    except RuntimeError:
        for part in logits.unbind(0):
            yield from _chunks(part, rows)
    else:
        yield from flat.split(rows)


def _rows_of(width: int, dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (width * dtype.itemsize))


@torch.no_grad()
def top_k(
    logits: Tensor,  # (..., V)
    k: int,
    temperature: float,
    vocab_size: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (..., k) int32, (..., k) of dtype
    """The k largest of each row, largest first, and their log-probabilities over the whole row."""
    logits = _check_dense(logits, temperature, vocab_size)
    width = logits.shape[-1]
    check_count("k", k, min(width, MOST_IDS))
    _check_dtype(dtype)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:-1].numel()
    ids = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(rows, k, dtype=dtype, device=logits.device)
    done = 0
    for chunk in _chunks(logits, _rows_of(width, wide)):
        values, at = chunk.topk(k, -1)
        values = values.to(wide)
        # From the largest: neither the normaliser nor the differences lose digits to the logits' size.
        largest = values[:, :1]
        normaliser = chunk.to(wide, copy=True).sub_(largest).div_(temperature).exp_().sum(-1, keepdim=True).log_()
        here = slice(done, done + chunk.shape[0])
        ids[here] = at
        logprobs[here] = (values - largest) / temperature - normaliser
        done += chunk.shape[0]
    shape = (*logits.shape[:-1], k)
    return ids.view(shape), logprobs.view(shape)


@torch.no_grad()
def draw(
    logits: Tensor,  # (..., V)
    draws: int,
    temperature: float,
    generator: torch.Generator | None,
    vocab_size: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (..., draws) int32, (..., draws) of dtype
    """Tokens drawn from each row with replacement, and the logarithm of the share that each has of the draws.

    By inversion, in fp64: torch.multinomial's sums in fp32 lose tokens of less than 6e-8, which together may hold much
    of a large vocabulary's tail, and it takes at most 2^24 tokens.
    """
    logits = _check_dense(logits, temperature, vocab_size)
    width = logits.shape[-1]
    check_count("draws", draws, MOST_IDS)
    if generator is not None and generator.device.type != logits.device.type:
        raise ValueError(f"generator is on {generator.device}, logits on {logits.device}; make one on that device")
    rows = logits.shape[:-1].numel()
    tokens = torch.empty(rows, draws, dtype=torch.int32, device=logits.device)
    undefined = torch.empty(rows, 1, dtype=torch.bool, device=logits.device)
    done = 0
    for chunk in _chunks(logits, _rows_of(width, torch.float64)):
        sums = chunk.to(torch.float64, copy=True)
        sums.sub_(sums.amax(-1, keepdim=True)).div_(temperature).exp_().cumsum_(-1)
        total = sums[:, -1:]
        level = torch.rand(chunk.shape[0], draws, dtype=torch.float64, device=logits.device, generator=generator).mul_(
            total
        )
        # Rounding may have reached the total itself, above which no token is.
        level = torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))
        here = slice(done, done + chunk.shape[0])
        # The first token whose sum is above the level: never one of probability 0.
        tokens[here] = torch.searchsorted(sums, level, right=True).clamp_(max=width - 1)
        undefined[here] = ~total.isfinite()  # NaN or +inf among the logits, or no token at all
        done += chunk.shape[0]
    shape = (*logits.shape[:-1], draws)
    ids, shares = counted(tokens.view(shape), width, dtype)
    return ids, shares.masked_fill_(undefined.view(*shape[:-1], 1) & (ids >= 0), torch.nan)


@torch.no_grad()
def counted(
    samples: Tensor,  # (..., N)
    vocab_size: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (..., N) int32, (..., N) of dtype
    """Each row's distinct tokens in ascending order, and the logarithm of the share each has of the row's samples."""
    if not isinstance(samples, Tensor):
        raise TypeError(f"samples must be a Tensor of ids (..., N), got {type(samples).__name__}")
    if samples.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"samples must be integers, got {samples.dtype}")
    if samples.dim() < 1 or not 1 <= samples.shape[-1] <= MOST_IDS:
        raise ValueError(f"samples must be (..., N) with N in [1, {MOST_IDS}], got shape {tuple(samples.shape)}")
    _check_dtype(dtype)
    limit = LARGEST_VOCABULARY if vocab_size is None else check_count("vocab_size", vocab_size, LARGEST_VOCABULARY)
    if samples.device.type == "cpu" and samples.numel() and int(samples.max()) >= limit:
        raise ValueError(f"samples must be negative (none) or lie in [0, {limit}), got {int(samples.max())}")
    samples = samples.long()
    ordered = torch.where(samples < 0, LARGEST_VOCABULARY, samples).sort(-1).values  # what is none comes last
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    which = first.cumsum(-1) - 1  # of the row's distinct tokens
    drawn = ordered != LARGEST_VOCABULARY
    counts = torch.zeros_like(ordered).scatter_add_(-1, which, drawn.long())
    ids = torch.full_like(ordered, -1).scatter_(-1, which, torch.where(drawn, ordered, -1))
    shares = counts.double().log_() - drawn.sum(-1, keepdim=True).double().log_()
    return ids.int(), torch.where(counts > 0, shares, -torch.inf).to(dtype)
