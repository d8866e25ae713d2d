"""A cache that is damaged, and arguments that do not fit: an error that names the file, or the argument."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_cache import SEQUENCES, V, entries, leftovers, write

import kdkernels as kd


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.safetensors"


def rewritten(path: Path, metadata: dict | None = None, **changes) -> Path:
    """The file with other tensors or metadata: None leaves one out."""
    with safe_open(path, framework="pt") as file:
        about = {**file.metadata(), **(metadata or {})}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no dict
    for name, change in changes.items():
        tensors[name] = change(tensors[name]) if change else None
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        path,
        {name: value for name, value in about.items() if value is not None},
    )
    return path


def put(index: int, value: int):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def resized(path: Path, size: int) -> Path:
    with path.open("r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size + size)
    return path


AT_OPENING = {
    "empty": (lambda p: resized(p, 0), "is no safetensors file, or not a whole one"),
    "length alone": (lambda p: resized(p, 8), "is no safetensors file, or not a whole one"),
    "half a header": (lambda p: resized(p, 100), "is no safetensors file, or not a whole one"),
    "half the data": (lambda p: resized(p, -100), "is no safetensors file, or not a whole one"),
    "a byte short": (lambda p: resized(p, -1), "is no safetensors file, or not a whole one"),
    "a byte too many": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "is no safetensors file, or not a whole one"),
    "text": (lambda p: p.write_text("not a tensor at all\n" * 9), "is no safetensors file, or not a whole one"),
    "weights": (lambda p: save_file({"w": torch.ones(2)}, p), "is a safetensors file, but no cache of sparse teachers"),
    "another format": (
        lambda p: rewritten(p, {"kdkernels.format": "dense"}), "is a safetensors file, but no cache of sparse teachers"
    ),
    "a later version": (
        lambda p: rewritten(p, {"kdkernels.version": "2"}), "is of version 2; this kdkernels reads version 1"
    ),
    "no vocabulary": (lambda p: rewritten(p, {"kdkernels.vocab_size": None}), "its metadata are damaged.*vocab_size"),
    "a vocabulary of 0": (lambda p: rewritten(p, {"kdkernels.vocab_size": "0"}), "its metadata are damaged: vocab_size"),
    "a temperature of text": (
        lambda p: rewritten(p, {"kdkernels.teacher_temperature": "warm"}), "its metadata are damaged.*warm"
    ),
    "a temperature of inf": (
        lambda p: rewritten(p, {"kdkernels.teacher_temperature": "inf"}), "its metadata are damaged: teacher_temperature"
    ),
    "no ids": (lambda p: rewritten(p, ids=None), "lacks the tensors ids$"),
    "no offsets": (lambda p: rewritten(p, sequences=None, counts=None), "lacks the tensors sequences, counts$"),
    "ids of 64 bits": (lambda p: rewritten(p, ids=lambda x: x.long()), r"ids must be torch.int32, got torch.int64"),
    "double": (
        lambda p: rewritten(p, logprobs=lambda x: x.double()), "logprobs must be bfloat16, float16 or float32.*float64"
    ),
    "integers": (lambda p: rewritten(p, logprobs=lambda x: x.short()), "logprobs must be bfloat16.*got torch.int16"),
    "offsets of 32 bits": (lambda p: rewritten(p, entries=lambda x: x.int()), "entries must be torch.int64.*int32"),
    "two dimensions": (lambda p: rewritten(p, ids=lambda x: x[None]), r"ids must have one dimension, got shape \(1,"),
    "an id short": (lambda p: rewritten(p, ids=lambda x: x[1:]), r"it has \d+ ids, but \d+ logprobs"),
    "a sequence short": (lambda p: rewritten(p, entries=lambda x: x[1:]), "sequences and entries have different lengths"),
    "no sequence": (
        lambda p: rewritten(p, entries=lambda x: x[:0], sequences=lambda x: x[:0]), "its sequences must rise from 0 to 24"
    ),
    "rows cut off": (lambda p: rewritten(p, counts=lambda x: x[:-1]), "its sequences must rise from 0 to 23"),
    "begins late": (lambda p: rewritten(p, sequences=put(0, 1)), "its sequences must rise from 0 to 24"),
    "falls": (lambda p: rewritten(p, sequences=put(1, 9)), "its sequences must rise from 0 to 24"),
    "below 0": (lambda p: rewritten(p, entries=put(1, -1)), r"its entries must rise from 0 to \d+, the end"),
    "ends late": (lambda p: rewritten(p, entries=put(-1, 10**9)), r"its entries must rise from 0 to \d+, the end"),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_OPENING)
def test_damage_seen_when_it_is_opened(path, name):
    damage, match = AT_OPENING[name]
    damage(write(path, *SEQUENCES))
    with pytest.raises(ValueError, match=rf"{path}.*{match}"):
        kd.TopKCache(path)


IN_A_SEQUENCE = {
    "an id too large": ({"ids": put(0, V)}, f"sequence 0 has the id {V}, which is outside its vocabulary of {V}"),
    "an id below 0": ({"ids": put(0, -1)}, "sequence 0 has the id -1, which is outside"),
    "a row longer": ({"counts": put(0, 9)}, r"the rows of sequence 0 have \d+ ids, its entries \d+"),
    "a row below 0": ({"counts": put(0, -1)}, "rows of sequence 0 have other than 0 to 4096 ids"),
    "a row above the most": ({"counts": put(0, 4097)}, "rows of sequence 0 have other than 0 to 4096 ids"),
    "a sequence moved": ({"sequences": put(1, 6)}, r"the rows of sequence 0 have \d+ ids, its entries \d+"),
}


@pytest.mark.parametrize("name", IN_A_SEQUENCE)
def test_damage_of_one_sequence(path, name):
    changes, match = IN_A_SEQUENCE[name]
    cache = kd.TopKCache(rewritten(write(path, *SEQUENCES), **changes))
    for read in (lambda: cache[0], lambda: cache.batch([3, 0])):
        with pytest.raises(ValueError, match=rf"{path}: {match}"):
            read()
    assert entries(cache[3]) == entries(SEQUENCES[3], torch.bfloat16)


def test_no_file(path):
    with pytest.raises(FileNotFoundError, match=str(path)):
        kd.TopKCache(path)


# What does not fit.

T = SEQUENCES[0]
BATCH = kd.TopKTeacher(T.ids.expand(2, -1, -1), T.logprobs.expand(2, -1, -1))
TO_WRITE = {
    "no teacher": ((T.logprobs,), TypeError, "teacher must be a TopKTeacher, got Tensor"),
    "ids a list": ((T._replace(ids=[1]),), TypeError, "teacher.ids must be an int32 or int64 Tensor, got list"),
    "ids float": ((T._replace(ids=T.logprobs),), TypeError, "teacher.ids must be int32 or int64, got torch.float32"),
    "one row": ((T._replace(ids=T.ids[0]),), ValueError, r"teacher.ids must be \(L, K\), or \(B, L, K\).*got \(5,\)"),
    "four dimensions": ((T._replace(ids=T.ids[None, None]),), ValueError, r"teacher.ids must be \(L, K\)"),
    "shapes": ((T._replace(logprobs=T.logprobs[:, 1:]),), ValueError, "teacher.logprobs must have the shape of"),
    "integers": ((T._replace(logprobs=T.ids),), TypeError, "teacher.logprobs must be float32.*int32"),
    "temperature": ((T._replace(teacher_temperature=2.0),), ValueError, "teacher_temperature must be the file's, 1.0, got 2"),
    "lengths of one": ((T, [7]), ValueError, r"lengths are for a batch"),
    "lengths few": ((BATCH, [7]), ValueError, r"lengths must be 2 numbers in \[0, 7\].*got \[7\]"),
    "lengths large": ((BATCH, [7, 8]), ValueError, r"lengths must be 2 numbers in \[0, 7\]"),
    "lengths below 0": ((BATCH, torch.tensor([7, -1])), ValueError, r"lengths must be 2 numbers.*got \[7, -1\]"),
    "lengths float": ((BATCH, [7.0, 1.0]), TypeError, "lengths must be integers.*float"),
    "id": (
        (kd.TopKTeacher(torch.tensor([[1], [V]]), torch.zeros(2, 1)),),
        ValueError, rf"teacher.ids must be negative.*\[0, {V}\), got {V} \(row 1\)",
    ),
    "id in a batch": (
        (kd.TopKTeacher(torch.tensor([[[1]], [[V]]]), torch.zeros(2, 1, 1)),),
        ValueError, rf"got {V} \(row 0 of sequence 1\)",
    ),
    "NaN": (
        (kd.TopKTeacher(torch.tensor([[1]]), torch.tensor([[torch.nan]])),),
        ValueError, r"teacher.logprobs must not be NaN, nor inf in torch.bfloat16 \(row 0\)",
    ),
    "inf": ((kd.TopKTeacher(torch.tensor([[1]]), torch.tensor([[3.4e38]])),), ValueError, "must not be NaN, nor inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", TO_WRITE)
def test_bad_teachers_are_not_written(path, name):
    arguments, error, match = TO_WRITE[name]
    with kd.TopKCacheWriter(path, vocab_size=V) as writer:
        writer.write(T)
        with pytest.raises(error, match=match):
            writer.write(*arguments)
        writer.write(SEQUENCES[1])
    assert [entries(one) for one in kd.TopKCache(path)] == [entries(one, torch.bfloat16) for one in SEQUENCES[:2]]


TO_OPEN = {
    "vocab_size": ({"vocab_size": 0}, ValueError, "vocab_size must lie in"),
    "vocab_size float": ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int, got float"),
    "dtype": ({"dtype": torch.float64}, TypeError, "dtype must be bfloat16, float16 or float32, got torch.float64"),
    "temperature": ({"teacher_temperature": 0}, ValueError, "teacher_temperature must be positive, got 0"),
    "metadata": ({"metadata": {"layers": 3}}, TypeError, "metadata must be strings by name, got 'layers': 3"),
    "metadata's names": (
        {"metadata": {"kdkernels.version": "3"}}, ValueError, "names that begin with 'kdkernels.' are taken"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TO_OPEN)
def test_bad_arguments_of_a_writer(path, name):
    options, error, match = TO_OPEN[name]
    with pytest.raises(error, match=match):
        kd.TopKCacheWriter(path, **{"vocab_size": V, **options})
    assert leftovers(path.parent) == []


def test_bad_places(path):
    with pytest.raises(FileNotFoundError, match="path: there is no folder"):
        kd.TopKCacheWriter(path / "below" / "it", vocab_size=V)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        kd.TopKCacheWriter(path.parent, vocab_size=V)


def test_bad_arguments_of_a_batch(path):
    cache = kd.TopKCache(write(path, *SEQUENCES))
    for options, error, match in [
        ({"indices": [5]}, IndexError, "has 5 sequences, and none of index 5"),
        ({"indices": [1.0]}, TypeError, "indices must be integers"),
        ({"indices": [1], "length": 0}, ValueError, r"length must lie in \[1, .*got 0"),
        ({"indices": [1], "tail": "none"}, ValueError, "tail must be one of bucket"),
    ]:
        with pytest.raises(error, match=match):
            cache.batch(**options)
