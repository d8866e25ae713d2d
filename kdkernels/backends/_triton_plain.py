"""The sweeps of rows whose models are far apart: the plain formulas, a few instructions a column."""

import triton
import triton.language as tl

from kdkernels.backends._triton_columns import (
    CHUNK,
    blocks_at_edges,
    blocks_inside,
    edge,
    finish,
    fold,
    inside,
    log_ratio,
    logits,
)
from kdkernels.backends._triton_divergences import plain
from kdkernels.backends._triton_math import exp2, sum2

# A ratio divergence is summed at 2^BIAS·q: where p > 0 falls out of fp32's range, the sum is NaN or inf, and tells.
BIAS = tl.constexpr(60.0)
UNBIAS = tl.constexpr(2.0**-60)


@triton.jit
def _plain_sums_block(rows, columns, sums, refs, scales, a, b, EDGE: tl.constexpr, P: tl.constexpr):
    value, slope = sums
    student_ref, teacher_ref = refs
    log2_scale, log2_gap, _ = scales
    x, y, _ = logits(rows, columns, EDGE, P)
    u = (x - student_ref) * log2_scale
    if P.PLAIN == "power":
        value += fold(exp2(a * ((y - teacher_ref) * log2_scale) + b * u), P)
    else:
        log2_ratio = log_ratio(x, y, teacher_ref - student_ref) * log2_scale - log2_gap
        q = exp2(u + BIAS)
        unit_value, unit_slope = plain(log2_ratio, a, tl.constexpr(P.DIVERGENCE))
        value += fold(q * unit_value, P)
        slope += fold(q * unit_slope, P)
    return value, slope


@triton.jit
def plain_sums(rows, refs, scales, a, b, P: tl.constexpr):
    zero = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    sums = (zero, zero)
    for i in range(blocks_at_edges(rows, P)):
        sums = _plain_sums_block(rows, edge(i, rows, P), sums, refs, scales, a, b, True, P)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        sums = _plain_sums_block(rows, inside(i, rows, True, P), sums, refs, scales, a, b, False, P)
    return sum2(sums[0], sums[1])


@triton.jit
def _plain_gradient_block(
    rows, columns, gradient, refs, scales, factors, ce, a, b, EDGE: tl.constexpr, P: tl.constexpr
):
    student_ref, teacher_ref = refs
    log2_scale, log2_gap, _ = scales
    by_slope, by_q, by_other = factors
    x, y, derivative = logits(rows, columns, EDGE, P)
    u = (x - student_ref) * log2_scale
    q = exp2(u)
    if P.PLAIN == "ratio":
        log2_ratio = log_ratio(x, y, teacher_ref - student_ref) * log2_scale - log2_gap
        _, unit_slope = plain(log2_ratio, a, tl.constexpr(P.DIVERGENCE))
        g = q * (by_slope * unit_slope + by_q)
    elif P.PLAIN == "power":
        g = by_q * q + by_other * exp2(a * ((y - teacher_ref) * log2_scale) + b * u)
    elif P.DIVERGENCE == "forward_kl":
        g = by_q * q + by_other * exp2((y - teacher_ref) * log2_scale)
    else:
        g = q * (by_slope * log_ratio(x, y, teacher_ref - student_ref) + by_q)
        if P.DIVERGENCE == "symmetric_kl":
            g += by_other * exp2((y - teacher_ref) * log2_scale)
    finish(g, x, derivative, columns, rows, gradient, ce, EDGE, P)


@triton.jit
def plain_gradient(rows, gradient, refs, scales, factors, ce, a, b, P: tl.constexpr):
    REVERSE: tl.constexpr = P.PLAIN == "linear"
    for i in range(blocks_at_edges(rows, P)):
        _plain_gradient_block(rows, edge(i, rows, P), gradient, refs, scales, factors, ce, a, b, True, P)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        columns = inside(i, rows, REVERSE, P)
        _plain_gradient_block(rows, columns, gradient, refs, scales, factors, ce, a, b, False, P)
