"""Sparse teachers on disk: one safetensors file, written sequence by sequence and read through a memory map.

The file's tensors, of S sequences that have T tokens (rows) and E ids in all:

===========  ========================  ==================================================
name         shape and dtype           what
===========  ========================  ==================================================
sequences    (S + 1,) int64            the row at which each sequence begins; last: T
entries      (S + 1,) int64            the id at which each sequence begins; last: E
ids          (E,) int32                token ids, row after row
logprobs     (E,) float of the cache   their log-probabilities
counts       (T,) int16                how many ids each row has
===========  ========================  ==================================================
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import index as as_int
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from kdkernels._arguments import Rows, check_sparse
from kdkernels._ids import first_occurrences, out_of_range
from kdkernels._ragged import padded
from kdkernels._sparse_sources import LARGEST_VOCABULARY, check_count, check_positive, check_tail
from kdkernels.teachers import MOST_IDS, TopKTeacher

_FORMAT, _VERSION = "topk-cache", "1"
# Of the metadata, what is ours: the rest are the user's.
_OURS = "kdkernels."
# What the file's header calls a dtype.
_DTYPES = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_LOGPROB_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _layout(logprobs: torch.dtype) -> dict[str, torch.dtype]:
    """The tensors in the order of the file: none is wider than one before it, so that each is aligned."""
    return {
        "sequences": torch.int64,
        "entries": torch.int64,
        "ids": torch.int32,
        "logprobs": logprobs,
        "counts": torch.int16,
    }


def _ints(name: str, values: Iterable[int] | Tensor) -> list[int]:
    try:
        return [as_int(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    except TypeError as error:
        raise TypeError(f"{name} must be integers: {error}") from error


class _Spool:
    """A tensor that grows at its end, in a file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.count = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115  # closed by whoever made it

    def append(self, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        if tensor.numel():
            # Its memory as it is: torch gives a buffer of bfloat16 to nobody.
            self._file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
        self.count += tensor.numel()

    def close(self) -> None:
        self._file.close()

    def move_to(self, file: BinaryIO) -> None:
        self.close()
        with open(self.path, "rb") as mine:
            shutil.copyfileobj(mine, file, 2**20)
        os.remove(self.path)


class TopKCacheWriter:
    """Writes sparse teachers to one file, a sequence or a batch at a time; used in a ``with`` statement.

    Rows are stored without padding and without what has no probability. Until it is closed everything goes to temporary
    files in a folder beside ``path``: memory does not grow with the number of sequences. Closing joins them and renames
    the result, so that under ``path`` there is a whole file or, as after an exception within the ``with``, none; one
    that was there before stays until then. (A process that is killed leaves the folder, ``.<name>-*``.) While they are
    joined the disk holds the largest tensor twice.

    A log-probability is rounded to ``dtype``: by at most |log p|·2^-8 in bfloat16, |log p|·2^-11 in float16. By that
    share p itself is off (p = 1e-3: at most 1.6 % and 0.2 %), and a row's mass by at most 2^-8 or 2^-11 of Σ p·|log p|.
    Nothing is normalised again: that is left to who reads it. float16 takes the bytes of bfloat16 and is 8 times as
    exact; its range, to -65504, is more than log-probabilities need. Shares of draws, whose gradient is meant to be
    unbiased, deserve float32.

    Args:
        path: of the file.
        vocab_size: V; ids must be less.
        dtype: of the log-probabilities: bfloat16, float16 or float32.
        teacher_temperature: of the softmax that gave the log-probabilities; the same for all of the file.
        metadata: strings by name, kept with the rest: which teacher, which tokenizer. Names must not begin with
            "kdkernels.".

    Raises:
        TypeError, ValueError: with the name of the argument that does not fit.
        FileNotFoundError: there is no folder for ``path``.

    Example:
        >>> with TopKCacheWriter("teacher.safetensors", vocab_size=32000) as cache:  # doctest: +SKIP
        ...     for logits in teacher_logits:  # (L, V)
        ...         cache.write(TopKTeacher.from_logits(logits, k=64))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        dtype: torch.dtype = torch.bfloat16,
        teacher_temperature: float = 1.0,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.vocab_size = check_count("vocab_size", vocab_size, LARGEST_VOCABULARY)
        if dtype not in _LOGPROB_DTYPES:
            raise TypeError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
        self.dtype = dtype
        check_positive("teacher_temperature", teacher_temperature)
        self.teacher_temperature = float(teacher_temperature)
        self.metadata = dict(metadata or {})
        for name, value in self.metadata.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"metadata must be strings by name, got {name!r}: {value!r}")
            if name.startswith(_OURS):
                raise ValueError(f"metadata: names that begin with {_OURS!r} are taken, got {name!r}")
        folder, name = os.path.split(self.path)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"path: there is no folder {folder}")
        if os.path.isdir(self.path):
            raise IsADirectoryError(f"path: {self.path} is a folder")
        # On the same file system, so that the file can be renamed; goes with the process if nobody closes it.
        self._folder = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder)
        self._spools = {name: _Spool(os.path.join(self._folder.name, name)) for name in _layout(dtype)}
        self._open = True
        for name in ("sequences", "entries"):
            self._spools[name].append(torch.zeros(1, dtype=torch.int64))

    def __enter__(self) -> TopKCacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def write(self, teacher: TopKTeacher, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Adds a sequence (L, K), or the sequences of a batch (B, L, K).

        Left out: ids that are negative or come again in their row, and log-probabilities of -inf. ``tail`` is not kept:
        it is chosen when the cache is read.

        Args:
            teacher: with ids and log-probabilities (L, K) or (B, L, K), on any device.
            lengths: how many rows each sequence of a batch has; None: all L.

        Raises:
            TypeError, ValueError: with the name of the argument that does not fit; nothing of the call is written.
        """
        if not self._open:
            raise ValueError(f"the writer of {self.path} is closed")
        ids, logprobs, sizes = self._checked(teacher, lengths)
        there = torch.arange(ids.shape[1]) < sizes[:, None]  # (B, L)
        keep = first_occurrences(ids, self.vocab_size) & there[..., None]  # (B, L, K)
        self._check_values(ids, logprobs, keep, there)
        keep &= logprobs > -torch.inf
        counts = keep.sum(-1)  # (B, L)
        rows = self._spools["counts"].count + sizes.cumsum(0)
        entries = self._spools["ids"].count + counts.sum(-1).cumsum(0)
        try:
            self._spools["ids"].append(ids[keep].int())
            self._spools["logprobs"].append(logprobs[keep])
            self._spools["counts"].append(counts[there].short())
            self._spools["sequences"].append(rows)
            self._spools["entries"].append(entries)
        except BaseException:  # half of it may be written
            self.discard()
            raise

    def _checked(self, teacher: TopKTeacher, lengths: Sequence[int] | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, K) ids, (B, L, K) log-probabilities as they will be stored, (B,) lengths, on the CPU."""
        if not isinstance(teacher, TopKTeacher):
            raise TypeError(f"teacher must be a TopKTeacher, got {type(teacher).__name__}")
        ids = teacher.ids
        if isinstance(ids, Tensor) and ids.dim() not in (2, 3):
            raise ValueError(f"teacher.ids must be (L, K), or (B, L, K) of a batch, got {tuple(ids.shape)}")
        if isinstance(ids, Tensor):
            shape, device = ids.shape[:-1], ids.device
        else:
            shape, device = torch.Size(), torch.device("cpu")
        teacher = check_sparse(teacher, Rows(shape, device, torch.float32, (self.vocab_size, self.vocab_size)))
        if teacher.teacher_temperature != self.teacher_temperature:
            raise ValueError(
                f"teacher.teacher_temperature must be the file's, {self.teacher_temperature}, "
                f"got {teacher.teacher_temperature}"
            )
        ids, logprobs = teacher.ids.cpu(), teacher.logprobs.cpu().to(self.dtype)
        if ids.dim() == 2:
            if lengths is not None:
                raise ValueError("lengths are for a batch (B, L, K), and teacher.ids are those of one sequence (L, K)")
            ids, logprobs = ids[None], logprobs[None]
        batch, longest = ids.shape[:2]
        if lengths is None:
            return ids, logprobs, torch.full((batch,), longest)
        sizes = _ints("lengths", lengths)
        if len(sizes) != batch or not all(0 <= size <= longest for size in sizes):
            raise ValueError(f"lengths must be {batch} numbers in [0, {longest}], the batch's, got {sizes}")
        return ids, logprobs, torch.tensor(sizes, dtype=torch.int64)

    def _check_values(self, ids: Tensor, logprobs: Tensor, keep: Tensor, there: Tensor) -> None:
        def where(wrong: Tensor) -> str:
            sequence, row = wrong.nonzero()[0, :2].tolist()
            return f" (row {row}" + (f" of sequence {sequence})" if len(ids) > 1 else ")")

        outside = out_of_range(ids, self.vocab_size) & there
        if bool(outside.any()):
            raise ValueError(
                f"teacher.ids must be negative (no token) or lie in [0, {self.vocab_size}), "
                f"got {int(ids[outside].max())}{where(outside)}"
            )
        undefined = keep & (logprobs.isnan() | (logprobs == torch.inf))
        if bool(undefined.any()):
            raise ValueError(f"teacher.logprobs must not be NaN, nor inf in {self.dtype}{where(undefined)}")

    def close(self) -> None:
        """Joins what was written into the file; the second time, or after :meth:`discard`, nothing."""
        if not self._open:
            return
        whole = os.path.join(self._folder.name, "whole")
        try:
            with open(whole, "wb") as file:
                file.write(self._header())
                for spool in self._spools.values():
                    spool.move_to(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(whole, self.path)
        finally:
            self.discard()

    def _header(self) -> bytes:
        ours = {
            "format": _FORMAT,
            "version": _VERSION,
            "vocab_size": str(self.vocab_size),
            "teacher_temperature": repr(self.teacher_temperature),
        }
        header: dict[str, object] = {
            "__metadata__": {**{_OURS + name: value for name, value in ours.items()}, **self.metadata}
        }
        end = 0
        for name, dtype in _layout(self.dtype).items():
            count = self._spools[name].count
            begin, end = end, end + count * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": [count], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def discard(self) -> None:
        """Drops what was written; ``path`` stays as it was."""
        self._open = False
        for spool in self._spools.values():
            with suppress(OSError):  # what it still held may not fit on the disk
                spool.close()
        self._folder.cleanup()


class _Opened(NamedTuple):
    sequences: Tensor
    entries: Tensor
    ids: Tensor
    logprobs: Tensor
    counts: Tensor


class TopKCache:
    """Reads the file of a :class:`TopKCacheWriter`; needs the package safetensors.

    The file is mapped into memory: opening it costs next to nothing, and what is read is what is asked for. Several
    threads may read from one object; a pickled one opens the file again (the workers of a DataLoader). May be used in
    a ``with`` statement, at whose end it is closed.

    Args:
        path: of the file.

    Attributes:
        vocab_size: of the teacher (int).
        teacher_temperature: of the softmax that gave the log-probabilities (float).
        metadata: the strings given to the writer, by name.
        dtype: of the log-probabilities.
        tokens: the number of rows in all sequences.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: the file is damaged or no cache; with its name. What is only seen in the sequence that is damaged is
            raised when that is read.

    Example:
        >>> cache = TopKCache("teacher.safetensors")  # doctest: +SKIP
        >>> teacher = cache.batch([3, 1, 4], length=1024, device="cuda")  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        metadata, file = self._open()
        self._file: _Opened | None = file
        self.metadata = {name: value for name, value in metadata.items() if not name.startswith(_OURS)}
        try:
            self.vocab_size = check_count("vocab_size", int(metadata[_OURS + "vocab_size"]), LARGEST_VOCABULARY)
            self.teacher_temperature = float(metadata[_OURS + "teacher_temperature"])
            check_positive("teacher_temperature", self.teacher_temperature)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.path}: its metadata are damaged: {error}") from error
        self._size = file.sequences.numel() - 1
        self.tokens = file.counts.numel()
        self.dtype = file.logprobs.dtype

    def _open(self) -> tuple[dict[str, str], _Opened]:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError("TopKCache needs the package safetensors: pip install safetensors") from error
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                names = set(file.keys())
                # Maps of the file: nothing is read yet.
                found = {name: file.get_tensor(name) for name in _Opened._fields if name in names}
        except SafetensorError as error:
            raise ValueError(f"{self.path} is no safetensors file, or not a whole one: {error}") from error
        kind, version = metadata.get(_OURS + "format"), metadata.get(_OURS + "version")
        if kind != _FORMAT:
            raise ValueError(f"{self.path} is a safetensors file, but no cache of sparse teachers")
        if version != _VERSION:
            raise ValueError(f"{self.path} is of version {version}; this kdkernels reads version {_VERSION}")
        missing = [name for name in _Opened._fields if name not in found]
        if missing:
            raise ValueError(f"{self.path} lacks the tensors {', '.join(missing)}")
        opened = _Opened(**found)
        self._check_layout(opened)
        return metadata, opened

    def _check_layout(self, file: _Opened) -> None:
        for name, dtype in _layout(file.logprobs.dtype).items():
            tensor: Tensor = getattr(file, name)
            if tensor.dtype != dtype or (name == "logprobs" and dtype not in _LOGPROB_DTYPES):
                expected = "bfloat16, float16 or float32" if name == "logprobs" else dtype
                raise ValueError(f"{self.path}: {name} must be {expected}, got {tensor.dtype}")
            if tensor.dim() != 1:
                raise ValueError(f"{self.path}: {name} must have one dimension, got shape {tuple(tensor.shape)}")
        if file.ids.shape != file.logprobs.shape:
            raise ValueError(f"{self.path}: it has {len(file.ids)} ids, but {len(file.logprobs)} logprobs")
        if file.sequences.shape != file.entries.shape:
            raise ValueError(f"{self.path}: its sequences and entries have different lengths")
        for name, offsets, end in (
            ("sequences", file.sequences, len(file.counts)),
            ("entries", file.entries, len(file.ids)),
        ):
            if not len(offsets) or offsets[0] != 0 or offsets[-1] != end or bool((offsets.diff() < 0).any()):
                raise ValueError(f"{self.path}: its {name} must rise from 0 to {end}, the end of what they divide")

    def __len__(self) -> int:
        """The number of sequences."""
        return self._size

    def __getitem__(self, index: int) -> TopKTeacher:
        """A sequence: ids (L, K) int32 and log-probabilities (L, K) of the file's dtype, K that of its longest row.

        Its ``tail`` is "bucket"; ``teacher._replace(tail=...)`` changes that. Shorter rows end in -1.

        Raises:
            IndexError: there is no such sequence.
            ValueError: it is damaged, or the cache closed.
        """
        ids, logprobs, counts = self._sequence(as_int(index))
        return TopKTeacher(*padded(ids, logprobs, counts), teacher_temperature=self.teacher_temperature)

    def __iter__(self) -> Iterator[TopKTeacher]:
        return (self[index] for index in range(len(self)))

    def batch(
        self,
        indices: Iterable[int] | Tensor,
        *,
        length: int | None = None,
        tail: str = "bucket",
        device: torch.device | str | None = None,
    ) -> TopKTeacher:
        """Several sequences, padded to one length.

        Args:
            indices: B numbers of sequences.
            length: L: longer sequences are cut there, shorter ones padded; None: that of the longest.
            tail: of the teacher; see :class:`TopKTeacher`.
            device: where the tensors go; None: the CPU.

        Returns:
            A teacher with ids (B, L, K) int32 and log-probabilities (B, L, K) of the file's dtype, K that of the
            longest row; -1 where a row or a sequence is shorter.

        Raises:
            IndexError: there is no such sequence.
            TypeError, ValueError: an argument does not fit, a sequence is damaged, or the cache closed.
        """
        check_tail(tail)
        if length is not None:
            check_count("length", length, LARGEST_VOCABULARY)
        found = [self._sequence(index, length) for index in _ints("indices", indices)]
        if length is None:
            length = max((len(counts) for _, _, counts in found), default=0)
        rows = torch.zeros(len(found), length, dtype=torch.int64)
        for row, (_, _, counts) in zip(rows, found, strict=True):
            row[: len(counts)] = counts
        file = self._opened()
        ids = torch.cat([ids for ids, _, _ in found]) if found else file.ids[:0]
        logprobs = torch.cat([logprobs for _, logprobs, _ in found]) if found else file.logprobs[:0]
        ids, logprobs = padded(ids, logprobs, rows)
        return TopKTeacher(ids.to(device), logprobs.to(device), tail, self.teacher_temperature)

    def _opened(self) -> _Opened:
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        return self._file

    def _sequence(self, index: int, length: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The ids and log-probabilities of its rows, one after the other, and how many each of the rows has."""
        file = self._opened()
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} sequences, and none of index {index}")
        index %= len(self)
        row, end = file.sequences[index : index + 2].tolist()
        entry, last = file.entries[index : index + 2].tolist()
        counts = file.counts[row:end].long()
        if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) <= MOST_IDS:
            raise ValueError(f"{self.path}: rows of sequence {index} have other than 0 to {MOST_IDS} ids")
        if int(counts.sum()) != last - entry:
            raise ValueError(
                f"{self.path}: the rows of sequence {index} have {int(counts.sum())} ids, its entries {last - entry}"
            )
        if length is not None and length < len(counts):
            counts = counts[:length]
            last = entry + int(counts.sum())
        ids = file.ids[entry:last]
        if len(ids):
            least, largest = (int(x) for x in ids.aminmax())
            if least < 0 or largest >= self.vocab_size:
                wrong = least if least < 0 else largest
                raise ValueError(
                    f"{self.path}: sequence {index} has the id {wrong}, which is outside its vocabulary of "
                    f"{self.vocab_size}"
                )
        return ids, file.logprobs[entry:last], counts

    def close(self) -> None:
        """Lets go of the file; what was read stays."""
        self._file = None

    def __enter__(self) -> TopKCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[TopKCache], tuple[str]]:
        return type(self), (self.path,)
