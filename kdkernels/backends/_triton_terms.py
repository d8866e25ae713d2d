"""The decoupled divergences' terms from sums over S and W, a row's scalars: pairs are of S and of W, in this order."""

import triton
import triton.language as tl

from kdkernels.backends._triton_math import exponential, log1p_and_chi, psi


@triton.jit
def masses(sums, refs, inv_temperature):
    """A model's masses of S and W, their logarithms; its reference and sum over the row."""
    # A set without mass has no reference.
    of_s = tl.where(sums[0] > 0, refs[0], refs[1])
    of_w = tl.where(sums[1] > 0, refs[1], refs[0])
    ref = tl.maximum(of_s, of_w)
    from_s, from_w = (of_s - ref) * inv_temperature, (of_w - ref) * inv_temperature
    in_s, in_w = tl.exp(from_s) * sums[0], tl.exp(from_w) * sums[1]
    total = in_s + in_w
    logs = from_s + tl.log(tl.div_rn(sums[0], total)), from_w + tl.log(tl.div_rn(sums[1], total))
    return (in_s / total, in_w / total), logs, ref, total


@triton.jit
def log_of_sums_of(student_sum, teacher_sum):
    """log(teacher_sum / student_sum), exactly 0 where they are the same, 0 included."""
    return tl.where(student_sum == teacher_sum, 0.0, tl.log(tl.div_rn(teacher_sum, student_sum)))


@triton.jit
def _kl_of_mass(p, q, d):
    """p·d - p + q of two masses with d = log(p/q)."""
    e, _, phi = exponential(-tl.abs(d))
    of_larger_p = tl.where(phi == float("inf"), phi, p * phi)
    return tl.where(d > 0, of_larger_p, q * psi(-tl.abs(d), e, phi))


@triton.jit
def binary_term(odds_gap, p, q, log_p, log_q):
    """BCD and D = Q_S - P_S from the log-odds' gap; p, q: the masses of S and W under teacher and student."""
    _, em, _ = exponential(-tl.abs(odds_gap))
    is_up = odds_gap > 0  # the teacher favours S
    student_minus_teacher_s = tl.where(is_up, q[1] * p[0] * em, -q[0] * p[1] * em)
    # P/Q - 1 of the set where it is negative, Q/P - 1 of the other.
    of_s = tl.where(is_up, q[1], p[1]) * em
    of_w = tl.where(is_up, p[0], q[0]) * em
    near_s, _ = log1p_and_chi(of_s)
    near_w, _ = log1p_and_chi(of_w)
    # Where little is left of 1 + of_s, the masses' own logarithms are exact enough.
    d_s = tl.where(of_s < -0.5, log_p[0] - log_q[0], tl.where(is_up, -near_s, near_s))
    d_w = tl.where(of_w < -0.5, log_p[1] - log_q[1], tl.where(is_up, near_w, -near_w))
    bcd = _kl_of_mass(p[0], q[0], d_s) + _kl_of_mass(p[1], q[1], d_w)
    return bcd, student_minus_teacher_s


@triton.jit
def inside_term(student_sum, teacher_sum, value):
    """A set's own divergence, where it has one."""
    value = tl.where(student_sum > 0, value, float("inf"))
    return tl.where(teacher_sum > 0, value, 0.0)


@triton.jit
def weighted(weight, term):
    """0·inf is 0."""
    return tl.where(weight != 0, weight * term, 0.0)


@triton.jit
def inverse(total):
    return tl.where(total > 0, 1.0 / total, 0.0)
