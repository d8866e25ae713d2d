"""The log-probabilities that vLLM returns, as tensors: without vLLM, and without a step of Python per entry."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from numbers import Real
from operator import attrgetter, index, itemgetter
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from kdkernels._ids import first_occurrences
from kdkernels._ragged import padded
from kdkernels._sparse_sources import LARGEST_VOCABULARY, check_count, check_positive, check_tail
from kdkernels.teachers import MOST_IDS

# vLLM's FlatLogprobs: position i has the entries from start_indices[i] to end_indices[i] of the other two.
_FLAT = ("start_indices", "end_indices", "token_ids", "logprobs")
# A log-probability above this is no rounding error of 0.
_POSITIVE = 1e-3


class _Sequence(NamedTuple):
    name: str  # how messages call it
    ids: Tensor  # (E,) int64
    logprobs: Tensor  # (E,) float64
    counts: Tensor  # (L,) int64: how many of the entries each position has
    repeats: bool  # whether a position may name a token twice


def _tensor(numbers: array[Any], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)


def _is_flat(positions: object) -> bool:
    return all(hasattr(positions, name) for name in _FLAT)


def _is_sequence(positions: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(positions, (list, tuple))


def _flat(positions: Any, name: str) -> _Sequence:
    starts, ends = (torch.tensor(list(getattr(positions, field)), dtype=torch.int64) for field in _FLAT[:2])
    ids, logprobs = array("q", positions.token_ids), array("d", positions.logprobs)
    counts = ends - starts
    if starts.shape != ends.shape or len(ids) != len(logprobs) or bool(((starts < 0) | (counts < 0)).any()):
        raise ValueError(f"{name}: its {', '.join(_FLAT)} do not fit together")
    if bool((ends > len(ids)).any()):
        raise ValueError(f"{name}: end_indices go to {int(ends.max())}, but there are {len(ids)} token_ids")
    at = torch.arange(int(counts.sum())) + (starts - counts.cumsum(0) + counts).repeat_interleave(counts)
    return _Sequence(name, _tensor(ids, torch.int64)[at], _tensor(logprobs, torch.float64)[at], counts, repeats=True)


def _token_id(key: object) -> int:
    """A token's id from a dict's key: an int, or as JSON has it, also with the "token_id:" of some of its forms."""
    return int(key.removeprefix("token_id:")) if isinstance(key, str) else index(key)  # type: ignore[arg-type]


def _logprob(entry: Any) -> float:
    value = entry["logprob"] if isinstance(entry, Mapping) else getattr(entry, "logprob", entry)
    if not isinstance(value, Real):
        raise TypeError(f"a log-probability is {value!r}")
    return float(value)


def _reader(first: object) -> Callable[[Any], Any] | None:
    """What reads the log-probability of entries like the first of them; None where they are numbers."""
    if isinstance(first, Mapping):
        return itemgetter("logprob")
    return attrgetter("logprob") if hasattr(first, "logprob") else None


def _all_alike(rows: list[Mapping[Any, Any]]) -> tuple[array[int], array[float]]:
    """Every entry, read as the first one is; what is not like it raises one error or another."""
    some = next((row for row in rows if row), None)
    if some is None:
        return array("q"), array("d")
    key, entry = next(iter(some.items()))
    keys: Iterable[Any] = chain.from_iterable(rows)
    if isinstance(key, str):
        keys = map(_token_id if key.startswith("token_id:") else int, keys)
    entries: Iterable[Any] = chain.from_iterable(row.values() for row in rows)
    reader = _reader(entry)
    return array("q", keys), array("d", entries if reader is None else map(reader, entries))


def _one_by_one(rows: list[Mapping[Any, Any]], name: str) -> tuple[array[int], array[float]]:
    ids, logprobs = array("q"), array("d")
    for position, row in enumerate(rows):
        for key, entry in row.items():
            try:
                ids.append(_token_id(key))
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{name}[{position}]: {key!r} is no token id; ask the server for ids, not for text"
                ) from error
            try:
                logprobs.append(_logprob(entry))
            except (TypeError, KeyError) as error:
                raise TypeError(
                    f"{name}[{position}]: token {key} must come with an object that has .logprob, a dict that has "
                    f"'logprob', or a number, got {entry!r}"
                ) from error
    return ids, logprobs


def _dicts(positions: list[Any] | tuple[Any, ...], name: str) -> _Sequence:
    for position, row in enumerate(positions):
        if row is not None and not isinstance(row, Mapping):
            raise TypeError(f"{name}[{position}] must be None or a dict of token ids, got {type(row).__name__}")
    rows: list[Mapping[Any, Any]] = [{} if row is None else row for row in positions]
    try:
        ids, logprobs = _all_alike(rows)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        ids, logprobs = _one_by_one(rows, name)  # which can say where it is wrong, or takes entries of several kinds
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return _Sequence(name, _tensor(ids, torch.int64), _tensor(logprobs, torch.float64), counts, repeats=False)


def _check_entries(found: _Sequence, wrong: Tensor, what: str) -> None:
    if bool(wrong.any()):
        entry = int(wrong.nonzero()[0])
        position = int(torch.searchsorted(found.counts.cumsum(0), entry, right=True))
        token, value = int(found.ids[entry]), float(found.logprobs[entry])
        raise ValueError(f"{found.name}[{position}]: " + what.format(token=token, value=value))


def _sequence(positions: Any, name: str, tail: str) -> _Sequence:
    if not _is_sequence(positions) and not _is_flat(positions):
        hint = "; none were asked for: SamplingParams(prompt_logprobs=..., logprobs=...)" if positions is None else ""
        raise TypeError(
            f"{name} must be a list of None or dicts, as a RequestOutput's prompt_logprobs or its outputs' logprobs, "
            f"got {type(positions).__name__}{hint}"
        )
    found = _dicts(positions, name) if _is_sequence(positions) else _flat(positions, name)
    _check_entries(found, (found.ids < 0) | (found.ids >= LARGEST_VOCABULARY), "{token} is no token id")
    _check_entries(found, found.logprobs.isnan(), "the log-probability of token {token} is NaN")
    if tail in ("bucket", "drop"):
        _check_entries(
            found,
            found.logprobs > _POSITIVE,
            f"the log-probability of token {{token}} is {{value}}, and tail={tail!r} needs probabilities; are these "
            "logits (vLLM's logprobs_mode)?",
        )
    return found


def _most_likely(ids: Tensor, logprobs: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """Without repeated ids: the k most likely of each row, or where k is None, as many as the longest row has."""
    alive = first_occurrences(ids, LARGEST_VOCABULARY)
    width = max(1, int(alive.sum(-1).max()) if alive.numel() else 0) if k is None else k
    # An id of probability 0 goes before no id at all.
    order = torch.where(alive, logprobs.clamp_min(torch.finfo(logprobs.dtype).min), -torch.inf)
    at = order.topk(min(width, ids.shape[-1]), -1).indices
    ids, logprobs, alive = ids.gather(-1, at), logprobs.gather(-1, at), alive.gather(-1, at)
    missing = (0, width - at.shape[-1])
    return (
        torch.nn.functional.pad(torch.where(alive, ids, -1), missing, value=-1),
        torch.nn.functional.pad(torch.where(alive, logprobs, -torch.inf), missing, value=-torch.inf),
    )


def tensors(
    positions: Any, k: int | None, tail: str, device: torch.device | str | None, teacher_temperature: float
) -> tuple[Tensor, Tensor]:  # (L, K) or (B, L, K): int32, float32
    """See :meth:`kdkernels.TopKTeacher.from_vllm`."""
    check_tail(tail)
    check_positive("teacher_temperature", teacher_temperature)
    if k is not None:
        check_count("k", k, MOST_IDS)
    some = next((p for p in positions if p is not None), None) if _is_sequence(positions) else None
    batch = _is_sequence(some) or _is_flat(some)
    if batch:
        found = [_sequence(one, f"positions[{b}]", tail) for b, one in enumerate(positions)]
    else:
        found = [_sequence(positions, "positions", tail)]
    longest = max(one.counts.numel() for one in found)
    counts = torch.zeros(len(found), longest, dtype=torch.int64)
    for row, one in zip(counts, found, strict=True):
        row[: one.counts.numel()] = one.counts
    if k is None and counts.numel() and int(counts.max()) > MOST_IDS:
        raise ValueError(f"positions: one has {int(counts.max())} ids, and {MOST_IDS} are the most; give k")
    ids, logprobs = padded(
        torch.cat([one.ids for one in found]).int(), torch.cat([one.logprobs for one in found]).float(), counts
    )
    if k is not None or any(one.repeats for one in found):
        ids, logprobs = _most_likely(ids, logprobs, k)
    if not batch:
        ids, logprobs = ids[0], logprobs[0]
    return ids.to(device), logprobs.to(device)
