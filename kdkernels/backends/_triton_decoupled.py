"""The Triton kernel of the decoupled divergences: selection -> statistics -> (refinement) -> gradient.

bcd·BCD + w_S·SCD + w_W·WCD over a set S of the row's columns and the rest W (kdkernels.divergences.Decoupled), one
program a row. Every sum is kept for each set by itself, against references of its own where the sets lie far apart, so
that a set with next to no mass has the digits of any other. The two sets meet in one number alone, the log-odds' gap

    lambda = log(P_S/P_W) - log(Q_S/Q_W),

from which D = Q_S - P_S, log(P_S/Q_S) and log(P_W/Q_W) follow without cancellation. Plain and accurate formulas:
see _triton_rows.
"""

import triton
import triton.language as tl

from kdkernels.backends._triton_columns import (
    CHUNK,
    blocks_at_edges,
    blocks_inside,
    edge,
    fill,
    finish,
    fold,
    fold_max,
    inside,
    locate,
    log_ratio,
    logit_at,
    logits,
    row_offset,
)
from kdkernels.backends._triton_divergences import (
    accurate,
    column,
    normaliser_gap,
    student_minus_teacher,
    student_probability,
)
from kdkernels.backends._triton_math import (
    LOG2E,
    exp2,
    fits,
    good,
    is_finite,
    sum2,
    sum4,
)
from kdkernels.backends._triton_rows import NEAR, divergence_factors, hard_gradient, sample
from kdkernels.backends._triton_select import strong_columns, threshold_of
from kdkernels.backends._triton_terms import binary_term, inside_term, inverse, log_of_sums_of, masses, weighted

# Nats of a set's own divergence from which its distributions are far apart: q̃ - p̃ then loses two digits at most.
FAR_INSIDE = tl.constexpr(0.125)
# A log-odds' gap so large needs no refinement for D; or one whose D is so much smaller than what else there is.
FAR_ODDS = tl.constexpr(0.125)
LIGHT = tl.constexpr(1 / 32)


@triton.jit
def _either(strong, both):
    """Per column, the number of its set."""
    return tl.where(strong, both[0], both[1])


# --- Statistics: sums of S and of W ---


@triton.jit
def _statistics_block(rows, columns, sums, choice, refs, log2_scale, EDGE: tl.constexpr, P: tl.constexpr):
    student_s, teacher_s, gap_s, student_w, teacher_w, gap_w, hard_sum = sums
    student_refs, teacher_refs, hard_ref = refs
    x, y, _ = logits(rows, columns, EDGE, P)
    strong = strong_columns(y, columns, choice, rows, EDGE, P)
    if P.OWN_HARD_SUM:
        hard_sum += fold(exp2((x - hard_ref) * LOG2E), P)
    if P.STRONG == "label":  # one column: S needs no sweep
        x = tl.where(strong, float("-inf"), x)
        y = tl.where(strong, float("-inf"), y)
        student_ref, teacher_ref = student_refs[1], teacher_refs[1]
    else:
        student_ref, teacher_ref = _either(strong, student_refs), _either(strong, teacher_refs)
    q = exp2((x - student_ref) * log2_scale)
    p = exp2((y - teacher_ref) * log2_scale)
    gap = p * log_ratio(x, y, teacher_ref - student_ref)
    if P.STRONG == "label":
        student_w += fold(q, P)
        teacher_w += fold(p, P)
        gap_w += fold(gap, P)
    else:
        student_s += fold(tl.where(strong, q, 0.0), P)
        teacher_s += fold(tl.where(strong, p, 0.0), P)
        gap_s += fold(tl.where(strong, gap, 0.0), P)
        student_w += fold(tl.where(strong, 0.0, q), P)
        teacher_w += fold(tl.where(strong, 0.0, p), P)
        gap_w += fold(tl.where(strong, 0.0, gap), P)
    return student_s, teacher_s, gap_s, student_w, teacher_w, gap_w, hard_sum


@triton.jit
def _statistics(rows, choice, refs, log2_scale, P: tl.constexpr):
    """Per set, the sums of q, p and p·log-ratio against its references; and the sum of the student at temperature 1."""
    zero = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        sums = _statistics_block(rows, inside(i, rows, False, P), sums, choice, refs, log2_scale, False, P)
    for i in range(blocks_at_edges(rows, P)):
        sums = _statistics_block(rows, edge(i, rows, P), sums, choice, refs, log2_scale, True, P)
    student_s, teacher_s, gap_s, student_w, teacher_w, gap_w, hard_sum = sums
    student_w, teacher_w, gap_w, hard_sum = sum4(student_w, teacher_w, gap_w, hard_sum)
    if P.STRONG == "label":
        # Put in by the kernel: it has the label's logits.
        strong_sums = 1.0 + 0.0 * student_w, 1.0 + 0.0 * student_w, 0.0 * student_w
    else:
        strong_sums = sum4(student_s, teacher_s, gap_s, zero)[:3]
    students = strong_sums[0], student_w
    teachers = strong_sums[1], teacher_w
    gaps = strong_sums[2], gap_w
    return students, teachers, gaps, hard_sum


@triton.jit
def _of_label(logit):
    """The sum of a label alone, against its own logit; NaN where that is no number."""
    return tl.where(is_finite(logit), 1.0, tl.where(logit == float("-inf"), 0.0, float("nan")))


@triton.jit
def _maximum(top):
    top = tl.max(top, axis=0)
    return tl.where(is_finite(top), top, 0.0)


@triton.jit
def _references(rows, choice, P: tl.constexpr):
    """Each set's largest logit of both models, and the larger of the student's; 0 where it is no number."""
    none = tl.full((P.BLOCK // CHUNK,), float("-inf"), tl.float32)
    student_s, student_w, teacher_s, teacher_w = none, none, none, none
    for i in range(tl.cdiv(rows[3], P.BLOCK)):
        columns = i * P.BLOCK + tl.arange(0, P.BLOCK)
        x, y, _ = logits(rows, columns, True, P)
        strong = strong_columns(y, columns, choice, rows, True, P)
        student_s = tl.maximum(student_s, fold_max(tl.where(strong, x, float("-inf")), P))
        student_w = tl.maximum(student_w, fold_max(tl.where(strong, float("-inf"), x), P))
        teacher_s = tl.maximum(teacher_s, fold_max(tl.where(strong, y, float("-inf")), P))
        teacher_w = tl.maximum(teacher_w, fold_max(tl.where(strong, float("-inf"), y), P))
    students = _maximum(student_s), _maximum(student_w)
    return students, (_maximum(teacher_s), _maximum(teacher_w)), _maximum(tl.maximum(student_s, student_w))


# --- Sets whose models are far apart: alpha·q - beta·p ---


@triton.jit
def _plain_block(
    rows, columns, gradient, choice, refs, log2_scale, by_student, by_teacher, ce, EDGE: tl.constexpr, P: tl.constexpr
):
    student_refs, teacher_refs, _ = refs
    x, y, derivative = logits(rows, columns, EDGE, P)
    strong = strong_columns(y, columns, choice, rows, EDGE, P)
    if P.STRONG == "label":
        q = exp2((x - student_refs[1]) * log2_scale)
        p = exp2((y - teacher_refs[1]) * log2_scale)
        g = tl.where(strong, by_student[0], by_student[1] * q - by_teacher[1] * p)
    else:
        q = exp2((x - _either(strong, student_refs)) * log2_scale)
        p = exp2((y - _either(strong, teacher_refs)) * log2_scale)
        g = _either(strong, by_student) * q - _either(strong, by_teacher) * p
    finish(g, x, derivative, columns, rows, gradient, ce, EDGE, P)


@triton.jit
def _plain_gradient(rows, gradient, choice, refs, log2_scale, by_student, by_teacher, ce, P: tl.constexpr):
    for i in range(blocks_at_edges(rows, P)):
        columns = edge(i, rows, P)
        _plain_block(rows, columns, gradient, choice, refs, log2_scale, by_student, by_teacher, ce, True, P)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        columns = inside(i, rows, True, P)
        _plain_block(rows, columns, gradient, choice, refs, log2_scale, by_student, by_teacher, ce, False, P)


# --- Sets whose models are not: the accurate formulas of forward KL, inside each set ---


@triton.jit
def _constants(student_sum, teacher_sum, student_ref, teacher_ref, log_of_sums, inv_temperature, log2_scale):
    """What :func:`column` wants to know of a set, but for the inexact part of its log-normalisers' gap."""
    # A set that one model gives no mass has no gap.
    log_of_sums = tl.where(is_finite(log_of_sums), log_of_sums, 0.0)
    shift, gap, gap_rest = normaliser_gap(student_ref, teacher_ref, log_of_sums, inv_temperature)
    start = student_ref, teacher_ref, shift, inv_temperature, log2_scale, gap
    return start, gap_rest, (inverse(student_sum), inverse(teacher_sum))


@triton.jit
def _column(x, y, strong, constants):
    """:func:`column` inside each column's own set."""
    start_s, start_w, rests, inverses_s, inverses_w = constants
    row = (
        tl.where(strong, start_s[0], start_w[0]),
        tl.where(strong, start_s[1], start_w[1]),
        tl.where(strong, start_s[2], start_w[2]),
        start_s[3],
        start_s[4],
        tl.where(strong, start_s[5], start_w[5]),
        _either(strong, rests),
        tl.where(strong, inverses_s[0], inverses_w[0]),
        tl.where(strong, inverses_s[1], inverses_w[1]),
    )
    return column(x, y, row)


@triton.jit
def _refinement(rows, choice, constants, P: tl.constexpr):
    """Sums of q̃ - p̃ over S and over W: by how much a set's teacher's log-normaliser is too large."""
    zero = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    in_s, in_w = zero, zero
    number = tl.cdiv(rows[3], P.BLOCK)
    for i in range(number):
        columns = (number - 1 - i) * P.BLOCK + tl.arange(0, P.BLOCK)
        x, y, _ = logits(rows, columns, True, P)
        strong = strong_columns(y, columns, choice, rows, True, P)
        difference = student_minus_teacher(_column(x, y, strong, constants))
        in_s += fold(tl.where(strong, difference, 0.0), P)
        in_w += fold(tl.where(strong, 0.0, difference), P)
    return sum2(in_s, in_w)


@triton.jit
def _accurate_block(
    rows,
    columns,
    gradient,
    values,
    choice,
    constants,
    factors,
    ce,
    WRITES: tl.constexpr,
    EDGE: tl.constexpr,
    P: tl.constexpr,
):
    by_difference, by_student = factors
    x, y, derivative = logits(rows, columns, EDGE, P)
    strong = strong_columns(y, columns, choice, rows, EDGE, P)
    c = _column(x, y, strong, constants)
    value, _, difference = accurate(c, 0.0, 0.0, 0.0, 0.0, tl.constexpr("forward_kl"))
    if WRITES:
        g = _either(strong, by_difference) * difference + _either(strong, by_student) * student_probability(c)
        finish(g, x, derivative, columns, rows, gradient, ce, EDGE, P)
    in_s = values[0] + fold(tl.where(strong, value, 0.0), P)
    in_w = values[1] + fold(tl.where(strong, 0.0, value), P)
    return in_s, in_w


@triton.jit
def _accurate_sweep(rows, gradient, choice, constants, factors, ce, WRITES: tl.constexpr, P: tl.constexpr):
    """KL(p̃‖q̃) inside S and inside W; writes the gradient."""
    zero = tl.zeros((P.BLOCK // CHUNK,), tl.float32)
    values = (zero, zero)
    for i in range(blocks_at_edges(rows, P)):
        columns = edge(i, rows, P)
        values = _accurate_block(rows, columns, gradient, values, choice, constants, factors, ce, WRITES, True, P)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES):
        columns = inside(i, rows, True, P)
        values = _accurate_block(rows, columns, gradient, values, choice, constants, factors, ce, WRITES, False, P)
    return sum2(values[0], values[1])


# --- A row ---


@triton.jit
def _far_inside(weight, value, log_of_sums):
    is_far = (value >= FAR_INSIDE) & (value < 1e5) & (tl.abs(log_of_sums) <= 4.0 * value)
    return is_far | (weight == 0)


@triton.jit
def _divergence(
    rows, gradient, choice, refs, scales, students, teachers, gaps, q, p, log_q, log_p, weights, kd, by_ce, ce,
    P: tl.constexpr,
):  # fmt: skip
    """A row's divergence, BCD, SCD and WCD; writes its gradient, scaled by kd, and the cross-entropy's.

    weights: bcd, scd, wcd without the sets' masses. by_ce: the cross-entropy's part in q.
    """
    log2_scale, inv_temperature = scales
    student_refs, teacher_refs, _ = refs
    bcd_weight, s_weight, w_weight = weights
    WRITES: tl.constexpr = P.GRADIENT and P.DIVERGENCE_IN_GRADIENT
    log_s = log_of_sums_of(students[0], teachers[0])
    log_w = log_of_sums_of(students[1], teachers[1])
    origins = (teacher_refs[0] - student_refs[0]) - (teacher_refs[1] - student_refs[1])
    two_sets = (students[0] + teachers[0] > 0) & (students[1] + teachers[1] > 0)
    odds_gap = tl.where(two_sets, origins * inv_temperature + (log_s - log_w), 0.0)
    bcd, difference = binary_term(odds_gap, p, q, log_p, log_q)
    scd = inside_term(students[0], teachers[0], gaps[0] * inverse(teachers[0]) * inv_temperature - log_s)
    wcd = inside_term(students[1], teachers[1], gaps[1] * inverse(teachers[1]) * inv_temperature - log_w)
    # A set without a divergence of its own has no gradient from it.
    s_weight = tl.where(teachers[0] > 0, s_weight, 0.0)
    w_weight = tl.where(teachers[1] > 0, w_weight, 0.0)
    if P.STRONG == "label":
        s_weight = tl.where(students[0] > 0, 0.0, s_weight)

    of_pair = kd * bcd_weight * difference
    is_plain = (bcd < 0) & (bcd > 0)  # never, as a number that the program computes
    if P.PLAIN != "none":
        insides = weighted(s_weight, scd) + weighted(w_weight, wcd)
        is_plain = _far_inside(w_weight, wcd, log_w)
        if P.STRONG != "label":
            is_plain = is_plain & _far_inside(s_weight, scd, log_s)
        lighter = tl.minimum(p[0] + q[0], p[1] + q[1])
        is_plain = is_plain & (
            (tl.abs(odds_gap) >= FAR_ODDS) | (bcd_weight * lighter <= insides * LIGHT) | (bcd_weight == 0)
        )
        if is_plain:
            if WRITES:
                by_q_s = (of_pair + kd * s_weight + by_ce * q[0]) * inverse(students[0])
                by_q_w = (kd * w_weight - of_pair + by_ce * q[1]) * inverse(students[1])
                by_p_s = kd * s_weight * inverse(teachers[0])
                by_p_w = kd * w_weight * inverse(teachers[1])
                _plain_gradient(rows, gradient, choice, refs, log2_scale, (by_q_s, by_q_w), (by_p_s, by_p_w), ce, P)

    if is_plain == 0:
        start_s, rest_s, inverses_s = _constants(
            students[0], teachers[0], student_refs[0], teacher_refs[0], log_s, inv_temperature, log2_scale
        )
        start_w, rest_w, inverses_w = _constants(
            students[1], teachers[1], student_refs[1], teacher_refs[1], log_w, inv_temperature, log2_scale
        )
        is_near = (bcd_weight != 0) & (tl.abs(odds_gap) < FAR_ODDS) & two_sets
        is_near = is_near | ((s_weight != 0) & (scd < NEAR)) | ((w_weight != 0) & (wcd < NEAR))
        if is_near:
            over_s, over_w = _refinement(rows, choice, (start_s, start_w, (rest_s, rest_w), inverses_s, inverses_w), P)
            # Only a set with mass on both sides has a gap to refine.
            over_s = tl.where((students[0] > 0) & (teachers[0] > 0), over_s, 0.0)
            over_w = tl.where((students[1] > 0) & (teachers[1] > 0), over_w, 0.0)
            rest_s -= over_s
            rest_w -= over_w
            bcd, difference = binary_term(odds_gap - (over_s - over_w), p, q, log_p, log_q)
            of_pair = kd * bcd_weight * difference
        constants = start_s, start_w, (rest_s, rest_w), inverses_s, inverses_w
        factors = (kd * s_weight, kd * w_weight), (of_pair + by_ce * q[0], by_ce * q[1] - of_pair)
        value_s, value_w = _accurate_sweep(rows, gradient, choice, constants, factors, ce, WRITES, P)
        wcd = inside_term(students[1], teachers[1], value_w)
        if P.STRONG != "label":
            scd = inside_term(students[0], teachers[0], value_s)
    value = weighted(bcd_weight, bcd) + weighted(s_weight, scd) + weighted(w_weight, wcd)
    return value, bcd, scd, wcd


@triton.jit
def _report(row, number_of_rows, loss, stats, values):
    tl.store(loss + row, values[0])
    for i in tl.static_range(9):
        tl.store(stats + row + i * number_of_rows, values[i + 1])


@triton.jit
def _report_one(row, number_of_rows, loss, stats, value):
    tl.store(loss + row, value)
    for i in tl.static_range(9):
        tl.store(stats + row + i * number_of_rows, value)


@triton.jit
def decoupled_kernel(
    student,
    teacher,
    gradient,
    labels,
    row_scale,
    temperatures,
    term_weights,
    mask,
    loss,
    stats,
    number_of_rows,
    vocab_size,
    width,  # of the student's rows in memory
    misalignment,  # columns from a multiple of 16 bytes to the tensors' first
    temperature,
    kd_weight,
    ce_weight,
    bcd_weight,
    scd_weight,
    wcd_weight,
    mass_weighted,  # 1.0 or 0.0
    strong_amount,
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
    m0,
    m1,
    m2,
    m3,
    P: tl.constexpr,
):
    """One row; see csrc/rows.h. Sizes and strides: of the leading dimensions but the first, and of all."""
    row = tl.program_id(0).to(tl.int64)
    sizes = n1, n2, n3
    strides = (s0, s1, s2, s3), (t0, t1, t2, t3), (g0, g1, g2, g3)
    student, teacher, gradient, begin = locate(row, (student, teacher, gradient), sizes, strides, misalignment, P)
    end = begin + vocab_size
    rows = student, teacher, begin, end, student_scale, student_cap, teacher_scale, teacher_cap
    if P.STRONG == "given":
        mask += row_offset(row, sizes, (m0, m1, m2, m3), tl.constexpr(P.DIMS))

    scale = tl.load(row_scale + row)
    nothing = 0.0 * scale
    if scale == 0.0:
        _report_one(row, number_of_rows, loss, stats, nothing)
        if P.GRADIENT:
            fill(gradient, begin, begin + width, 0.0, P)
    else:
        if P.ROW_TEMPERATURES:
            temperature = tl.load(temperatures + row)
        inv_temperature = 1.0 / temperature
        log2_scale = inv_temperature * LOG2E
        is_good = (temperature > 0) & is_finite(temperature)
        # Before any sweep: the gradient may come to lie where this logit is.
        label, student_label, teacher_label = -1, nothing, nothing
        if P.LABELS or P.STRONG == "label":
            label = tl.load(labels + row)
            is_good = is_good & (label >= 0) & (label < vocab_size)
            there = tl.minimum(tl.maximum(label, 0), vocab_size - 1)
            student_label = logit_at(
                student, there, begin, student_scale, student_cap, tl.constexpr(P.STUDENT_TRANSFORM)
            )
            teacher_label = logit_at(
                teacher, there, begin, teacher_scale, teacher_cap, tl.constexpr(P.TEACHER_TRANSFORM)
            )
        threshold = nothing
        if P.STRONG == "top_k" or P.STRONG == "top_p":
            threshold = threshold_of(rows, log2_scale, strong_amount, P)
        choice = threshold, label, mask

        student_ref = sample(student, begin, end, student_scale, student_cap, tl.constexpr(P.STUDENT_TRANSFORM))
        teacher_ref = sample(teacher, begin, end, teacher_scale, teacher_cap, tl.constexpr(P.TEACHER_TRANSFORM))
        student_s_ref, teacher_s_ref = student_ref, teacher_ref
        if P.STRONG == "label":
            student_s_ref = tl.where(is_finite(student_label), student_label, 0.0)
            teacher_s_ref = tl.where(is_finite(teacher_label), teacher_label, 0.0)
        refs = (student_s_ref, student_ref), (teacher_s_ref, teacher_ref), student_ref
        students, teachers, gaps, hard_sum = _statistics(rows, choice, refs, log2_scale, P)
        stand = fits(students[0]) & fits(students[1]) & fits(teachers[0]) & fits(teachers[1])
        if P.OWN_HARD_SUM:
            stand = stand & fits(hard_sum)
        if stand == 0:
            refs = _references(rows, choice, P)
            students, teachers, gaps, hard_sum = _statistics(rows, choice, refs, log2_scale, P)
        if P.STRONG == "label":
            students = _of_label(student_label), students[1]
            teachers = _of_label(teacher_label), teachers[1]
        q, log_q, student_ref, student_sum = masses(students, refs[0], inv_temperature)
        p, log_p, teacher_ref, teacher_sum = masses(teachers, refs[1], inv_temperature)
        hard_ref = refs[2]
        if not P.OWN_HARD_SUM:
            hard_sum, hard_ref = student_sum, student_ref
        is_good = is_good & good(student_sum) & good(teacher_sum) & good(hard_sum)

        if is_good:
            kd_factor, kd, gradient_scale = divergence_factors(kd_weight, temperature, inv_temperature, scale, P)
            by_ce, by_hard, of_ce, cross_entropy = nothing, nothing, nothing, nothing
            if P.LABELS:
                cross_entropy = tl.log(hard_sum) - (student_label - hard_ref)
                of_ce = ce_weight * gradient_scale
                if P.OWN_HARD_SUM:
                    by_hard = of_ce / hard_sum
                else:
                    by_ce = of_ce
            ce = of_ce, by_hard, hard_ref, label
            if P.TERM_WEIGHTS:
                bcd_weight = tl.load(term_weights)
                scd_weight = tl.load(term_weights + 1)
                wcd_weight = tl.load(term_weights + 2)
            s_weight = tl.where(mass_weighted != 0, scd_weight * p[0], scd_weight)
            w_weight = tl.where(mass_weighted != 0, wcd_weight * p[1], wcd_weight)
            scales = log2_scale, inv_temperature
            weights = bcd_weight, s_weight, w_weight
            value, bcd, scd, wcd = _divergence(
                rows, gradient, choice, refs, scales, students, teachers, gaps, q, p, log_q, log_p, weights, kd, by_ce,
                ce, P,
            )  # fmt: skip
            if P.GRADIENT and not P.DIVERGENCE_IN_GRADIENT:
                hard_gradient(rows, gradient, student_ref, by_ce / student_sum, ce, P)
            total = nothing
            if P.DIVERGENCE_IN_GRADIENT:
                total = kd_factor * value
            if P.LABELS:
                total += ce_weight * cross_entropy
            student_lse = student_ref * inv_temperature + tl.log(student_sum)
            teacher_lse = teacher_ref * inv_temperature + tl.log(teacher_sum)
            values = scale * total, student_lse, teacher_lse, value, cross_entropy, bcd, scd, wcd, p[0], q[0]
            _report(row, number_of_rows, loss, stats, values)
            if P.GRADIENT:
                fill(gradient, end, begin + width, 0.0, P)
        else:
            nan = float("nan") + scale
            _report_one(row, number_of_rows, loss, stats, nan)
            if P.GRADIENT:
                fill(gradient, begin, begin + width, float("nan"), P)
