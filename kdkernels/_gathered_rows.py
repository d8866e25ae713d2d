"""Row losses of a sparse teacher that need the logits of its own ids alone, and the gradients of what they came from.

Renormalised within the given ids, neither loss nor gradient knows of another column. So only those rows of the lm_head
are read, and the ids' logits (N, K) are a loss of K columns like any other, for which a column without an id has no
probability on either side.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdkernels import _gathered_products as products
from kdkernels import backends
from kdkernels._ids import first_occurrences, out_of_range
from kdkernels._linear_rows import Formed, LinearProblem, Wanted, in_dtype, part, rows_of, runs_on
from kdkernels.backends.native import number_of_stats

# Rows of ids begin at multiples of so many columns: of 16 bytes in any dtype.
COLUMNS = 8
# What an id of a chunk takes at most: its number, score, logit, gradient, and what sorting it takes.
ENTRY_BYTES = 64
DEFAULT_BYTES = 256 << 20
MOST_ENTRIES = 1 << 30  # which are counted in int32


def row_losses(problem: LinearProblem, wanted: Wanted) -> Formed:
    """Loss and statistics of every row, and the gradients that are wanted; statistics that other columns need are NaN.

    ``problem.options`` has the tail "renormalize", no cross-entropy, and ``whole`` not set.
    """
    return _Gathered(problem, wanted).run()


class _Gathered:
    def __init__(self, problem: LinearProblem, wanted: Wanted) -> None:
        assert problem.members is not None
        self.p, self.wanted, self.ids = problem, wanted, problem.members
        p = problem
        self.columns = -(-self.ids.shape[-1] // COLUMNS) * COLUMNS
        self.fused = products.in_triton(p.hidden.device, p.backend)
        in_place = p.index is None
        self.id_rows = runs_on(self.ids) if in_place else None
        self.teacher_rows = runs_on(p.teacher) if in_place else None
        # Logits and scores come scaled and capped; columns without an id must not go through a softcap.
        self.options = replace(
            p.options,
            vocab_size=self.columns,
            student_logit_scale=1.0,
            student_softcap=0.0,
            teacher_logit_scale=1.0,
            tail="",
            whole=True,
        )

    def run(self) -> Formed:
        p, wanted = self.p, self.wanted
        loss = p.row_scale.new_empty(p.rows)
        stats = p.row_scale.new_empty((number_of_stats(p.options.divergence, p.options.tail), p.rows))
        size = self._rows_at_a_time()
        several = size < p.rows
        of_hidden = None if wanted.hidden is None else p.hidden.new_empty(p.hidden.shape, dtype=wanted.hidden)
        of_weight = self._of_vocabulary(p.weight.shape, wanted.weight, several)
        of_bias = self._of_vocabulary(p.weight.shape[:1], wanted.bias, several)
        for first in range(0, p.rows, size):
            rows = slice(first, min(first + size, p.rows))
            places, gradient = self._sweep(rows, loss, stats)
            if gradient is None:
                continue
            if of_hidden is not None:
                products.of_hidden(gradient, places, p.weight, of_hidden[rows], fused=self.fused)
            if of_weight is None and of_bias is None:
                continue
            entries = products.segments(places, gradient, p.weight.shape[0])
            del places, gradient
            how = {"add": first > 0, "fused": self.fused}
            if of_weight is not None:
                products.of_weight(entries, p.hidden[rows], of_weight, **how)
            if of_bias is not None:
                ones = of_bias.new_ones((rows.stop - rows.start, 1))
                products.of_weight(entries, ones, of_bias.unsqueeze(1), **how)
            del entries
        return Formed(loss, stats, of_hidden, in_dtype(of_weight, wanted.weight), in_dtype(of_bias, wanted.bias))

    def _rows_at_a_time(self) -> int:
        p = self.p
        entry = ENTRY_BYTES + (8 * p.hidden.shape[1] // products.PART if self.fused else 0)
        entries = min(MOST_ENTRIES, (p.workspace_bytes or DEFAULT_BYTES) // entry)
        most = max(1, entries // self.columns)
        return max(1, -(-p.rows // -(-p.rows // most))) if p.rows else 1

    def _of_vocabulary(self, shape: torch.Size, dtype: torch.dtype | None, several: bool) -> Tensor | None:
        """Memory for a gradient of the weight or the bias, to which several chunks are added in the rows' dtype."""
        if dtype is None:
            return None
        dtype = self.p.row_scale.dtype if several else dtype
        make = self.p.weight.new_empty if self.p.rows else self.p.weight.new_zeros
        return make(shape, dtype=dtype)

    def _sweep(self, rows: slice, loss: Tensor, stats: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss and statistics of these rows; where their ids are (n, C), and the gradient of the logits there."""
        p, o = self.p, self.p.options
        scale = p.row_scale[rows]
        places, logprobs, astray = self._given(rows, scale)
        z, slope = self._logits(rows, places)
        # Rows to which one side gives nothing at all are not the sweep's: it would divide by their mass.
        nothing = (logprobs == -torch.inf).all(1)
        lost = (z == -torch.inf).all(1) & ~nothing
        swept = torch.where(nothing | lost, 0, scale)
        scores = logprobs * o.teacher_logit_scale
        gradient = torch.empty_like(z) if self.wanted.any else None
        temperatures, found = part(p.temperatures, rows), stats.new_empty((4, scale.numel()))
        backends.row_loss(
            p.backend, z, scores, None, swept, temperatures, None, None, self.options, gradient, loss[rows], found
        )
        del z
        temperature = o.temperature if temperatures is None else temperatures.unsqueeze(1)
        scores /= temperature
        normaliser = scores.logsumexp(1, keepdim=True)
        infinite = scale * (o.kd_weight * torch.inf if o.kd_weight else 0)
        loss[rows] = torch.where(astray, torch.nan, torch.where(lost, infinite, loss[rows]))
        _, _, divergence, cross_entropy = found
        unknown = torch.where(scale != 0, torch.nan, 0)
        teacher_lse = torch.where(scale != 0, normaliser.squeeze(1), 0)
        divergence = torch.where(lost, torch.inf, divergence)
        mass = logprobs.logsumexp(1).exp()
        known = torch.stack([unknown, teacher_lse, divergence, cross_entropy, mass, unknown, unknown])
        stats[:, rows] = torch.where(astray, torch.nan, known)
        if gradient is None:
            return places, None
        if o.divergence == "forward_kl":  # the others' have the student's probability as a factor
            by_row = scale.unsqueeze(1) * o.kd_weight * (temperature if o.scale_by_temperature else 1 / temperature)
            gradient = torch.where(lost.unsqueeze(1), (scores - normaliser).exp_() * -by_row, gradient)
        if o.student_logit_scale != 1:
            gradient *= o.student_logit_scale
        if slope is not None:
            gradient *= slope
        return places, gradient.masked_fill_(astray.unsqueeze(1), torch.nan)

    def _given(self, rows: slice, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ids of these rows, -1 where there is none (n, C); their log-probabilities; rows with an id too large."""
        p, vocab_size = self.p, self.p.options.vocab_size
        ids, logprobs = rows_of(p, self.ids, self.id_rows, rows), rows_of(p, p.teacher, self.teacher_rows, rows)
        counts = scale != 0  # what other rows hold is not read
        alive = first_occurrences(ids, vocab_size) & counts.unsqueeze(1)
        beside = (0, self.columns - ids.shape[1])
        places = pad(torch.where(alive, ids, -1).to(torch.int32), beside, value=-1)
        logprobs = torch.where(places >= 0, pad(logprobs.to(scale.dtype), beside), -torch.inf)
        return places, logprobs, out_of_range(ids, vocab_size) & counts

    def _logits(self, rows: slice, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """The student's logits at these places, -inf where there is none (n, C); the slope of their softcap."""
        p, cap = self.p, self.p.options.student_softcap
        z = torch.empty(places.shape, dtype=p.row_scale.dtype, device=places.device)
        products.logits(p.hidden[rows], p.weight, p.bias, p.options.student_logit_scale, places, z, fused=self.fused)
        if cap == 0:
            return z, None
        z /= cap
        slope = torch.cosh(z).square_().reciprocal_()
        return torch.where(places >= 0, cap * torch.tanh(z), -torch.inf), slope
