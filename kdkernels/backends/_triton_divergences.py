"""The pointwise divergences for the Triton kernels, each written twice.

Accurate: the formulas of csrc/divergence, which see there. A column is given by the larger of p and q, and by
e^(-|d|) - 1 with d = log(p/q), so that nothing overflows and nothing cancels where the models agree.

Plain: a few instructions a column, for rows whose models are far apart, where nothing cancels that matters.

Adding a divergence: its accurate function, its plain one where it has any, their lines in :func:`accurate`,
:func:`plain` and :func:`plain_scales`, and its kind in :data:`PLAIN`.
"""

import triton
import triton.language as tl

from kdkernels.backends._triton_math import (
    LN2,
    LOG2E,
    exp2,
    exponential,
    log1p_and_chi,
    log2,
    psi,
    reciprocal,
    two_product,
    two_sum,
)

#: How a divergence's plain form comes about. "linear": (1 - w)·KL(p‖q) + w·KL(q‖p), from the statistics alone.
#: "ratio": q·f(p/q), by :func:`plain`. "power": from sum p^a q^(1-a). Missing: it has none.
PLAIN = {
    "forward_kl": "linear",
    "reverse_kl": "linear",
    "symmetric_kl": "linear",
    "jensen_shannon": "ratio",
    "skew_forward_kl": "ratio",
    "skew_reverse_kl": "ratio",
    "total_variation": "ratio",
    "alpha_beta_sum_one": "power",
    "decoupled": "linear",  # of each set; see _triton_decoupled
}


def kernel_name(divergence: str, parameters: tuple[float, ...]) -> str:
    """The name a divergence has in the kernels: alpha_beta's limits are divergences of their own."""
    if divergence != "alpha_beta":
        return divergence
    a, b = parameters
    limits = {
        "both_zero": a == 0 and b == 0,
        "alpha_zero": a == 0,
        "beta_zero": b == 0,
        "sum_zero": a + b == 0,
        "sum_one": a + b == 1,
    }
    return "alpha_beta_" + next((name for name, applies in limits.items() if applies), "general")


@triton.jit
def normaliser_gap(student_ref, teacher_ref, log_of_sums, inv_temperature):
    """Of :func:`column`'s row: the coarse part of the references' difference, and the gap in two numbers."""
    origin = teacher_ref - student_ref
    shift = (origin * 0.25).to(tl.int32).to(tl.float32) * 4.0
    product, product_rest = two_product(origin - shift, inv_temperature)
    gap, gap_rest = two_sum(product, log_of_sums)
    return shift, gap, gap_rest + product_rest


@triton.jit
def column(x, y, row):
    """What the accurate formulas want to know of columns with student logits x and teacher logits y.

    ``row``: the models' references (a logit that their sums stand against), a coarse multiple near the references'
    difference (y - shift is exact), 1/T, log2(e)/T, the log-normalisers' gap after the shift in two numbers, and the
    normalisers' reciprocals and logarithms.
    """
    student_ref, teacher_ref, shift, inv_temperature, log2_scale, gap, gap_rest, inv_student_sum, inv_teacher_sum = row[
        :9
    ]
    difference = (y - shift) - x
    # NaN: -inf on both sides. Such a column contributes nothing.
    d = tl.where(difference == difference, (difference * inv_temperature - gap) - gap_rest, 0.0)
    teacher_larger = d > 0
    log2_larger = tl.where(teacher_larger, y - teacher_ref, x - student_ref) * log2_scale
    larger = exp2(log2_larger) * tl.where(teacher_larger, inv_teacher_sum, inv_student_sum)
    e, em, phi = exponential(-tl.abs(d))
    return d, teacher_larger, log2_larger, larger, e, em, phi


@triton.jit
def student_probability(c):
    """q of columns (see :func:`column`)."""
    return _student(c[1], c[3], c[4])


@triton.jit
def _student(teacher_larger, larger, e):
    return tl.where(teacher_larger, larger * e, larger)


@triton.jit
def student_minus_teacher(c):
    """q - p of columns (see :func:`column`)."""
    return _difference(c[1], c[3], c[5])


@triton.jit
def _difference(teacher_larger, larger, em):
    difference = larger * em
    return tl.where(teacher_larger, difference, -difference)


@triton.jit
def _times_student(q, h):
    # 0·inf and 0·NaN are 0 where the student has no mass.
    return tl.where(q > 0, q * h, 0.0)


# Each accurate function returns the columns' values, their derivatives h = dD/dq up to a constant, and their slopes
# q·(h - pivot). What a sweep does not use costs nothing.


@triton.jit
def _forward_kl(d, teacher_larger, larger, e, em, phi):
    by_teacher = tl.where(phi == float("inf"), phi, larger * phi)
    value = tl.where(teacher_larger, by_teacher, larger * psi(-tl.abs(d), e, phi))
    return value, 0.0 * larger, _difference(teacher_larger, larger, em)


@triton.jit
def _reverse_kl(d, teacher_larger, larger, e, em, phi, pivot):
    by_student = tl.where(phi == float("inf"), phi, larger * phi)
    value = tl.where(teacher_larger, larger * psi(-tl.abs(d), e, phi), by_student)
    return value, -d, _times_student(_student(teacher_larger, larger, e), -d - pivot)


@triton.jit
def _symmetric_kl(d, teacher_larger, larger, e, em, phi, pivot, weight):
    forward, _, forward_slope = _forward_kl(d, teacher_larger, larger, e, em, phi)
    reverse, h, reverse_slope = _reverse_kl(d, teacher_larger, larger, e, em, phi, pivot)
    rest = 1.0 - weight
    return rest * forward + weight * reverse, h, rest * forward_slope + weight * reverse_slope


@triton.jit
def _jensen_shannon(d, teacher_larger, larger, e, em, phi, pivot, beta):
    rest = 1.0 - beta
    smaller_weight = tl.where(teacher_larger, rest, beta)
    log1p, chi = log1p_and_chi(smaller_weight * em)
    value = larger * (chi + smaller_weight * (psi(-tl.abs(d), e, phi) - em * log1p))
    h = rest * (tl.where(teacher_larger, -d, 0.0) - log1p)
    return value, h, _times_student(_student(teacher_larger, larger, e), h - pivot)


@triton.jit
def _skew_forward_kl(d, teacher_larger, larger, e, em, phi, pivot, lam):
    rest = 1.0 - lam
    w = tl.where(teacher_larger, rest, lam) * em
    log1p, chi = log1p_and_chi(w)
    value = larger * tl.where(teacher_larger, chi, psi(-tl.abs(d), e, phi) + chi - em * log1p)
    h = rest * tl.where(teacher_larger, w, -rest * em) * reciprocal(1.0 + w)
    return value, h, _times_student(_student(teacher_larger, larger, e), h - pivot)


@triton.jit
def _skew_reverse_kl(d, teacher_larger, larger, e, em, phi, pivot, lam):
    rest = 1.0 - lam
    w = tl.where(teacher_larger, lam, rest) * em
    log1p, chi = log1p_and_chi(w)
    value = larger * tl.where(teacher_larger, psi(-tl.abs(d), e, phi) + chi - em * log1p, chi)
    h = (
        tl.where(teacher_larger, -d, 0.0)
        - log1p
        - lam * (tl.where(teacher_larger, rest * em, -w) * reciprocal(1.0 + w))
    )
    return value, h, _times_student(_student(teacher_larger, larger, e), h - pivot)


@triton.jit
def _total_variation(d, teacher_larger, larger, e, em, pivot):
    h = tl.where(teacher_larger, -0.5, tl.where(d < 0, 0.5, 0.0))
    return -0.5 * larger * em, h, _student(teacher_larger, larger, e) * (h - pivot)


@triton.jit
def _power(exponent, k):
    return exponential(exponent * tl.maximum(k, -1e30), ANY_SIGN=True)


@triton.jit
def _alpha_beta_from_larger(k, other, mine, OTHER_ZERO: tl.constexpr, MINE_ZERO: tl.constexpr, SUM_ZERO: tl.constexpr):
    """The value per unit of larger^(a+b); the larger side has the exponent ``mine``, the smaller one ``other``."""
    if OTHER_ZERO and MINE_ZERO:
        return 0.5 * k * k
    elif OTHER_ZERO:
        _, _, phi = _power(mine, k)
        return phi * (1.0 / (mine * mine))
    elif SUM_ZERO:
        _, _, phi = _power(other, k)
        return phi * (1.0 / (other * other))
    elif MINE_ZERO:
        e, _, phi = _power(other, k)
        return psi(other * k, e, phi) * (1.0 / (other * other))
    else:
        _, other_em, other_phi = _power(other, k)
        _, both_em, both_phi = _power(other + mine, k)
        ratio = other / (other + mine)
        # Near 0 the linear parts cancel exactly; far from it e^x - 1 stays finite.
        near, far = ratio * both_phi - other_phi, ratio * both_em - other_em
        return tl.where(k > -1.0, near, far) * (1.0 / (other * mine))


@triton.jit
def _alpha_beta(
    d, teacher_larger, log2_larger, larger, e, pivot, a, b, log_student_sum, log_teacher_sum, LIMIT: tl.constexpr
):
    A_ZERO: tl.constexpr = LIMIT == "alpha_beta_alpha_zero" or LIMIT == "alpha_beta_both_zero"
    B_ZERO: tl.constexpr = LIMIT == "alpha_beta_beta_zero" or LIMIT == "alpha_beta_both_zero"
    SUM_ZERO: tl.constexpr = LIMIT == "alpha_beta_sum_zero"
    SUM_ONE: tl.constexpr = LIMIT == "alpha_beta_sum_one"
    k = -tl.abs(d)
    q = _student(teacher_larger, larger, e)
    if SUM_ONE:
        base = larger
    else:
        log_sum = tl.where(teacher_larger, log_teacher_sum, log_student_sum)
        base = tl.exp2((a + b) * (tl.maximum(log2_larger, -1e30) - log_sum * LOG2E))
    by_student = _alpha_beta_from_larger(k, a, b, A_ZERO, B_ZERO, SUM_ZERO)
    by_teacher = _alpha_beta_from_larger(k, b, a, B_ZERO, A_ZERO, SUM_ZERO)
    value = base * tl.where(teacher_larger, by_teacher, by_student)
    # The slope, (q^(a+b) - p^a q^b)/a, per unit of base.
    b_e, b_em, _ = _power(b, k)
    if A_ZERO:
        of_student = -k
        of_teacher = tl.where(b_e > 0, b_e * k, 0.0)
    else:
        _, a_em, _ = _power(a, k)
        c_e, c_em, _ = _power(a + b, k)
        of_student = a_em * (-1.0 / a)
        of_teacher = tl.where(k > -1.0, c_em - b_em, c_e - b_e) * (1.0 / a)
    unit_slope = tl.where(teacher_larger, of_teacher, of_student)
    if SUM_ONE:
        # The pivot comes off before the product, and is exactly 0 at its own column.
        slope = larger * (unit_slope - tl.where(teacher_larger, e, 1.0) * pivot)
    else:
        slope = base * unit_slope - q * pivot
    return value, base * unit_slope / q, slope


@triton.jit
def accurate(c, pivot, a, b, row, D: tl.constexpr):
    """Value, derivative and slope of columns (see :func:`column`) under the divergence named D with parameters a, b."""
    d, teacher_larger, log2_larger, larger, e, em, phi = c
    if D == "forward_kl":
        value, h, slope = _forward_kl(d, teacher_larger, larger, e, em, phi)
    elif D == "reverse_kl":
        value, h, slope = _reverse_kl(d, teacher_larger, larger, e, em, phi, pivot)
    elif D == "symmetric_kl":
        value, h, slope = _symmetric_kl(d, teacher_larger, larger, e, em, phi, pivot, a)
    elif D == "jensen_shannon":
        value, h, slope = _jensen_shannon(d, teacher_larger, larger, e, em, phi, pivot, a)
    elif D == "skew_forward_kl":
        value, h, slope = _skew_forward_kl(d, teacher_larger, larger, e, em, phi, pivot, a)
    elif D == "skew_reverse_kl":
        value, h, slope = _skew_reverse_kl(d, teacher_larger, larger, e, em, phi, pivot, a)
    elif D == "total_variation":
        value, h, slope = _total_variation(d, teacher_larger, larger, e, em, pivot)
    else:
        value, h, slope = _alpha_beta(d, teacher_larger, log2_larger, larger, e, pivot, a, b, row[9], row[10], D)
    return value, h, slope


@triton.jit
def plain(log2_ratio, a, D: tl.constexpr):
    """Value and slope of a "ratio" divergence per unit of q, but for :func:`plain_scales`; log2_ratio = log2(p/q)."""
    e = exp2(log2_ratio)
    if D == "jensen_shannon":
        weighted = a * e
        mixture = weighted + (1.0 - a)  # M/q
        h = log2(mixture)
        value = weighted * log2_ratio - mixture * h
    elif D == "skew_forward_kl":
        mixture = a * e + (1.0 - a)
        value = e * (log2_ratio - log2(mixture))
        h = e * reciprocal(mixture)
    elif D == "skew_reverse_kl":
        mixture = (1.0 - a) * e + a
        value = log2(mixture)
        h = value + (a * LOG2E) * reciprocal(mixture)
    else:
        tl.static_assert(D == "total_variation")
        value = tl.abs(e - 1.0)
        h = tl.where(log2_ratio > 0, -1.0, tl.where(log2_ratio < 0, 1.0, 0.0))
    return value, h


@triton.jit
def plain_scales(a, D: tl.constexpr):
    """What :func:`plain`'s values and slopes are to be multiplied by."""
    if D == "jensen_shannon":
        scales = LN2, (a - 1.0) * LN2
    elif D == "skew_forward_kl":
        scales = LN2, a - 1.0
    elif D == "skew_reverse_kl":
        scales = -LN2, -LN2
    else:
        scales = 0.5, 0.5
    return scales
