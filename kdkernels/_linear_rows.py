"""The row sweeps of a fused lm_head: logits of a chunk of rows at a time, and the gradients of what they came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import _chunks, _products, backends
from kdkernels.backends.native import RowOptions, number_of_stats, row_layout

# Logits' rows begin at multiples of so many columns: any kernel and any product reads them at its best.
COLUMNS = 64
# Of a teacher's logits that cannot be read where they lie.
ROWS_COPIED = 64


@dataclass(frozen=True)
class LinearProblem:
    """N rows of hidden states; every operand in the dtype it is multiplied in."""

    hidden: Tensor  # (N, H_s)
    weight: Tensor  # (V_s, H_s)
    bias: Tensor | None  # (V_s,)
    teacher: Tensor  # (N, H_t) hidden states; without a weight, N rows: logits (..., V_t), log-probabilities (..., K)
    teacher_weight: Tensor | None  # (V_t, H_t)
    teacher_bias: Tensor | None  # (V_t,)
    labels: Tensor | None  # (N,)
    row_scale: Tensor  # (N,)
    temperatures: Tensor | None  # (N,)
    weights: Tensor | None  # (3,)
    members: Tensor | None  # (V,) or (..., V) bool, or ids (..., K), N rows
    backend: str
    options: RowOptions
    logits_dtype: torch.dtype
    workspace_bytes: int | None
    index: Tensor | None = None  # (N,): of the teacher's logits' and the members' rows, those that are wanted

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True)
class Wanted:
    """Which gradients to form, by the dtype each is to have; None: not wanted."""

    hidden: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None

    @property
    def any(self) -> bool:
        return any(dtype is not None for dtype in (self.hidden, self.weight, self.bias))


class Formed(NamedTuple):
    loss: Tensor  # (N,)
    stats: Tensor  # (4, 7 or 9, N)
    hidden: Tensor | None  # (N, H_s)
    weight: Tensor | None  # (V_s, H_s)
    bias: Tensor | None  # (V_s,)


def compacted(problem: LinearProblem) -> tuple[LinearProblem, Tensor]:
    """The problem without the rows whose scale is 0, and the others' numbers. Waits for the device."""
    kept = problem.row_scale.nonzero().squeeze(1)

    def of(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows.index_select(0, kept)

    few = replace(
        problem,
        hidden=problem.hidden.index_select(0, kept),
        teacher=problem.teacher if problem.teacher_weight is None else problem.teacher.index_select(0, kept),
        labels=of(problem.labels),
        row_scale=problem.row_scale.index_select(0, kept),
        temperatures=of(problem.temperatures),
        index=kept,
    )
    return few, kept


def row_losses(problem: LinearProblem, wanted: Wanted) -> Formed:
    """Loss and statistics of every row, and the gradients that are wanted."""
    return _Sweep(problem, wanted).run()


class _Sweep:
    def __init__(self, problem: LinearProblem, wanted: Wanted) -> None:
        self.p, self.wanted = problem, wanted
        p, device = problem, problem.hidden.device
        self.vocab = p.options.vocab_size
        self.columns = -(-self.vocab // COLUMNS) * COLUMNS
        # Scales of logits go into the products, which cost nothing more for them.
        self.scale, self.teacher_scale = p.options.student_logit_scale, p.options.teacher_logit_scale
        self.options = replace(p.options, student_logit_scale=1.0)
        if p.teacher_weight is not None:
            self.options = replace(self.options, teacher_logit_scale=1.0)
        narrows = backends.sweep(p.backend, device).narrows(device)
        self.gradient_dtype = p.hidden.dtype if narrows and p.logits_dtype == torch.float32 else p.logits_dtype
        self.over_logits = wanted.any and self.gradient_dtype == p.logits_dtype
        self.teacher_rows = runs_on(p.teacher) if p.teacher_weight is None and p.index is None else None
        self.sparse = bool(p.options.tail)
        if self.teacher_rows is not None and device.type == "cuda" and not self.sparse:
            self.teacher_rows = self.teacher_rows if _suits(self.teacher_rows, p.logits_dtype) else None
        one_for_all = p.members is None or (p.members.dim() == 1 and not self.sparse)
        self.member_rows = None if p.members is None or one_for_all or p.index is not None else runs_on(p.members)

    def run(self) -> Formed:
        p, wanted = self.p, self.wanted
        loss = p.row_scale.new_empty(p.rows)
        stats = p.row_scale.new_empty((number_of_stats(self.options.divergence, self.options.tail), p.rows))
        of_hidden = None if wanted.hidden is None else p.hidden.new_empty(p.hidden.shape, dtype=wanted.hidden)
        of_bias = None if wanted.bias is None else p.row_scale.new_zeros(p.weight.shape[0])
        if p.rows == 0:
            of_weight = None if wanted.weight is None else p.weight.new_zeros(p.weight.shape, dtype=wanted.weight)
            return Formed(loss, stats, of_hidden, of_weight, in_dtype(of_bias, wanted.bias))
        plan = self._plan()
        gradient = self._buffer(plan.gradient_bytes)
        scratch: Tensor | None = self._buffer(plan.scratch_bytes)
        several = plan.group < p.rows
        of_weight = None
        if several and wanted.weight is not None:
            of_weight = self._weight_gradient(torch.float64 if wanted.weight == torch.float64 else torch.float32)
        for first in range(0, p.rows, plan.group):
            rows = slice(first, min(first + plan.group, p.rows))
            for chunk in plan.of(rows.stop - rows.start):
                assert scratch is not None
                self._sweep(rows.start, chunk, gradient, scratch, loss, stats)
            if not several:
                scratch = None  # before the weight's gradient takes as much
            if not wanted.any:
                continue
            of_logits = self._view(gradient, 0, rows.stop - rows.start, self.gradient_dtype)
            if of_hidden is not None:
                _products.of_hidden(of_logits, p.weight[: self.vocab], self.scale, of_hidden[rows])
            if wanted.weight is not None:
                if of_weight is None:
                    of_weight = self._weight_gradient(wanted.weight)
                target = of_weight[: self.vocab]
                _products.of_weight(of_logits, p.hidden[rows], self.scale, target, add=rows.start > 0)
            if of_bias is not None:
                of_bias[: self.vocab].add_(of_logits.sum(0, dtype=of_bias.dtype), alpha=self.scale)
            del of_logits
        del gradient, scratch
        return Formed(loss, stats, of_hidden, in_dtype(of_weight, wanted.weight), in_dtype(of_bias, wanted.bias))

    def _plan(self) -> _chunks.Plan:
        p, device = self.p, self.p.hidden.device
        machine = _chunks.CPU if device.type == "cpu" else _chunks.GPU
        logits = self.columns * p.logits_dtype.itemsize
        row = _chunks.RowBytes(
            student=0 if self.over_logits else logits,
            teacher=0 if self.teacher_rows is not None or self.sparse else logits,
            gradient=self.columns * self.gradient_dtype.itemsize if self.wanted.any else 0,
        )
        keep = self.wanted.weight is not None
        if p.workspace_bytes is None:
            weight_bytes = 0 if self.wanted.weight is None else p.weight.numel() * self.wanted.weight.itemsize
            return _chunks.default_plan(p.rows, row, weight_bytes, machine, keep=keep)
        teacher_width = 0 if p.teacher_weight is None else p.teacher_weight.shape[1]
        share = p.hidden.shape[1] / max(1, p.hidden.shape[1] + teacher_width)
        return _chunks.plan(p.rows, row, p.workspace_bytes, machine, keep=keep, share=share)

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.p.hidden.device)

    def _weight_gradient(self, dtype: torch.dtype) -> Tensor:  # (V_s, H_s)
        gradient = self.p.weight.new_empty(self.p.weight.shape, dtype=dtype)
        gradient[self.vocab :].zero_()
        return gradient

    def _view(self, buffer: Tensor, offset: int, rows: int, dtype: torch.dtype) -> Tensor:  # (rows, V)
        stop = offset + rows * self.columns * dtype.itemsize
        return buffer[offset:stop].view(dtype).view(rows, self.columns)[:, : self.vocab]

    def _sweep(
        self, first: int, chunk: _chunks.Chunk, gradient: Tensor, scratch: Tensor, loss: Tensor, stats: Tensor
    ) -> None:
        """Rows [first + chunk.start, first + chunk.stop): their logits, then loss, statistics and gradient."""
        p, n = self.p, chunk.stop - chunk.start
        rows = slice(first + chunk.start, first + chunk.stop)
        size = n * self.columns * p.logits_dtype.itemsize
        in_scratch, in_tail = 0, gradient.numel()

        def place(there: bool) -> Tensor:
            nonlocal in_scratch, in_tail
            if there:
                in_scratch += size
                return self._view(scratch, in_scratch - size, n, p.logits_dtype)
            in_tail -= size
            return self._view(gradient, in_tail, n, p.logits_dtype)

        of_logits = None
        if self.wanted.any:
            start = chunk.start * self.columns * self.gradient_dtype.itemsize
            of_logits = self._view(gradient, start, n, self.gradient_dtype)
        student = of_logits if self.over_logits and of_logits is not None else place(chunk.student_in_scratch)
        _products.logits(p.hidden[rows], p.weight[: self.vocab], part(p.bias, self.vocab), self.scale, student)
        if self.teacher_rows is not None or self.sparse:
            teacher = rows_of(p, p.teacher, self.teacher_rows, rows)
        else:
            teacher = place(chunk.teacher_in_scratch)
            self._teacher_logits(rows, teacher)
        members = p.members
        if members is not None and (members.dim() > 1 or self.sparse):
            members = rows_of(p, members, self.member_rows, rows)
        whole = n == p.rows
        of_chunk = stats if whole else stats.new_empty((stats.shape[0], n))
        backends.row_loss(
            p.backend,
            student,
            teacher,
            part(p.labels, rows) if self.options.reads_labels else None,
            p.row_scale[rows],
            part(p.temperatures, rows),
            p.weights,
            members,
            self.options,
            of_logits,
            loss[rows],
            of_chunk,
        )
        if not whole:
            stats[:, rows] = of_chunk

    def _teacher_logits(self, rows: slice, out: Tensor) -> None:
        p = self.p
        if p.teacher_weight is not None:
            weight, bias = p.teacher_weight[: self.vocab], part(p.teacher_bias, self.vocab)
            _products.logits(p.teacher[rows], weight, bias, self.teacher_scale, out)
            return
        for start in range(rows.start, rows.stop, ROWS_COPIED):
            few = slice(start, min(start + ROWS_COPIED, rows.stop))
            logits = p.teacher[..., : self.vocab][_places(p, few, p.teacher.shape[:-1])]
            out[few.start - rows.start : few.stop - rows.start] = logits


def in_dtype(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if gradient is None or dtype is None else gradient.to(dtype)


def part(tensor: Tensor | None, rows: slice | int) -> Tensor | None:
    return None if tensor is None else tensor[rows if isinstance(rows, slice) else slice(rows)]


def _suits(logits: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels that read logits once take these beside ours: of one dtype, rows at multiples of 16 bytes."""
    return logits.dtype == dtype and (logits.data_ptr() | logits.stride(0) * logits.element_size()) % 16 == 0


def runs_on(tensor: Tensor) -> Tensor | None:  # (..., K) -> (N, K)
    """A tensor as a matrix where it lies; None where its rows are not evenly spaced, or not contiguous."""
    sizes, strides = row_layout(tensor)
    width = tensor.shape[-1]
    if len(sizes) > 1 or (tensor.stride(-1) != 1 and width > 1):
        return None
    return tensor.as_strided((tensor.shape[:-1].numel(), width), ((strides or [width])[0], 1))


def rows_of(problem: LinearProblem, tensor: Tensor, matrix: Tensor | None, rows: slice) -> Tensor:  # (n, K)
    """Those of a problem's rows in a tensor (..., K): of its ``matrix``, where it is one, or a copy."""
    if matrix is not None:
        return matrix[rows]
    return tensor[_places(problem, rows, tensor.shape[:-1])].reshape(-1, tensor.shape[-1]).contiguous()


def _places(problem: LinearProblem, rows: slice, shape: torch.Size) -> tuple[Tensor, ...]:
    """Where rows lie in leading dimensions: torch.unravel_index, which waits for the device, without that."""
    index = problem.index
    numbers = torch.arange(rows.start, rows.stop, device=problem.hidden.device) if index is None else index[rows]
    places: list[Tensor] = []
    for size in reversed(shape):
        places.insert(0, numbers % size)
        numbers = numbers // size
    return tuple(places)
