"""The Triton row sweep: statistics -> (sums) -> gradient, one program a row, whatever the divergence.

csrc/cpu/sweep.h says what each number means. What differs here:

- Sums of exponentials stand against a reference fixed before the sweep (the largest of a few logits), not against a
  running maximum; fp32 has the range. Where it does not suffice, the row is swept again with the true maximum.
- Rows whose models are far apart take plain formulas (see _triton_divergences), which also spare a linear divergence
  the sweep for its sums; every other row takes the accurate ones.
- Sums run per lane and are added up once, at the end.
- A sweep runs backwards after one that ran forwards: the end of the row is still in the cache.
"""

import triton
import triton.language as tl

from kdkernels.backends._triton_columns import (
    CHUNK,
    Plan,
    blocks_at_edges,
    blocks_inside,
    edge,
    fill,
    finish,
    fold,
    fold_max,
    inside,
    lane_column,
    locate,
    log_ratio,
    logit_at,
    logits,
    transform,
)
from kdkernels.backends._triton_divergences import (
    accurate,
    column,
    normaliser_gap,
    plain_scales,
    student_minus_teacher,
    student_probability,
)
from kdkernels.backends._triton_math import LOG2E, exp2, fits, good, is_finite, sum2, sum4
from kdkernels.backends._triton_plain import UNBIAS, plain_gradient, plain_sums
from kdkernels.backends._triton_select import strong_columns, threshold_of

__all__ = ["Plan", "row_kernel"]

# Nats of forward KL from which a row's models are far apart; a power sum's 1 - sum, which cancels for longer, is to be
# so much.
FAR = tl.constexpr(0.25)
FAR_POWER = tl.constexpr(0.4)
POWER_REST = tl.constexpr(0.1)
# A row whose student is surer than this of one token keeps its gradient's digits in the accurate formulas only.
SURE = tl.constexpr(0.9)
# Nats of forward KL under which the log-normalisers' gap is refined: a spread of the log-ratios of 0.1.
NEAR = tl.constexpr(0.005)


@triton.jit
def sample(row, begin, end, scale, cap, KIND: tl.constexpr):
    """The largest of 128 logits from four places; 0 where it is no number."""
    top = tl.full((32,), float("-inf"), tl.float32)
    for i in tl.static_range(4):
        columns = begin + tl.minimum((end - begin) // 4 * i + tl.arange(0, 32), end - begin - 1)
        x, _ = transform(tl.load(row + columns).to(tl.float32), scale, cap, KIND)
        top = tl.maximum(top, x)
    top = tl.max(top, axis=0)
    return tl.where(is_finite(top), top, 0.0)


@triton.jit
def _maxima(rows, P: tl.constexpr):
    """The largest logit of both models; 0 where it is no number."""
    student_top = tl.full((P.BLOCK // CHUNK,), float("-inf"), tl.float32)
    teacher_top = student_top
    for i in range(tl.cdiv(rows[3], P.BLOCK)):
        x, y, _ = logits(rows, i * P.BLOCK + tl.arange(0, P.BLOCK), True, P)
        student_top = tl.maximum(student_top, fold_max(x, P))
        teacher_top = tl.maximum(teacher_top, fold_max(y, P))
    student_top = tl.max(student_top, axis=0)
    teacher_top = tl.max(teacher_top, axis=0)
    return tl.where(is_finite(student_top), student_top, 0.0), tl.where(is_finite(teacher_top), teacher_top, 0.0)


@triton.jit
def _statistics_block(rows, columns, sums, refs, log2_scale, EDGE: tl.constexpr, P: tl.constexpr):
    student_sum, teacher_sum, teacher_gap, student_gap, hard_sum, top = sums
    student_ref, teacher_ref = refs
    x, y, _ = logits(rows, columns, EDGE, P)
    u = (x - student_ref) * log2_scale
    q = exp2(u)
    p = exp2((y - teacher_ref) * log2_scale)
    gap = log_ratio(x, y, teacher_ref - student_ref)
    student_sum += fold(q, P)
    teacher_sum += fold(p, P)
    teacher_gap += fold(p * gap, P)
    if P.DIVERGENCE != "forward_kl":
        top = tl.maximum(top, fold_max(u, P))
        if P.PLAIN == "linear":
            student_gap += fold(q * gap, P)
    if P.OWN_HARD_SUM:
        hard_sum += fold(exp2((x - student_ref) * LOG2E), P)
    return student_sum, teacher_sum, teacher_gap, student_gap, hard_sum, top


@triton.jit
def _statistics(rows, refs, log2_scale, P: tl.constexpr):
    """Sums over the row against fixed references, and per lane the largest exponent of the student."""
    zero = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero + float("-inf"))
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        sums = _statistics_block(rows, inside(i, rows, False, P), sums, refs, log2_scale, False, P)
    for i in range(blocks_at_edges(rows, P)):
        sums = _statistics_block(rows, edge(i, rows, P), sums, refs, log2_scale, True, P)
    student_sum, teacher_sum, teacher_gap, student_gap, hard_sum, top = sums
    student_sum, teacher_sum, teacher_gap, student_gap = sum4(student_sum, teacher_sum, teacher_gap, student_gap)
    if P.OWN_HARD_SUM:
        hard = tl.sum(hard_sum, axis=0)
    else:
        hard = student_sum
    return student_sum, teacher_sum, teacher_gap, student_gap, hard, top


# --- Rows whose models are not far apart: the accurate formulas ---


@triton.jit
def _refinement(rows, constants, P: tl.constexpr):
    """sum q - p: by how much the teacher's log-normaliser is too large against the student's."""
    total = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    number = tl.cdiv(rows[3], P.BLOCK)
    for i in range(number):
        columns = (number - 1 - i) * P.BLOCK + tl.arange(0, P.BLOCK)
        x, y, _ = logits(rows, columns, True, P)
        total += fold(student_minus_teacher(column(x, y, constants)), P)
    return tl.sum(total, axis=0)


@triton.jit
def _pivot(rows, constants, top, a, b, P: tl.constexpr):
    """h = dD/dq at the student's most likely token; 0 where it is no number."""
    log2_scale, student_ref = constants[4], constants[0]
    largest = tl.max(top, axis=0)
    lanes = tl.arange(0, P.BLOCK // CHUNK)
    lane = tl.max(tl.where(top == largest, lanes, 0), axis=0)
    found = tl.full((32 * CHUNK,), float("-inf"), tl.float32)
    for block in range(0, tl.cdiv(rows[3], P.BLOCK), 32):
        # The columns of that lane in 32 blocks.
        j = tl.arange(0, 32 * CHUNK)
        columns = (block + j // CHUNK) * P.BLOCK + lane_column(lane, j % CHUNK, P)
        x, y, _ = logits(rows, columns, True, P)
        c = column(x, y, constants)
        _, h, _ = accurate(c, 0.0, a, b, constants, tl.constexpr(P.DIVERGENCE))
        hit = ((x - student_ref) * log2_scale > largest - 1e-3) & is_finite(h)
        found = tl.maximum(found, tl.where(hit, h, float("-inf")))
    pivot = tl.max(found, axis=0)
    return tl.where(is_finite(pivot), pivot, 0.0)


@triton.jit
def _sums_block(rows, columns, sums, constants, pivot, a, b, EDGE: tl.constexpr, P: tl.constexpr):
    value, slope = sums
    x, y, _ = logits(rows, columns, EDGE, P)
    c = column(x, y, constants)
    v, _, s = accurate(c, pivot, a, b, constants, tl.constexpr(P.DIVERGENCE))
    return value + fold(v, P), slope + fold(s, P)


@triton.jit
def _sums(rows, constants, pivot, a, b, P: tl.constexpr):
    zero = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    sums = (zero, zero)
    for i in range(blocks_at_edges(rows, P)):
        sums = _sums_block(rows, edge(i, rows, P), sums, constants, pivot, a, b, True, P)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        sums = _sums_block(rows, inside(i, rows, True, P), sums, constants, pivot, a, b, False, P)
    return sum2(sums[0], sums[1])


@triton.jit
def _gradient_block(
    rows, columns, gradient, value, constants, pivot, factors, ce, a, b, EDGE: tl.constexpr, P: tl.constexpr
):
    by_slope, by_q = factors
    x, y, derivative = logits(rows, columns, EDGE, P)
    c = column(x, y, constants)
    v, _, s = accurate(c, pivot, a, b, constants, tl.constexpr(P.DIVERGENCE))
    g = by_slope * s
    if P.DIVERGENCE == "forward_kl":
        value += fold(v, P)
        if P.LABELS:
            g += by_q * student_probability(c)
    else:
        g += by_q * student_probability(c)
    finish(g, x, derivative, columns, rows, gradient, ce, EDGE, P)
    return value


@triton.jit
def _gradient(rows, gradient, constants, pivot, factors, ce, a, b, P: tl.constexpr):
    """Writes the gradient; returns the sum of the values where that is known no sooner."""
    REVERSE: tl.constexpr = P.DIVERGENCE == "forward_kl"
    value = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    for i in range(blocks_at_edges(rows, P)):
        columns = edge(i, rows, P)
        value = _gradient_block(rows, columns, gradient, value, constants, pivot, factors, ce, a, b, True, P)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        columns = inside(i, rows, REVERSE, P)
        value = _gradient_block(rows, columns, gradient, value, constants, pivot, factors, ce, a, b, False, P)
    return tl.sum(value, axis=0)


# --- AdaptiveKL: a symmetric KL whose weight is the row's own ---


@triton.jit
def _apart_block(rows, columns, sums, threshold, constants, EDGE: tl.constexpr, P: tl.constexpr):
    in_head, in_tail = sums
    x, y, _ = logits(rows, columns, EDGE, P)
    head = strong_columns(y, columns, (threshold, 0, 0), rows, EDGE, P)
    apart = tl.abs(student_minus_teacher(column(x, y, constants)))
    return in_head + fold(tl.where(head, apart, 0.0), P), in_tail + fold(tl.where(head, 0.0, apart), P)


@triton.jit
def _adaptive_weight(rows, refs, scales, sums, mass, P: tl.constexpr):
    """The reverse KL's weight: the share of sum |p - q| that lies outside the teacher's top-p set of ``mass``."""
    log2_scale, inv_temperature = scales
    threshold = threshold_of(rows, log2_scale, mass, P)
    shift, gap, gap_rest = normaliser_gap(refs[0], refs[1], tl.log(tl.div_rn(sums[1], sums[0])), inv_temperature)
    constants = refs + (shift, inv_temperature, log2_scale, gap, gap_rest, 1.0 / sums[0], 1.0 / sums[1])
    zero = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    apart = zero, zero
    for i in range(blocks_at_edges(rows, P)):
        apart = _apart_block(rows, edge(i, rows, P), apart, threshold, constants, True, P)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        apart = _apart_block(rows, inside(i, rows, False, P), apart, threshold, constants, False, P)
    in_head, in_tail = sum2(apart[0], apart[1])
    both = in_head + in_tail
    # Never quite 1: nothing times an infinite forward KL would be NaN.
    return tl.where(both > 0, tl.minimum(in_tail / both, 1.0 - 6e-8), 0.0)


@triton.jit
def hard_gradient(rows, gradient, student_ref, by_q, ce, P: tl.constexpr):
    """The cross-entropy's gradient alone."""
    for i in range(tl.cdiv(rows[3], P.BLOCK)):
        columns = i * P.BLOCK + tl.arange(0, P.BLOCK)
        x, _, derivative = logits(rows, columns, True, P)
        g = tl.full((P.BLOCK,), 0.0, tl.float32)
        if P.LABELS and not P.OWN_HARD_SUM:
            g = by_q * exp2((x - student_ref) * LOG2E)
        finish(g, x, derivative, columns, rows, gradient, ce, True, P)


# --- A row ---


@triton.jit
def _report(row, number_of_rows, loss, stats, values):
    total, student_lse, teacher_lse, value, cross_entropy = values
    tl.store(loss + row, total)
    tl.store(stats + row, student_lse)
    tl.store(stats + row + number_of_rows, teacher_lse)
    tl.store(stats + row + 2 * number_of_rows, value)
    tl.store(stats + row + 3 * number_of_rows, cross_entropy)


@triton.jit
def divergence_factors(kd_weight, temperature, inv_temperature, scale, P: tl.constexpr):
    """What a row's divergence, its gradient, and every gradient of the row are multiplied by."""
    gradient_scale = scale if P.SCALE_GRADIENT else 1.0
    kd_factor = kd_weight
    kd = kd_weight * inv_temperature * gradient_scale
    if P.SCALE_BY_TEMPERATURE:
        kd_factor = kd_weight * temperature * temperature
        kd = kd_weight * temperature * gradient_scale
    return kd_factor, kd, gradient_scale


@triton.jit
def _divergence(rows, gradient, refs, scales, sums, top, kd, ce, a, b, by_ce, P: tl.constexpr):
    """A row's divergence; writes its gradient, scaled by kd, and the cross-entropy's. by_ce: the latter's part in q."""
    student_ref, teacher_ref = refs
    log2_scale, inv_temperature = scales
    student_sum, teacher_sum, teacher_gap, student_gap = sums
    inv_student_sum, inv_teacher_sum = 1.0 / student_sum, 1.0 / teacher_sum
    log_of_sums = tl.log(tl.div_rn(teacher_sum, student_sum))  # exactly 0 where the sums are the same
    forward = teacher_gap * inv_teacher_sum * inv_temperature - log_of_sums  # KL(p || q)
    WRITES: tl.constexpr = P.GRADIENT and P.DIVERGENCE_IN_GRADIENT

    value = forward
    is_plain = (forward < 0) & (forward > 0)  # never, as a number that the program computes
    if P.PLAIN != "none":
        is_plain = (forward >= (FAR_POWER if P.PLAIN == "power" else FAR)) & (forward < 1e5)
        is_plain = is_plain & (tl.abs(log_of_sums) <= 4.0 * forward)
        if P.DIVERGENCE != "forward_kl":
            surest = tl.exp2(tl.max(top, axis=0)) * inv_student_sum
            is_plain = is_plain & (surest <= SURE)
        plain_scale = log2_scale, log_of_sums * LOG2E, inv_temperature
        by_slope, by_q, by_other = 0.0 * forward, 0.0 * forward, 0.0 * forward
        if P.PLAIN == "linear":
            weight = 0.0 * forward
            if P.DIVERGENCE != "forward_kl":
                weight = weight + (1.0 if P.DIVERGENCE == "reverse_kl" else a)
                reverse = log_of_sums - student_gap * inv_student_sum * inv_temperature  # KL(q || p)
                is_plain = is_plain & (reverse < 1e5) & (tl.abs(log_of_sums) <= 4.0 * reverse)
                value = (1.0 - weight) * forward + weight * reverse
                by_slope = -weight * kd * inv_temperature * inv_student_sum
                by_q = kd * weight * (log_of_sums - reverse)
            by_q = (by_q + kd * (1.0 - weight) + by_ce) * inv_student_sum
            by_other = (weight - 1.0) * kd * inv_teacher_sum
        else:
            if is_plain:
                value, slope = plain_sums(rows, refs, plain_scale, a, b, P)
                if P.PLAIN == "power":
                    to_one = tl.exp(-a * tl.log(teacher_sum) - b * tl.log(student_sum))
                    rest = 1.0 - value * to_one
                    value = rest / (a * b)
                    by_q = (kd * (1.0 - rest) / a + by_ce) * inv_student_sum
                    by_other = -kd * to_one / a
                    is_plain = is_finite(rest) & (tl.abs(rest) >= POWER_REST)
                else:
                    value_scale, slope_scale = plain_scales(a, tl.constexpr(P.DIVERGENCE))
                    value = value * UNBIAS * inv_student_sum * value_scale
                    slope = slope * UNBIAS * inv_student_sum * slope_scale
                    by_slope = kd * slope_scale * inv_student_sum
                    by_q = (by_ce - kd * slope) * inv_student_sum
                    is_plain = is_finite(value) & is_finite(slope)
        if is_plain:
            if WRITES:
                plain_gradient(rows, gradient, refs, plain_scale, (by_slope, by_q, by_other), ce, a, b, P)

    if is_plain == 0:
        shift, gap, gap_rest = normaliser_gap(student_ref, teacher_ref, log_of_sums, inv_temperature)
        log_sums = tl.log(student_sum), tl.log(teacher_sum)
        normalisers = inv_student_sum, inv_teacher_sum, log_sums[0], log_sums[1]
        start = student_ref, teacher_ref, shift, inv_temperature, log2_scale, gap
        if P.GRADIENT:
            if (forward >= NEAR) == 0:  # or NaN
                gap_rest -= _refinement(rows, start + (gap_rest,) + normalisers, P)
        constants = start + (gap_rest,) + normalisers
        pivot, slope = 0.0 * log_of_sums, 0.0 * log_of_sums
        if P.DIVERGENCE != "forward_kl":
            pivot = _pivot(rows, constants, top, a, b, P)
            value, slope = _sums(rows, constants, pivot, a, b, P)
        elif not WRITES:
            value, _ = _sums(rows, constants, pivot, a, b, P)
        if WRITES:
            late_value = _gradient(rows, gradient, constants, pivot, (kd, by_ce - kd * slope), ce, a, b, P)
            if P.DIVERGENCE == "forward_kl":
                value = late_value
    return value


@triton.jit
def row_kernel(
    student,
    teacher,
    gradient,
    labels,
    row_scale,
    temperatures,
    loss,
    stats,
    number_of_rows,
    vocab_size,
    width,  # of the student's rows in memory
    misalignment,  # columns from a multiple of 16 bytes to the tensors' first
    temperature,
    kd_weight,
    ce_weight,
    a,
    b,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    n1,
    n2,
    n3,
    s0,
    s1,
    s2,
    s3,
    t0,
    t1,
    t2,
    t3,
    g0,
    g1,
    g2,
    g3,
    P: tl.constexpr,
):
    """One row; see csrc/rows.h. Sizes and strides: of the leading dimensions but the first, and of all."""
    row = tl.program_id(0).to(tl.int64)
    sizes = n1, n2, n3
    strides = (s0, s1, s2, s3), (t0, t1, t2, t3), (g0, g1, g2, g3)
    student, teacher, gradient, begin = locate(row, (student, teacher, gradient), sizes, strides, misalignment, P)
    end = begin + vocab_size
    rows = student, teacher, begin, end, student_scale, student_cap, teacher_scale, teacher_cap

    scale = tl.load(row_scale + row)
    if scale == 0.0:
        nothing = 0.0 * scale
        _report(row, number_of_rows, loss, stats, (nothing, nothing, nothing, nothing, nothing))
        if P.GRADIENT:
            fill(gradient, begin, begin + width, 0.0, P)
    else:
        if P.ROW_TEMPERATURES:
            temperature = tl.load(temperatures + row)
        inv_temperature = 1.0 / temperature
        log2_scale = inv_temperature * LOG2E
        is_good = (temperature > 0) & is_finite(temperature)
        # Before any sweep: the gradient may come to lie where this logit is.
        label, label_logit = -1, 0.0
        if P.LABELS:
            label = tl.load(labels + row)
            is_good = is_good & (label >= 0) & (label < vocab_size)
            there = tl.minimum(tl.maximum(label, 0), vocab_size - 1)
            label_logit = logit_at(student, there, begin, student_scale, student_cap, tl.constexpr(P.STUDENT_TRANSFORM))

        student_ref = sample(student, begin, end, student_scale, student_cap, tl.constexpr(P.STUDENT_TRANSFORM))
        teacher_ref = sample(teacher, begin, end, teacher_scale, teacher_cap, tl.constexpr(P.TEACHER_TRANSFORM))
        refs = student_ref, teacher_ref
        student_sum, teacher_sum, teacher_gap, student_gap, hard_sum, top = _statistics(rows, refs, log2_scale, P)
        if (fits(student_sum) & fits(teacher_sum) & fits(hard_sum)) == 0:
            student_ref, teacher_ref = _maxima(rows, P)
            refs = student_ref, teacher_ref
            student_sum, teacher_sum, teacher_gap, student_gap, hard_sum, top = _statistics(rows, refs, log2_scale, P)
        is_good = is_good & good(student_sum) & good(teacher_sum) & good(hard_sum)

        if is_good:
            kd_factor, kd, gradient_scale = divergence_factors(kd_weight, temperature, inv_temperature, scale, P)
            by_ce, by_hard, of_ce = 0.0 * scale, 0.0 * scale, 0.0 * scale
            cross_entropy = 0.0 * scale
            if P.LABELS:
                cross_entropy = tl.log(hard_sum) - (label_logit - student_ref)
                of_ce = ce_weight * gradient_scale
                if P.OWN_HARD_SUM:
                    by_hard = of_ce / hard_sum
                else:
                    by_ce = of_ce
            ce = of_ce, by_hard, student_ref, label
            sums = student_sum, teacher_sum, teacher_gap, student_gap
            scales = log2_scale, inv_temperature
            if P.STRONG == "top_p":
                a = _adaptive_weight(rows, refs, scales, sums, a, P)
            value = _divergence(rows, gradient, (student_ref, teacher_ref), scales, sums, top, kd, ce, a, b, by_ce, P)
            if P.GRADIENT and not P.DIVERGENCE_IN_GRADIENT:
                hard_gradient(rows, gradient, student_ref, by_ce / student_sum, ce, P)
            total = 0.0 * scale
            if P.DIVERGENCE_IN_GRADIENT:
                total = kd_factor * value
            if P.LABELS:
                total += ce_weight * cross_entropy
            student_lse = student_ref * inv_temperature + tl.log(student_sum)
            teacher_lse = teacher_ref * inv_temperature + tl.log(teacher_sum)
            _report(row, number_of_rows, loss, stats, (scale * total, student_lse, teacher_lse, value, cross_entropy))
            if P.GRADIENT:
                fill(gradient, end, begin + width, 0.0, P)
        else:
            nan = float("nan") + scale
            _report(row, number_of_rows, loss, stats, (nan, nan, nan, nan, nan))
            if P.GRADIENT:
                fill(gradient, begin, begin + width, float("nan"), P)
