"""Sparse teachers on disk: what is written is what is read, and what is damaged says so."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import kdkernels as kd
from kdkernels import cache as cache_module

V = 500
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Half the spacing of numbers just above 1.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


def ragged(length: int, k: int, seed: int = 0) -> kd.TopKTeacher:
    """A sequence whose rows have between none and k ids, with padding at any place and log-probabilities of -inf."""
    generator = torch.Generator().manual_seed(seed)
    teacher = kd.TopKTeacher.from_logits(4 * torch.randn(length, V, generator=generator), k)
    share = torch.rand(length, 1, generator=generator)
    gone = torch.rand(length, k, generator=generator) < share
    never = torch.rand(length, k, generator=generator) < 0.1
    return kd.TopKTeacher(teacher.ids.masked_fill(gone, -1), teacher.logprobs.masked_fill(never, -torch.inf))


def entries(teacher: kd.TopKTeacher, dtype: torch.dtype | None = None) -> list[list[tuple[int, float]]]:
    """Of each row, in order, what has a token and a probability."""
    logprobs = teacher.logprobs if dtype is None else teacher.logprobs.to(dtype)
    return [
        [(token, x) for token, x in zip(ids, row, strict=True) if token >= 0 and x > -torch.inf]
        for ids, row in zip(teacher.ids.flatten(0, -2).tolist(), logprobs.float().flatten(0, -2).tolist(), strict=True)
    ]


def write(path: Path, *teachers: kd.TopKTeacher, **options) -> Path:
    with kd.TopKCacheWriter(path, **{"vocab_size": V, **options}) as writer:
        for teacher in teachers:
            writer.write(teacher)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.safetensors"


SEQUENCES = [ragged(7, 5, seed=1), ragged(1, 9, seed=2), ragged(0, 3), ragged(12, 1, seed=3), ragged(4, 6, seed=4)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(path, dtype):
    about = {"teacher": "a name", "tokenizer": "0123abc", "": "ünïcode\n"}
    write(path, *SEQUENCES, dtype=dtype, teacher_temperature=1.0, metadata=about)
    with kd.TopKCache(path) as cache:
        assert len(cache) == len(SEQUENCES)
        assert cache.tokens == 24
        assert (cache.vocab_size, cache.teacher_temperature) == (V, 1.0)
        assert cache.metadata == about
        assert cache.dtype == dtype
        for found, given in zip(cache, SEQUENCES, strict=True):
            assert found.ids.dtype == torch.int32
            assert found.logprobs.dtype == dtype
            assert found.tail == "bucket"
            assert entries(found) == entries(given, dtype)
            longest = max((len(row) for row in entries(given)), default=0)
            assert found.ids.shape == found.logprobs.shape == (len(given.ids), max(1, longest))
            assert (found.logprobs[found.ids < 0] == -torch.inf).all()
        assert entries(cache[-1]) == entries(cache[4])
        with pytest.raises(IndexError, match=r"has 5 sequences, and none of index 5"):
            cache[5]
        with pytest.raises(IndexError, match="none of index -6"):
            cache[-6]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_safetensors_reader_opens_it(path, dtype):
    write(path, *SEQUENCES, dtype=dtype, metadata={"teacher": "a name"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["teacher"] == "a name"
        assert file.metadata()["kdkernels.vocab_size"] == "500"
    found = load_file(path)
    assert {name: tensor.dtype for name, tensor in found.items()} == cache_module._layout(dtype)
    assert found["sequences"].tolist() == [0, 7, 8, 8, 20, 24]
    flat = [entry for given in SEQUENCES for row in entries(given, dtype) for entry in row]
    assert list(zip(found["ids"].tolist(), found["logprobs"].float().tolist(), strict=True)) == flat
    assert found["counts"].tolist() == [len(row) for given in SEQUENCES for row in entries(given)]
    header = int.from_bytes(path.read_bytes()[:8], "little")
    parts = json.loads(path.read_bytes()[8 : 8 + header])
    assert header % 8 == 0
    assert all(parts[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in found.items())


def test_without_sequences(path):
    cache = kd.TopKCache(write(path))
    assert (len(cache), cache.tokens, list(cache)) == (0, 0, [])
    assert cache.batch([]).ids.shape == (0, 0, 1)
    with pytest.raises(IndexError, match="has 0 sequences"):
        cache[0]


def test_a_batch_is_written_as_its_sequences(path, tmp_path):
    lengths = [3, 6, 0, 5]
    parts = [ragged(6, 4, seed=seed) for seed in range(4)]
    batch = kd.TopKTeacher(torch.stack([p.ids for p in parts]), torch.stack([p.logprobs for p in parts]))
    cut = [kd.TopKTeacher(p.ids[:n], p.logprobs[:n]) for p, n in zip(parts, lengths, strict=True)]
    one_by_one = write(tmp_path / "one", *cut).read_bytes()
    for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        with kd.TopKCacheWriter(path, vocab_size=V) as writer:
            writer.write(batch, given)
        assert path.read_bytes() == one_by_one
    assert write(path, batch).read_bytes() == write(tmp_path / "one", *parts).read_bytes()


def test_repeated_ids_count_once(path):
    teacher = kd.TopKTeacher(torch.tensor([[3, 4, 3, 5]]), torch.tensor([[-1.0, -2.0, -0.5, -3.0]]))
    assert entries(kd.TopKCache(write(path, teacher))[0]) == [[(3, -1.0), (4, -2.0), (5, -3.0)]]


def test_what_is_padding_may_be_anything(path):
    """NaN where there is no token, ids beyond a sequence's length."""
    ids, logprobs = torch.tensor([[[1, -1], [2, V]]]), torch.tensor([[[-1.0, torch.nan], [torch.nan, 0.0]]])
    with kd.TopKCacheWriter(path, vocab_size=V) as writer:
        writer.write(kd.TopKTeacher(ids, logprobs), lengths=[1])
    assert entries(kd.TopKCache(path)[0]) == [[(1, -1.0)]]


def test_ids_of_64_bits_and_log_probabilities_of_any_dtype(path):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        teacher = SEQUENCES[0]._replace(ids=SEQUENCES[0].ids.long(), logprobs=SEQUENCES[0].logprobs.to(dtype))
        found = kd.TopKCache(write(path, teacher, dtype=torch.float32))[0]
        assert entries(found) == entries(teacher)


def test_log_probabilities_out_of_range_have_no_probability(path):
    teacher = kd.TopKTeacher(torch.tensor([[1, 2]]), torch.tensor([[-1.0, -1e6]]))
    assert entries(kd.TopKCache(write(path, teacher, dtype=torch.float16))[0]) == [[(1, -1.0)]]
    assert len(entries(kd.TopKCache(write(path, teacher))[0])[0]) == 2


def test_batches(path):
    cache = kd.TopKCache(write(path, *SEQUENCES, dtype=torch.float32, teacher_temperature=1.0))
    for indices in ([4, 0, 2, 0, -1], (3,), torch.tensor([1, 2]), iter([2])):
        listed = list(range(2, 3)) if not isinstance(indices, (list, tuple, torch.Tensor)) else list(map(int, indices))
        batch = cache.batch(indices, tail="drop")
        assert (batch.tail, batch.teacher_temperature) == ("drop", 1.0)
        assert batch.ids.shape == batch.logprobs.shape
        assert batch.ids.shape[:2] == (len(listed), max(len(SEQUENCES[i].ids) for i in listed))
        for b, i in enumerate(listed):
            rows = entries(kd.TopKTeacher(batch.ids[b], batch.logprobs[b]))
            expected = entries(SEQUENCES[i])
            assert rows == expected + [[]] * (len(rows) - len(expected))
        longest = max((len(row) for i in listed for row in entries(SEQUENCES[i])), default=0)
        assert batch.ids.shape[-1] == max(1, longest)


@pytest.mark.parametrize("length", [1, 5, 7, 40])
def test_batches_of_a_given_length(path, length):
    cache = kd.TopKCache(write(path, *SEQUENCES))
    batch = cache.batch([0, 3, 2], length=length)
    assert batch.ids.shape[:2] == (3, length)
    for b, i in enumerate([0, 3, 2]):
        expected = entries(SEQUENCES[i], torch.bfloat16)[:length]
        found = entries(kd.TopKTeacher(batch.ids[b], batch.logprobs[b]))
        assert found == expected + [[]] * (length - len(expected))
    assert batch.ids.shape[-1] == max(1, *(len(row) for i in (0, 3) for row in entries(SEQUENCES[i])[:length]))


def test_what_is_read_is_a_copy(path):
    cache = kd.TopKCache(write(path, *SEQUENCES))
    before = path.read_bytes()
    for read in (lambda: cache[0], lambda: cache.batch([0])):
        read().ids.fill_(7)
        read().logprobs.fill_(0)
        assert entries(cache[0]) == entries(SEQUENCES[0], torch.bfloat16)
    assert path.read_bytes() == before


def test_the_loss_of_what_was_read(path):
    """As of the teacher that was written, up to the padding."""
    student = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(0))
    teacher = kd.TopKTeacher.from_logits(student + 1, 20, temperature=2.0)
    with kd.TopKCacheWriter(path, vocab_size=V, dtype=torch.float32, teacher_temperature=2.0) as writer:
        writer.write(teacher, lengths=[6, 4])
    read = kd.TopKCache(path).batch([0, 1])
    loss = kd.reference.distillation_loss(student, read, temperature=2.0, reduction="none")
    expected = kd.reference.distillation_loss(student, teacher, temperature=2.0, reduction="none")
    expected[1, 4:] = 0
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_as_documented(path, dtype):
    """Of log-probabilities, and of the mass of a row."""
    logits = 3 * torch.randn(200, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = kd.TopKTeacher.from_logits(logits, 100, dtype=torch.float64)
    read = kd.TopKCache(write(path, teacher, dtype=dtype))[0]
    exact, found = teacher.logprobs, read.logprobs.double()
    share = float(((found - exact) / exact).abs().max())
    assert ROUNDING[dtype] / 2 < share <= ROUNDING[dtype]  # the bound is no looser than it has to be
    off = (found.exp().sum(-1) - exact.exp().sum(-1)).abs()
    bound = (exact.exp() * exact.abs()).sum(-1) * ROUNDING[dtype]
    assert (off <= 1.01 * bound).all()  # e^x - 1 is x only nearly
    assert float(off.max()) > ROUNDING[dtype] / 100


# Writing.


def leftovers(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_an_exception_leaves_no_file(path):
    def fail(writer: kd.TopKCacheWriter) -> None:
        with writer:
            writer.write(SEQUENCES[0])
            raise KeyError

    writer = kd.TopKCacheWriter(path, vocab_size=V)
    with pytest.raises(KeyError):
        fail(writer)
    assert leftovers(path.parent) == []
    with pytest.raises(ValueError, match=r"the writer of .*teacher\.safetensors is closed"):
        writer.write(SEQUENCES[0])
    writer.close()
    assert leftovers(path.parent) == []


def test_an_older_file_stays_until_the_new_one_is_whole(path):
    write(path, SEQUENCES[0])
    before = path.read_bytes()
    writer = kd.TopKCacheWriter(path, vocab_size=V)
    writer.write(SEQUENCES[1])
    assert path.read_bytes() == before
    old = kd.TopKCache(path)
    writer.close()
    writer.close()
    assert len(kd.TopKCache(path)[0].ids) == 1
    assert entries(old[0]) == entries(SEQUENCES[0], torch.bfloat16)  # the one that is open is the one it was
    assert leftovers(path.parent) == ["teacher.safetensors"]


def test_a_full_disk_leaves_no_file(path, monkeypatch):
    writer = kd.TopKCacheWriter(path, vocab_size=V)
    writer.write(SEQUENCES[0])
    monkeypatch.setattr(cache_module._Spool, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(OSError, match="no space left"):
        writer.write(SEQUENCES[1])
    writer.close()  # which must not make a file of half a sequence
    assert leftovers(path.parent) == []


def test_a_full_disk_while_joining_leaves_no_file(path, monkeypatch):
    writer = kd.TopKCacheWriter(path, vocab_size=V)
    writer.write(SEQUENCES[0])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(OSError, match="no space left"):
        writer.close()
    assert leftovers(path.parent) == []


def test_a_writer_nobody_closes(path):
    def forget() -> None:
        kd.TopKCacheWriter(path, vocab_size=V).write(SEQUENCES[0])
        gc.collect()

    with pytest.warns(ResourceWarning):
        forget()
    assert leftovers(path.parent) == []


WRITE_AND_BE_KILLED = """
import os, signal, sys, torch, kdkernels as kd
from benchmarks.memory import peak_above_now
torch.set_num_threads(1)
batch = kd.TopKTeacher.from_logits(torch.randn(4, 64, 2000), 32)
def write(times):
    with kd.TopKCacheWriter(sys.argv[1], vocab_size=2000) as writer:
        for _ in range(times):
            writer.write(batch)
write(2)
print(peak_above_now(lambda: write(1000)), flush=True)
with kd.TopKCacheWriter(sys.argv[2], vocab_size=2000) as writer:
    writer.write(batch)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures and kills as Linux does")
def test_memory_does_not_grow_and_a_killed_writer_leaves_no_file(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", WRITE_AND_BE_KILLED, str(whole), str(killed)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert [name.rsplit("-", 1)[0] for name in leftovers(tmp_path)] == [".killed", "whole"]
    if run.stdout.strip() == "None":
        pytest.skip("this system does not let a process reset its peak")
    size = whole.stat().st_size
    assert size > 40 * 2**20
    assert int(run.stdout) < size / 10


# Reading.


def test_pickling_opens_the_file_again(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(path, *SEQUENCES)
    data = pickle.dumps(kd.TopKCache(path.name))
    assert len(data) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert [entries(one) for one in again] == [entries(one, torch.bfloat16) for one in SEQUENCES]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_data_loader_with_workers(path):
    write(path, *SEQUENCES)
    cache = kd.TopKCache(path)
    loader = torch.utils.data.DataLoader(range(5), batch_size=2, num_workers=1, collate_fn=cache.batch)
    found = list(loader)
    assert [len(batch.ids) for batch in found] == [2, 2, 1]
    assert torch.equal(found[1].ids, cache.batch([2, 3]).ids)


def test_threads(path):
    teachers = [ragged(20, 8, seed=seed) for seed in range(30)]
    cache = kd.TopKCache(write(path, *teachers))
    expected = [entries(one, torch.bfloat16) for one in teachers]

    def read(start: int) -> bool:
        return all(entries(cache[(start + i) % 30]) == expected[(start + i) % 30] for i in range(60))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(read, [0, 15]))


def test_closed(path):
    with kd.TopKCache(write(path, *SEQUENCES)) as cache:
        kept = cache[0]
    for read in (lambda: cache[0], lambda: cache.batch([0])):
        with pytest.raises(ValueError, match=r"teacher\.safetensors is closed"):
            read()
    assert entries(kept) == entries(SEQUENCES[0], torch.bfloat16)


def test_without_safetensors(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    write(path, *SEQUENCES)  # needs nothing
    with pytest.raises(ImportError, match="TopKCache needs the package safetensors: pip install safetensors"):
        kd.TopKCache(path)
