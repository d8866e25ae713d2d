"""Strong sets in the Triton kernels: which of a row's columns are in S, and the threshold that top-k and top-p mean.

The threshold is found by narrowing a bracket: one sweep over the teacher's row measures what lies above each of PIVOTS
logits, a count for top-k and a mass for top-p. Logits are bracketed by their place in the order of fp32 numbers, an
integer, so that the search ends: at neighbours, and with them at the exact set.

What makes sweeps few: the first one's pivots come from a sample of the row, and it also finds each lane's maximum.
Where few tokens matter (a small k, a teacher sure of a few tokens), they are nearly all such maxima, and a threshold
among the maxima is a lower bound that most often is the answer; the second sweep then says so.
"""

import triton
import triton.language as tl

from kdkernels.backends._triton_columns import (
    CHUNK,
    blocks_at_edges,
    blocks_inside,
    edge,
    fold,
    fold_max,
    inside,
    teacher_logits,
    transform,
)
from kdkernels.backends._triton_math import exp2, fits, is_finite, sum2, sum8

PIVOTS: tl.constexpr = tl.constexpr(8)
SAMPLE = tl.constexpr(4096)  # columns, of a block's that many at most
RUN: tl.constexpr = tl.constexpr(16)  # neighbours among them: 32 bytes of a 16-bit type, what memory gives at once
# Rounds of the search in the sample: to a part in 9^4 of the sample's span, well under what a sample can tell.
SAMPLE_ROUNDS = tl.constexpr(4)
SAMPLE_ERRORS = tl.constexpr(3.0)  # standard errors of the sample's measure that the first pivots span, to each side


@triton.jit
def strong_columns(y, columns, choice, rows, EDGE: tl.constexpr, P: tl.constexpr):
    """Which columns, of teacher logits y, are in S. ``choice``: threshold, label, and the row of the mask."""
    threshold, label, mask = choice
    if P.STRONG == "label":
        strong = columns - rows[2] == label
    elif P.STRONG == "given":
        if EDGE:
            valid = (columns >= rows[2]) & (columns < rows[3])
            strong = tl.load(mask + (columns - rows[2]), mask=valid, other=0) != 0
        else:
            strong = tl.load(mask + (columns - rows[2])) != 0
    else:
        strong = y >= threshold
    return strong


# --- Numbers in order ---


@triton.jit
def _place(y, P: tl.constexpr):
    """An integer that grows with y, a scalar; neighbours of the teacher's type are neighbours here."""
    bits = y.to(tl.int32, bitcast=True)
    place = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> P.ORDER_SHIFT
    return place.to(tl.int64) if P.ORDER_SHIFT == 0 else place  # 32 bits hold no difference of two of 32 bits


@triton.jit
def _number(place, P: tl.constexpr):
    """The number at a place (see :func:`_place`)."""
    whole = place << P.ORDER_SHIFT
    bits = tl.where(place < 0, whole | ((1 << P.ORDER_SHIFT) - 1), whole).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# --- The bracket: what lies at or above ``low`` is enough, what lies at or above ``high`` is not ---


@triton.jit
def _even_pivots(low, high):
    """Places above low and up to high, evenly spaced: all there are if they are few."""
    step = (high - low + PIVOTS) // (PIVOTS + 1)
    pivots = (tl.minimum(low + step, high),)
    for j in tl.static_range(1, PIVOTS):
        pivots = pivots + (tl.minimum(low + step * (j + 1), high),)
    return pivots


@triton.jit
def _near_pivots(low, high, P: tl.constexpr):
    """Places above low and up to high, ever wider apart."""
    WIDER: tl.constexpr = 3 if P.ORDER_SHIFT == 0 else 1
    pivots = (tl.minimum(low + 1, high),)
    for j in tl.static_range(1, PIVOTS):
        pivots = pivots + (tl.minimum(low + (1 << (WIDER * j)), high),)  # type: ignore[assignment]
    return pivots


@triton.jit
def _choose(condition, these, those):
    chosen = (tl.where(condition, these[0], those[0]),)
    for j in tl.static_range(1, PIVOTS):
        chosen = chosen + (tl.where(condition, these[j], those[j]),)
    return chosen


@triton.jit
def _numbers(pivots, P: tl.constexpr):
    numbers = (_number(pivots[0], P),)
    for j in tl.static_range(1, PIVOTS):
        numbers = numbers + (_number(pivots[j], P),)  # type: ignore[assignment]
    return numbers


@triton.jit
def _narrowed(low, high, at_low, pivots, measures, target):
    """The bracket after what lies above the pivots, which ascend, was measured; at_low: the measure of its low end."""
    for j in tl.static_range(PIVOTS):
        enough = measures[j] >= target
        at_low = tl.where(enough & (pivots[j] > low), measures[j], at_low)
        low = tl.where(enough, tl.maximum(low, pivots[j]), low)
        high = tl.where(enough, high, tl.minimum(high, pivots[j]))
    return low, high, at_low


@triton.jit
def _search(values, weights, target, low, high, ROUNDS: tl.constexpr, P: tl.constexpr):
    """Narrows a bracket among values in registers, each of which counts its weight."""
    at_low = 0.0 * target
    rounds = 0 * low + ROUNDS
    while (high - low > 1) & (rounds > 0):
        pivots = _even_pivots(low, high)
        numbers = _numbers(pivots, P)
        above = (tl.where(values >= numbers[0], weights, 0.0),)
        for j in tl.static_range(1, PIVOTS):
            above = above + (tl.where(values >= numbers[j], weights, 0.0),)  # type: ignore[assignment]
        low, high, at_low = _narrowed(low, high, at_low, pivots, sum8(above), target)
        rounds -= 1
    return low, high


# --- Sweeps over the teacher's row ---


@triton.jit
def _weights(y, ref, log2_scale, P: tl.constexpr):
    """What a logit counts for, 0 at -inf: its mass, or 1."""
    if P.STRONG == "top_p":
        weights = exp2((y - ref) * log2_scale)
    else:
        weights = tl.where(y > float("-inf"), 1.0, 0.0)
    return weights


@triton.jit
def _measure_block(rows, columns, sums, numbers, bracket, ref, log2_scale, EDGE: tl.constexpr, P: tl.constexpr):
    total, largest, smallest, above = sums
    low, high = bracket
    y = teacher_logits(rows, columns, EDGE, P)
    if P.STRONG == "top_p":
        weights = exp2((y - ref) * log2_scale)
        total += fold(weights, P)
    else:
        weights = 1.0  # no pivot is -inf, so that what lies outside the row is never above one
    # A product, not a choice: two instructions a pivot instead of three.
    more = (above[0] + fold(tl.where(y >= numbers[0], 1.0, 0.0) * weights, P),)
    for j in tl.static_range(1, PIVOTS):
        more = more + (above[j] + fold(tl.where(y >= numbers[j], 1.0, 0.0) * weights, P),)  # type: ignore[assignment]
    largest = tl.maximum(largest, fold_max(tl.where(y < high, y, float("-inf")), P))
    if P.ORDER_SHIFT == 0:
        smallest = tl.maximum(smallest, fold_max(tl.where(y >= low, -y, float("-inf")), P))
    return total, largest, smallest, more


@triton.jit
def _measure(rows, pivots, low, high, ref, log2_scale, REVERSE: tl.constexpr, P: tl.constexpr):
    """What lies at or above each pivot, and in all (top-p only); per lane the largest logit under ``high``; minus the
    smallest from ``low`` on (where the teacher's numbers are no 16-bit ones: those have few places anyway)."""
    numbers = _numbers(pivots, P)
    bracket = _number(low, P), _number(high, P)
    zero = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    none = zero + float("-inf")
    sums = zero, none, none, (zero, zero, zero, zero, zero, zero, zero, zero)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        sums = _measure_block(rows, inside(i, rows, REVERSE, P), sums, numbers, bracket, ref, log2_scale, False, P)
    for i in range(blocks_at_edges(rows, P)):
        sums = _measure_block(rows, edge(i, rows, P), sums, numbers, bracket, ref, log2_scale, True, P)
    total, largest, smallest, above = sums
    return sum8(above), tl.sum(total, axis=0), largest, tl.max(smallest, axis=0)


@triton.jit
def _first_pivots(rows, log2_scale, amount, P: tl.constexpr):
    """Pivots about the threshold as a sample of the row shows it, and a reference for the teacher's masses."""
    COLUMNS: tl.constexpr = SAMPLE if P.BLOCK > SAMPLE else P.BLOCK
    teacher, begin, end = rows[1], rows[2], rows[3]
    i = tl.arange(0, COLUMNS)
    columns = begin + i // RUN * tl.maximum((end - begin) // (COLUMNS // RUN), RUN) + i % RUN
    y = tl.load(teacher + columns, mask=columns < end, other=0.0).to(tl.float32)
    y, _ = transform(y, rows[6], rows[7], tl.constexpr(P.TEACHER_TRANSFORM))
    y = tl.where(columns < end, y, float("-inf"))
    largest = tl.max(y, axis=0)
    ref = tl.where(is_finite(largest), largest, 0.0)
    weights = _weights(y, ref, log2_scale, P)
    total, squares = sum2(weights, weights * weights)
    share = amount
    if P.STRONG == "top_k":
        share = amount / (end - begin)
    error = tl.sqrt(tl.maximum(share * (1.0 - share), 0.0) * squares) * SAMPLE_ERRORS
    low = _place(tl.min(tl.where(columns < end, y, float("inf")), axis=0), P)
    high = _place(largest, P) + 1
    first, _ = _search(y, weights, share * total + error, low, high, SAMPLE_ROUNDS, P)
    _, last = _search(y, weights, share * total - error, low, high, SAMPLE_ROUNDS, P)
    # -inf is no pivot: what lies outside the row is not above one.
    first = tl.maximum(first, _place(0.0 * error + float("-inf"), P) + 1)
    step = tl.maximum(last - first + PIVOTS - 2, 0) // (PIVOTS - 1)
    pivots = (first,)
    for j in tl.static_range(1, PIVOTS):
        pivots = pivots + (first + step * j,)  # type: ignore[assignment]
    return pivots, ref


@triton.jit
def _is_open(low, high, at_low, target, P: tl.constexpr):
    is_open = high - low > 1
    if P.STRONG == "top_k":  # a count that is met exactly leaves nothing to decide
        is_open = is_open & (at_low != target)
    return is_open


@triton.jit
def threshold_of(rows, log2_scale, amount, P: tl.constexpr):
    """The logit from which on the teacher's columns are in S: top_k or top_p of ``amount``."""
    nothing = 0.0 * log2_scale
    lowest = _place(nothing + float("-inf"), P)
    low, high = lowest, lowest + 1
    is_part = amount >= 1.0
    if P.STRONG == "top_p":
        is_part = amount < 1.0
    if is_part:
        pivots, ref = _first_pivots(rows, log2_scale, amount, P)
        beyond = _place(nothing + float("inf"), P)
        measures, total, largest, _ = _measure(rows, pivots, low, beyond, ref, log2_scale, False, P)
        top = tl.max(largest, axis=0)
        if P.STRONG == "top_p":
            if fits(total) == 0:
                ref = tl.where(is_finite(top), top, 0.0)
                measures, total, largest, _ = _measure(rows, pivots, low, beyond, ref, log2_scale, True, P)
            target = amount * total
        else:
            total = nothing + (rows[3] - rows[2])
            target = nothing + amount
        low, high, at_low = _narrowed(low, _place(top, P) + 1, total, pivots, measures, target)
        bound, _bound_end = _search(largest, _weights(largest, ref, log2_scale, P), target, low, high, 64, P)
        is_bound = bound > low
        # A bound's own measure is not known.
        at_low = tl.where(is_bound, -1.0, at_low)
        low = bound
        while _is_open(low, high, at_low, target, P):
            places = _choose(is_bound, _near_pivots(low, high, P), _even_pivots(low, high))
            counted, _again, below, smallest = _measure(rows, places, low, high, ref, log2_scale, True, P)
            if P.ORDER_SHIFT == 0:
                # Nothing lies between the bracket's ends and its outermost logits.
                outer_low = _place(-smallest, P)
                outer_high = _place(tl.max(below, axis=0), P) + 1
            else:
                outer_low, outer_high = low, high
            low, high, at_low = _narrowed(low, high, at_low, places, counted, target)
            low, high = tl.maximum(low, outer_low), tl.minimum(high, outer_high)
            is_bound = low < low
    return _number(low, P)
