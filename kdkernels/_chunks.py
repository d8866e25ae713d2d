"""How the rows of a fused lm_head are cut: chunks whose logits exist at a time, groups whose gradients do.

The logits of a chunk of rows are formed, swept and forgotten; their gradient is kept for a group of chunks, whose
weight gradient is one product (over few rows it reads and writes all of the weight's gradient for little arithmetic).
A group's gradient lies in one buffer; what of it is not written yet holds logits meanwhile, beside a scratch buffer of
their own. The plan is the cheapest by a simple model of what products of few rows cost (docs/performance.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class RowBytes:
    """Bytes a row takes in each buffer; 0 where there is none."""

    student: int  # logits; 0 where the gradient is written over them
    teacher: int
    gradient: int

    @property
    def logits(self) -> int:
        return self.student + self.teacher


@dataclass(frozen=True)
class Machine:
    """What products of few rows cost, in rows of a chunk's products; and what is chosen where nothing is asked for."""

    floor: int  # fewer rows take as long as these
    per_chunk: int
    accumulate_floor: int  # as floor, of a weight gradient that is added to what is there
    per_accumulation: int
    conversion: int  # of an accumulated weight gradient to its own dtype
    step: int  # groups are multiples of this, and chunks, but for the last; those of some size multiples of thrice it
    group: int  # the default: rows whose gradient is kept, and rows of logits beside it
    scratch: int
    alone: int  # the default without a weight gradient: rows of a chunk


GPU = Machine(288, 40, 1280, 192, 640, step=64, group=8192, scratch=768, alone=1024)
CPU = Machine(64, 8, 32, 8, 8, step=8, group=48, scratch=48, alone=48)


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a group, and where their logits lie."""

    start: int
    stop: int
    student_in_scratch: bool
    teacher_in_scratch: bool


@dataclass(frozen=True)
class Plan:
    group: int  # rows of a group; the last one may have fewer
    gradient_bytes: int
    scratch_bytes: int
    chunks: tuple[Chunk, ...]  # of a full group

    def of(self, rows: int) -> Iterator[Chunk]:
        """The chunks of a group of so many rows."""
        for chunk in self.chunks:
            if chunk.start < rows:
                yield Chunk(chunk.start, min(chunk.stop, rows), chunk.student_in_scratch, chunk.teacher_in_scratch)


def _next(done: int, group: int, scratch: int, row: RowBytes) -> tuple[int, bool, bool]:
    """The most rows the next chunk can have, and whether student and teacher logits lie in the scratch buffer."""
    left = group - done
    tail = left * row.gradient  # not written yet; the chunk's own gradient goes to its front

    def most(in_tail: int, in_scratch: int) -> int:
        rows = left if in_tail == 0 else tail // (in_tail + row.gradient)
        return min(left, rows, left if in_scratch == 0 else scratch // in_scratch)

    options = [(most(0, row.logits), True, True)]
    if row.gradient:
        options += [
            (most(row.student, row.teacher), False, True),
            (most(row.teacher, row.student), True, False),
            (most(row.logits, 0), False, False),
        ]
    return max(options)


def _rounded(rows: int, step: int) -> int:
    """Down to what products like: on a GPU their tiles are 192 or 128 rows high, which a small chunk should fill."""
    if rows <= step:
        return rows
    return rows - rows % (3 * step if 6 * step <= rows < 24 * step else step)


def _chunks(group: int, scratch: int, row: RowBytes, step: int, cap: int) -> tuple[Chunk, ...] | None:
    """A group's chunks of at most ``cap`` rows, as large as fits; None where not even a row does."""
    found: list[Chunk] = []
    done = 0
    while done < group:
        rows, student, teacher = _next(done, group, scratch, row)
        rows = min(rows, cap)
        if rows < 1:
            return None
        if rows < group - done:
            rows = _rounded(rows, step)
        found.append(Chunk(done, done + rows, student, teacher))
        done += rows
    return tuple(found)


def _even(group: int, scratch: int, row: RowBytes, step: int) -> tuple[Chunk, ...] | None:
    """The fewest chunks, and of those the evenest."""
    fewest = _chunks(group, scratch, row, step, group)
    if fewest is None:
        return None
    low, high = group // len(fewest) // step, group // step + 1
    while low < high:  # the smallest cap, in steps, that needs no more chunks
        middle = (low + high) // 2
        chunks = _chunks(group, scratch, row, step, max(1, middle * step))
        if chunks is not None and len(chunks) <= len(fewest):
            fewest, high = chunks, middle
        else:
            low = middle + 1
    return fewest


def _even_size(rows: int, groups: int, step: int) -> int:
    size = -(-rows // groups)
    return min(rows, -(-size // step) * step) if size > step else size


def _candidates(rows: int, most: int, step: int) -> Iterator[int]:
    """Sizes for equal groups of at most ``most`` rows."""
    groups = -(-rows // most)
    while groups <= rows:
        size = _even_size(rows, groups, step)
        if size <= most:
            yield size
        if size <= step:
            break
        groups = max(groups + 1, groups + groups // 8)
    yield from {min(most, size) for size in (1, step)}


def _cost(rows: int, group: int, chunks: tuple[Chunk, ...], machine: Machine, keep: bool, share: float) -> float:
    whole, rest = divmod(rows, group)
    once = whole + (rest > 0) == 1
    cost = 0.0 if once or not keep else share * machine.conversion
    for size, times in ((group, whole), (rest, 1)):
        if size == 0:
            continue
        of_group = 0.0
        for chunk in chunks:
            if chunk.start < size:
                of_group += max(min(chunk.stop, size) - chunk.start, machine.floor) + machine.per_chunk
        of_group += share * max(size, machine.floor)
        if keep:
            floor, extra = (machine.floor, 0) if once else (machine.accumulate_floor, machine.per_accumulation)
            of_group += share * (max(size, floor) + extra)
        cost += times * of_group
    return cost


@functools.lru_cache(maxsize=256)
def plan(rows: int, row: RowBytes, workspace: int, machine: Machine, *, keep: bool, share: float) -> Plan:
    """The cheapest plan whose buffers take at most ``workspace`` bytes, or one row at a time where not even that fits.

    Args:
        rows: all rows, at least 1.
        keep: whether there is a weight gradient; without it a group is a chunk.
        share: a gradient's product as a part of a chunk's products for logits.
    """
    most = rows if not row.gradient else max(1, min(rows, workspace // row.gradient))
    best: tuple[float, Plan] | None = None
    for group in _candidates(rows, most, machine.step):
        scratch = min(max(0, workspace - group * row.gradient), group * row.logits)
        chunks = _even(group, scratch, row, machine.step)
        if chunks is None or (len(chunks) > 1 and not keep):
            continue
        cost = _cost(rows, group, chunks, machine, keep, share)
        if best is None or cost < best[0]:
            best = (cost, Plan(group, group * row.gradient, scratch, chunks))
    if best is not None:
        return best[1]
    return Plan(1, row.gradient, row.logits, (Chunk(0, 1, True, True),))


def default_plan(rows: int, row: RowBytes, weight_bytes: int, machine: Machine, *, keep: bool) -> Plan:
    """The plan where no bound is asked for.

    A weight gradient, of ``weight_bytes`` in its own dtype, is allocated after the scratch buffer of a single group is
    gone: that buffer may take as much.
    """
    if not keep:
        group = _even_size(rows, -(-rows // machine.alone), machine.step)
        return Plan(group, group * row.gradient, group * row.logits, (Chunk(0, group, True, True),))
    group = _even_size(rows, -(-rows // machine.group), machine.step)
    room = (machine.group - group) * row.gradient + machine.scratch * row.logits
    scratch = min(group * row.logits, max(room, weight_bytes if group == rows else 0))
    chunks = _even(group, scratch, row, machine.step)
    assert chunks is not None
    return Plan(group, group * row.gradient, scratch, chunks)
