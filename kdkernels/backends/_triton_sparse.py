"""The Triton kernel of sparse teachers: the given ids -> statistics of all other columns -> gradient.

S are a row's given ids, W is the rest of the vocabulary (kdkernels.TopKTeacher). What S contributes comes from a gather
of the student's logits at the ids, by the accurate formulas; of W no more is needed than the sum of the student's
exponentials, which is a sum over W's columns alone and never a difference. Which columns those are is told by marks, a
bit a column, in memory that each program has for itself and for one row at a time. A lane's columns are one byte of it.

The gradient sweep writes every column as one of W; the columns of S are written over it afterwards.
"""

import triton
import triton.language as tl

from kdkernels.backends._triton_columns import (
    CHUNK,
    blocks_at_edges,
    blocks_inside,
    edge,
    edge_from,
    fill,
    finish,
    fold,
    fold_max,
    inside,
    inside_from,
    locate,
    logit_at,
    student_logits,
    transform,
)
from kdkernels.backends._triton_divergences import (
    accurate,
    column,
    student_minus_teacher,
    student_probability,
)
from kdkernels.backends._triton_math import LOG2E, exp2, fits, good, is_finite, log1p_and_chi, max2, sum2, two_sum
from kdkernels.backends._triton_rows import divergence_factors, sample
from kdkernels.backends._triton_terms import binary_term, inside_term, inverse, log_of_sums_of, masses, weighted

LEAST_MASS = tl.constexpr(1e-7)  # kdkernels.reference.LEAST_MASS
NUMBERS: tl.constexpr = tl.constexpr(7)  # statistics of a row


# --- S: which columns ---


@triton.jit
def _first_places(ids, tokens, named, places, number_of_ids):
    """``named`` less the places of tokens that an earlier place has named."""
    for i in range(number_of_ids - 1):
        named = named & ((tokens != tl.load(ids + i)) | (places <= i))
    return named


@triton.jit
def _mark(words, columns, named):
    """Sets the bits of columns; returns which of them found their bit unset: of equal columns, any one."""
    bits = 1 << (columns & 31)
    before = tl.atomic_or(words + (columns >> 5), bits, mask=named, sem="relaxed")
    return named & ((before & bits) == 0)


@triton.jit
def _marked(columns, start, marks, P: tl.constexpr):
    """Which columns of the block that begins at ``start`` are marked."""
    # Past the first cache, which atomic operations do not write to.
    if P.ALIGNMENT == "none":
        bits = tl.load(marks + columns // CHUNK, cache_modifier=".cg").to(tl.int32) >> (columns % CHUNK)
    else:
        # No plain range: of that, Triton would give a thread neighbouring bytes, not those of its own columns.
        firsts = tl.arange(0, P.BLOCK // P.LANE) * P.LANE
        lanes = tl.load(marks + start // CHUNK + firsts // CHUNK, cache_modifier=".cg").to(tl.int32) >> (firsts % CHUNK)
        bits = tl.reshape(lanes[:, None] >> tl.arange(0, P.LANE)[None, :], (P.BLOCK,))
    return (bits & 1) != 0


# --- S: the divergence inside it ---


@triton.jit
def _reference(top):
    return tl.where(is_finite(top), top, 0.0)


@triton.jit
def _inside(x, y, log2_scale, inv_temperature, a, P: tl.constexpr):
    """The divergence between the distributions that logits (-inf: no token) x of the student and y of the teacher give.

    Returns both models' sums of exponentials, references and largest logits, the divergence, and per token its slope
    less its part in their sum, and q̃.
    """
    tops = max2(x, y)
    refs = _reference(tops[0]), _reference(tops[1])
    x, x_rest = two_sum(x, -refs[0])
    y, y_rest = two_sum(y, -refs[1])
    # Where the models nearly agree: a likely token's log-probability has digits that a logit has not.
    rest = tl.where(is_finite(x) & is_finite(y), (x_rest - y_rest) * inv_temperature, 0.0)
    student_sum, teacher_sum = sum2(exp2(x * log2_scale), exp2(y * log2_scale))
    gap = log_of_sums_of(student_sum, teacher_sum)
    gap = tl.where(is_finite(gap), gap, 0.0)
    nothing = 0.0 * log2_scale
    start = nothing, nothing, nothing, inv_temperature, log2_scale, gap
    inverses = inverse(student_sum), inverse(teacher_sum)
    # By how much the teacher's log-normaliser is too large: what matters is that where the models nearly agree.
    over = tl.sum(student_minus_teacher(column(x, y, start + (rest,) + inverses)), axis=0)
    rest -= tl.where((student_sum > 0) & (teacher_sum > 0), over, 0.0)
    constants = start + (rest,) + inverses
    c = column(x, y, constants)
    D: tl.constexpr = P.DIVERGENCE
    pivot = 0.0 * log2_scale
    if D != "forward_kl":
        _, h, _ = accurate(c, 0.0, a, 0.0, constants, D)
        pivot = _reference(tl.max(tl.where((x == 0.0) & is_finite(h), h, float("-inf")), axis=0))
    value, _, slope = accurate(c, pivot, a, 0.0, constants, D)
    q = student_probability(c)
    value, slope_sum = sum2(value, slope)
    if D != "forward_kl":  # whose slopes add up to 0
        slope -= q * slope_sum
    value = inside_term(student_sum, teacher_sum, value)
    return (student_sum, teacher_sum), refs, tops, value, slope, q


# --- W: statistics and gradient ---


@triton.jit
def _statistics_block(rows, columns, start, marks, sums, refs, log2_scale, EDGE: tl.constexpr, P: tl.constexpr):
    total, hard_sum, top = sums
    ref, hard_ref = refs
    x, _ = student_logits(rows, columns, EDGE, P, "evict_last")  # to be read again
    if P.OWN_HARD_SUM:
        hard_sum += fold(exp2((x - hard_ref) * LOG2E), P)
    x = tl.where(_marked(columns, start, marks, P), float("-inf"), x)
    return total + fold(exp2((x - ref) * log2_scale), P), hard_sum, tl.maximum(top, fold_max(x, P))


@triton.jit
def _statistics(rows, marks, refs, log2_scale, P: tl.constexpr):
    """The sum over W, the sum of the whole row at temperature 1, and the largest logit in W."""
    zero = tl.full((P.BLOCK // P.LANE,), 0.0, tl.float32)
    sums = zero, zero, zero + float("-inf")
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES, loop_unroll_factor=P.UNROLL):
        start = inside_from(i, rows, False, P)
        sums = _statistics_block(rows, inside(i, rows, False, P), start, marks, sums, refs, log2_scale, False, P)
    for i in range(blocks_at_edges(rows, P)):
        start = edge_from(i, rows, P)
        sums = _statistics_block(rows, edge(i, rows, P), start, marks, sums, refs, log2_scale, True, P)
    total, hard_sum = sum2(sums[0], sums[1])
    return total, hard_sum, tl.max(sums[2], axis=0)


@triton.jit
def _gradient_block(rows, columns, gradient, ref, log2_scale, by_student, ce, EDGE: tl.constexpr, P: tl.constexpr):
    x, derivative = student_logits(rows, columns, EDGE, P, "evict_first")
    g = by_student * exp2((x - ref) * log2_scale)
    finish(g, x, derivative, columns, rows, gradient, ce, EDGE, P)


@triton.jit
def _gradient(rows, gradient, ref, log2_scale, by_student, ce, P: tl.constexpr):
    """Writes every column's gradient as if it were one of W."""
    for i in range(blocks_at_edges(rows, P)):
        _gradient_block(rows, edge(i, rows, P), gradient, ref, log2_scale, by_student, ce, True, P)
    for i in tl.range(0, blocks_inside(rows, P), num_stages=P.STAGES, loop_unroll_factor=P.UNROLL):
        _gradient_block(rows, inside(i, rows, True, P), gradient, ref, log2_scale, by_student, ce, False, P)


# --- S and W together ---


@triton.jit
def _bucket(inside, given, odds, q, log_q):
    """Loss, P_S and Q_S - P_S, W being one more token of the mass that S lacks; ``given``: P_S in fp64."""
    is_full = 1.0 - given < LEAST_MASS
    weak = tl.where(is_full, LEAST_MASS, 1.0 - given).to(tl.float32)
    strong = tl.where(is_full, 1.0 - LEAST_MASS, given).to(tl.float32)
    near, _ = log1p_and_chi(-tl.minimum(weak, 0.5))
    log_p = tl.where(weak < 0.5, near, tl.log(strong)), tl.log(weak)
    gap = (log_p[0] - log_p[1]) - odds
    gap = tl.where(gap == gap, gap, 0.0)  # one set has no mass under either model
    bcd, moved = binary_term(gap, (strong, weak), q, log_p, log_q)
    return bcd + weighted(strong, inside), strong, moved


@triton.jit
def _loss(inside, given, teacher_sum, teacher_lse, odds, q, log_q, is_split, P: tl.constexpr):
    """A row's divergence; what the slopes inside S, and what q̃ of S and -q̃ of W are multiplied by in its gradient.

    odds: of the student's masses of S and W, their logarithm. is_split: neither set is without tokens.
    """
    one = tl.where(teacher_sum > 0, 1.0, 0.0)
    near, _ = log1p_and_chi(-tl.minimum(q[1], 0.5))
    log_q = tl.where(q[1] < 0.5, near, log_q[0]), log_q[1]
    if P.TAIL == "bucket":
        value, share, moved = _bucket(inside, given, odds, q, log_q)
        # One set alone: no token stands for the other. Without ids, and so without mass, nothing is left.
        value = tl.where(is_split, value, inside)
        share = tl.where(is_split, share, one)
        moved = tl.where(is_split, moved, 0.0)
    elif P.TAIL == "renormalize":
        value, share, moved = inside, one, 0.0 * one
    elif P.TAIL == "teacher":
        value, share, moved = weighted(one, inside - log_q[0]), one, -one * q[1]
    else:
        tl.static_assert(P.TAIL == "drop")
        share = one * given
        value, moved = weighted(share, inside + teacher_lse - log_q[0]), -share * q[1]
    return value, share, moved


# --- A row ---


@triton.jit
def _report(row, number_of_rows, loss, stats, values):
    tl.store(loss + row, values[0])
    for i in tl.static_range(NUMBERS):
        tl.store(stats + row + i * number_of_rows, values[i + 1])


@triton.jit
def _report_one(row, number_of_rows, loss, stats, value):
    tl.store(loss + row, value)
    for i in tl.static_range(NUMBERS):
        tl.store(stats + row + i * number_of_rows, value)


@triton.jit
def _row(
    row, pointers, memory, results, sizes, strides, number_of_rows, number_of_ids, vocab_size, width, misalignment,
    temperature, weights, a, transforms, scale, P: tl.constexpr,
):  # fmt: skip
    """A row that counts."""
    student, gradient, logprobs, ids, labels, temperatures = pointers
    words, marks = memory
    loss, stats = results
    kd_weight, ce_weight = weights
    student_scale, student_cap, teacher_scale = transforms
    of_student, of_gradient = strides
    student, _, gradient, begin = locate(
        row, (student, student, gradient), sizes, (of_student, of_student, of_gradient), misalignment, P
    )
    end = begin + vocab_size
    rows = student, student, begin, end, student_scale, student_cap
    nothing = 0.0 * scale
    ids += row * number_of_ids
    logprobs += row * number_of_ids

    places = tl.arange(0, P.IDS)
    tokens = tl.load(ids + places, mask=places < number_of_ids, other=-1)
    logprob = tl.load(logprobs + places, mask=places < number_of_ids, other=0.0).to(tl.float32)
    if P.ROW_TEMPERATURES:
        temperature = tl.load(temperatures + row)
    inv_temperature = 1.0 / temperature
    log2_scale = inv_temperature * LOG2E
    is_good = (temperature > 0) & is_finite(temperature)
    # Before any sweep: the gradient may come to lie where these logits are.
    label, label_logit = -1, nothing
    if P.LABELS:
        label = tl.load(labels + row)
        is_good = is_good & (label >= 0) & (label < vocab_size)
        label = tl.minimum(tl.maximum(label, 0), vocab_size - 1).to(tl.int32)
        label_logit = logit_at(student, label, begin, student_scale, student_cap, tl.constexpr(P.STUDENT_TRANSFORM))
    named = (tokens >= 0) & (tokens < vocab_size)
    columns = begin + tl.where(named, tokens, 0).to(tl.int32)
    x = tl.load(student + columns, mask=named, other=0.0).to(tl.float32)
    x, derivative = transform(x, student_scale, student_cap, tl.constexpr(P.STUDENT_TRANSFORM))

    tl.debug_barrier()  # the marks of the row before are gone
    first = _mark(words, columns, named)
    tl.debug_barrier()
    # Both numbers in one sum: they are 4096 at most.
    counts = tl.sum(tl.where(named, 1, 0) + tl.where(first, 1 << 16, 0), axis=0)
    distinct = counts >> 16
    is_good = is_good & (tl.max(tl.where(tokens >= vocab_size, 1, 0), axis=0) == 0)
    counted = named
    if distinct < (counts & 0xFFFF):
        counted = _first_places(ids, tokens, named, places, number_of_ids)
    x = tl.where(counted, x, float("-inf"))
    logprob = tl.where(counted, logprob, float("-inf"))
    y = logprob * teacher_scale
    if P.TAIL == "bucket":  # 1 - P_S is to have digits
        given = tl.sum(tl.exp(logprob.to(tl.float64)), axis=0)
    else:
        given = tl.sum(tl.exp(logprob), axis=0)
    sums, refs, tops, value, slope, q_inside = _inside(x, y, log2_scale, inv_temperature, a, P)
    teacher_lse = refs[1] * inv_temperature + tl.log(sums[1])
    is_good = is_good & is_finite(sums[0]) & is_finite(sums[1])

    ref = refs[0]
    weak_sum, hard_sum, weak_top = nothing, nothing, nothing + float("-inf")
    if P.WHOLE:
        ref = sample(student, begin, end, student_scale, student_cap, tl.constexpr(P.STUDENT_TRANSFORM))
    hard_ref = ref
    if P.WHOLE:
        weak_sum, hard_sum, weak_top = _statistics(rows, marks, (ref, hard_ref), log2_scale, P)
        stand = fits(weak_sum) | ((weak_sum == 0) & (weak_top == float("-inf")))
        if P.OWN_HARD_SUM:
            stand = stand & fits(hard_sum)
        if stand == 0:
            ref, hard_ref = _reference(weak_top), _reference(tl.maximum(weak_top, tops[0]))
            weak_sum, hard_sum, weak_top = _statistics(rows, marks, (ref, hard_ref), log2_scale, P)
    # S and W: the student's masses.
    q, log_q, student_ref, student_sum = masses((sums[0], weak_sum), (refs[0], ref), inv_temperature)
    if P.WHOLE:
        is_good = is_good & good(student_sum)
    if P.OWN_HARD_SUM:
        is_good = is_good & good(hard_sum)
    else:
        hard_sum, hard_ref = student_sum, student_ref

    if is_good:
        kd_factor, kd, gradient_scale = divergence_factors(kd_weight, temperature, inv_temperature, scale, P)
        by_ce, by_hard, of_ce, cross_entropy = nothing, nothing, nothing, nothing
        if P.LABELS:
            cross_entropy = tl.log(hard_sum) - (label_logit - hard_ref)
            of_ce = ce_weight * gradient_scale
            if P.OWN_HARD_SUM:
                by_hard = of_ce / hard_sum
            else:
                by_ce = of_ce
        ce = of_ce, by_hard, hard_ref, label
        odds = (refs[0] - ref) * inv_temperature + tl.log(tl.div_rn(sums[0], weak_sum))
        is_split = (distinct > 0) & (distinct < vocab_size)
        value, share, moved = _loss(value, given, sums[1], teacher_lse, odds, q, log_q, is_split, P)
        total = nothing
        if P.DIVERGENCE_IN_GRADIENT:
            total = kd_factor * value
        if P.LABELS:
            total += ce_weight * cross_entropy
        student_lse = student_ref * inv_temperature + tl.log(student_sum)
        strong_mass, agrees = q[0], nothing
        if P.WHOLE:
            place = tl.min(tl.where(counted & (y == tops[1]), places, P.IDS), axis=0)
            its_logit = tl.max(tl.where(places == place, x, float("-inf")), axis=0)
            agrees = tl.where((its_logit >= tl.maximum(weak_top, tops[0])) & (distinct > 0), 1.0, 0.0)
        else:
            student_lse = student_lse + float("nan")
            strong_mass = strong_mass + float("nan")
            agrees = agrees + float("nan")
        numbers = scale * total, student_lse, teacher_lse, value, cross_entropy, given.to(tl.float32)
        _report(row, number_of_rows, loss, stats, numbers + (strong_mass, agrees))
        if P.GRADIENT:
            SWEEPS: tl.constexpr = P.LABELS or (P.DIVERGENCE_IN_GRADIENT and P.TAIL != "renormalize")
            if SWEEPS:
                by_weak = (by_ce * q[1] - kd * moved) * inverse(weak_sum)
                _gradient(rows, gradient, ref, log2_scale, by_weak, ce, P)
                fill(gradient, end, begin + width, 0.0, P)
            else:
                fill(gradient, begin, begin + width, 0.0, P)
            g = tl.full((P.IDS,), 0.0, tl.float32)
            if P.DIVERGENCE_IN_GRADIENT:
                g += kd * tl.where(share > 0, share * slope, 0.0) + kd * moved * q_inside
            if P.LABELS and not P.OWN_HARD_SUM:
                g += by_ce * q[0] * q_inside
            tl.debug_barrier()  # what the sweep wrote to these columns comes first
            finish(g, x, derivative, tl.where(counted, columns, end), rows, gradient, ce, True, P)
    else:
        _report_one(row, number_of_rows, loss, stats, float("nan") + scale)
        if P.GRADIENT:
            fill(gradient, begin, begin + width, float("nan"), P)
    tl.debug_barrier()  # no warp reads the marks any more
    tl.store(words + (columns >> 5), tl.full((P.IDS,), 0, tl.int32), mask=named)


@triton.jit(do_not_specialize=["number_of_rows", "number_of_ids", "number_of_words"])
def sparse_kernel(
    student,
    gradient,
    logprobs,
    ids,
    labels,
    row_scale,
    temperatures,
    loss,
    stats,
    words,  # a program's marks, as atomic operations take them
    marks,  # and as bytes
    number_of_rows,
    number_of_ids,
    number_of_words,  # of a program
    vocab_size,
    width,  # of the student's rows in memory
    misalignment,  # columns from a multiple of 16 bytes to the tensors' first
    temperature,
    kd_weight,
    ce_weight,
    a,
    student_scale,
    student_cap,
    teacher_scale,
    n1,
    n2,
    n3,
    s0,
    s1,
    s2,
    s3,
    g0,
    g1,
    g2,
    g3,
    P: tl.constexpr,
):
    """Every so many-th row; see csrc/rows.h. Sizes and strides: of the leading dimensions but the first, and of all.

    Log-probabilities and ids are contiguous.
    """
    first = tl.program_id(0).to(tl.int64)
    words += first * number_of_words
    marks += first * number_of_words * 4
    for i in range(0, number_of_words, P.IDS):
        at = i + tl.arange(0, P.IDS)
        tl.store(words + at, tl.full((P.IDS,), 0, tl.int32), mask=at < number_of_words)
    for i in range(tl.cdiv(number_of_rows - tl.program_id(0), tl.num_programs(0))):
        row = first + i * tl.num_programs(0)
        scale = tl.load(row_scale + row)
        if scale == 0.0:
            _report_one(row, number_of_rows, loss, stats, 0.0 * scale)
            if P.GRADIENT:
                strides = (s0, s1, s2, s3), (s0, s1, s2, s3), (g0, g1, g2, g3)
                _, _, target, begin = locate(row, (student, student, gradient), (n1, n2, n3), strides, misalignment, P)
                fill(target, begin, begin + width, 0.0, P)
        else:
            _row(
                row,
                (student, gradient, logprobs, ids, labels, temperatures),
                (words, marks),
                (loss, stats),
                (n1, n2, n3),
                ((s0, s1, s2, s3), (g0, g1, g2, g3)),
                number_of_rows, number_of_ids, vocab_size, width, misalignment,
                temperature, (kd_weight, ce_weight), a, (student_scale, student_cap, teacher_scale), scale, P,
            )  # fmt: skip
