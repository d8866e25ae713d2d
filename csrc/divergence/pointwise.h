// The pointwise divergences D(p, q) = sum over columns, p the teacher, q the student. Per column each has a value >= 0
// (a form whose terms do not cancel) and a slope q·(h - pivot), where h = dD/dq up to a constant and pivot is any number.
// With H = sum of the slopes,
//     T · dD/dlogit = slope - q·H
// so that a sweep needs to know nothing else of a divergence. The pivot, h at the student's most likely column, keeps
// the difference accurate where that column holds nearly all of q. Adding a divergence: a struct here, an entry in
// `AllDivergences` and in DivergenceId.
//
// Sources: forward and reverse KL, Jensen-Shannon as in GKD (arXiv 2306.13649), skew KL from DistiLLM
// (arXiv 2402.03898), alpha-beta from ABKD (arXiv 2505.04560).
#pragma once
#include "column.h"

namespace kdkernels {

// sum p·d. The slopes q - p add up to 0, so the gradient can be written without a sweep for their sum.
template <class Math>
struct ForwardKL {
  using V = typename Math::V;
  static constexpr bool slopes_sum_to_zero = true;
  KD_INLINE ForwardKL(const double*, const RowConstants<Math>&) {}
  // p·d - p + q
  KD_INLINE V value(const Column<Math>& c) const {
    const V student_zero = c.phi;  // +inf where the student gives no mass to what the teacher does
    const V by_teacher = Math::select(Math::is_infinite(student_zero), student_zero, c.larger * c.phi);
    return Math::select(c.teacher_larger, by_teacher, c.larger * c.psi());
  }
  KD_INLINE V derivative(const Column<Math>&) const { return Math::set(0); }  // no pivot: the slopes are q - p
  KD_INLINE V slope(const Column<Math>& c, V) const { return c.student_minus_teacher(); }
};

// sum q·(-d)
template <class Math>
struct ReverseKL {
  using V = typename Math::V;
  static constexpr bool slopes_sum_to_zero = false;
  KD_INLINE ReverseKL(const double*, const RowConstants<Math>&) {}
  // -q·d - q + p
  KD_INLINE V value(const Column<Math>& c) const {
    const V by_student = Math::select(Math::is_infinite(c.phi), c.phi, c.larger * c.phi);
    return Math::select(c.teacher_larger, c.larger * c.psi(), by_student);
  }
  KD_INLINE V derivative(const Column<Math>& c) const { return -c.d; }
  KD_INLINE V slope(const Column<Math>& c, V pivot) const { return c.times_student(derivative(c) - pivot); }
};

// (1 - w)·ForwardKL + w·ReverseKL
template <class Math>
struct SymmetricKL {
  using V = typename Math::V;
  static constexpr bool slopes_sum_to_zero = false;
  ForwardKL<Math> forward;
  ReverseKL<Math> reverse;
  V forward_weight, reverse_weight;
  KD_INLINE SymmetricKL(const double* p, const RowConstants<Math>& row)
      : forward(p, row), reverse(p, row), forward_weight(Math::set(1 - p[0])), reverse_weight(Math::set(p[0])) {}
  KD_INLINE V value(const Column<Math>& c) const {
    return forward_weight * forward.value(c) + reverse_weight * reverse.value(c);
  }
  // The pivot is reverse KL's: forward KL's slopes, q - p, need none.
  KD_INLINE V derivative(const Column<Math>& c) const { return reverse.derivative(c); }
  KD_INLINE V slope(const Column<Math>& c, V pivot) const {
    return forward_weight * forward.slope(c, pivot) + reverse_weight * reverse.slope(c, pivot);
  }
};

// KL(p || M), M = lam·p + (1 - lam)·q = larger·(1 + w)
template <class Math>
struct SkewForwardKL {
  using V = typename Math::V;
  static constexpr bool slopes_sum_to_zero = false;
  V lam, rest;
  KD_INLINE SkewForwardKL(const double* p, const RowConstants<Math>&) : lam(Math::set(p[0])), rest(Math::set(1 - p[0])) {}
  KD_INLINE V mixture(const Column<Math>& c) const { return Math::select(c.teacher_larger, rest, lam) * c.em; }
  // p·log(p/M) - p + M, with chi(w) = w - log(1 + w)
  KD_INLINE V value(const Column<Math>& c) const {
    V log1p, chi;
    Math::log1p_and_chi(mixture(c), log1p, chi);
    return c.larger * Math::select(c.teacher_larger, chi, c.psi() + chi - c.em * log1p);
  }
  // -(1 - lam)·(p/M - 1)
  KD_INLINE V derivative(const Column<Math>& c) const {
    const V w = mixture(c);
    return rest * Math::select(c.teacher_larger, w, -rest * c.em) / (Math::set(1) + w);
  }
  KD_INLINE V slope(const Column<Math>& c, V pivot) const { return c.times_student(derivative(c) - pivot); }
};

// KL(q || M), M = (1 - lam)·p + lam·q
template <class Math>
struct SkewReverseKL {
  using V = typename Math::V;
  static constexpr bool slopes_sum_to_zero = false;
  V lam, rest;
  KD_INLINE SkewReverseKL(const double* p, const RowConstants<Math>&) : lam(Math::set(p[0])), rest(Math::set(1 - p[0])) {}
  KD_INLINE V mixture(const Column<Math>& c) const { return Math::select(c.teacher_larger, lam, rest) * c.em; }
  // q·log(q/M) - q + M
  KD_INLINE V value(const Column<Math>& c) const {
    V log1p, chi;
    Math::log1p_and_chi(mixture(c), log1p, chi);
    return c.larger * Math::select(c.teacher_larger, c.psi() + chi - c.em * log1p, chi);
  }
  // log(q/M) - lam·(q/M - 1)
  KD_INLINE V derivative(const Column<Math>& c) const {
    const V w = mixture(c);
    V log1p, chi;
    Math::log1p_and_chi(w, log1p, chi);
    const V log_ratio = Math::select(c.teacher_larger, -c.d, Math::set(0)) - log1p;
    const V ratio = Math::select(c.teacher_larger, rest * c.em, -w) / (Math::set(1) + w);
    return log_ratio - lam * ratio;
  }
  KD_INLINE V slope(const Column<Math>& c, V pivot) const { return c.times_student(derivative(c) - pivot); }
};

// beta·KL(p || M) + (1 - beta)·KL(q || M), M = beta·p + (1 - beta)·q; 0 < beta < 1
template <class Math>
struct JensenShannon {
  using V = typename Math::V;
  static constexpr bool slopes_sum_to_zero = false;
  V beta, rest;
  KD_INLINE JensenShannon(const double* p, const RowConstants<Math>&) : beta(Math::set(p[0])), rest(Math::set(1 - p[0])) {}
  // The larger side has weight a in M, the smaller one b, so M = larger·(1 + w) with w = b·em. Per unit of larger:
  // b·(smaller's KL term) + a·(larger's) = b·(psi + chi - em·log1p) + a·chi
  KD_INLINE V value(const Column<Math>& c) const {
    const V b = Math::select(c.teacher_larger, rest, beta);
    V log1p, chi;
    Math::log1p_and_chi(b * c.em, log1p, chi);
    return c.larger * (chi + b * (c.psi() - c.em * log1p));
  }
  // (1 - beta)·log(q/M)
  KD_INLINE V derivative(const Column<Math>& c) const {
    const V b = Math::select(c.teacher_larger, rest, beta);
    V log1p, chi;
    Math::log1p_and_chi(b * c.em, log1p, chi);
    return rest * (Math::select(c.teacher_larger, -c.d, Math::set(0)) - log1p);
  }
  KD_INLINE V slope(const Column<Math>& c, V pivot) const { return c.times_student(derivative(c) - pivot); }
};

// 1/2·sum |p - q|
template <class Math>
struct TotalVariation {
  using V = typename Math::V;
  static constexpr bool slopes_sum_to_zero = false;
  KD_INLINE TotalVariation(const double*, const RowConstants<Math>&) {}
  KD_INLINE V value(const Column<Math>& c) const { return Math::set(-0.5) * c.larger * c.em; }
  KD_INLINE V derivative(const Column<Math>& c) const {
    const V half = Math::set(0.5), none = Math::set(0);
    return Math::select(c.teacher_larger, -half, Math::select(Math::greater(none, c.d), half, none));
  }
  KD_INLINE V slope(const Column<Math>& c, V pivot) const { return c.student() * (derivative(c) - pivot); }
};

// -1/(ab)·sum [p^a q^b - a/(a+b)·p^(a+b) - b/(a+b)·q^(a+b)], with its limits where a, b or a + b is 0.
template <class Math>
struct AlphaBeta {
  using V = typename Math::V;
  using Mask = typename Math::Mask;
  static constexpr bool slopes_sum_to_zero = false;
  double a, b, c;
  V inv_temperature;
  V student_power, teacher_power;  // log of the sums to the power -(a + b)
  KD_INLINE AlphaBeta(const double* p, const RowConstants<Math>& row)
      : a(p[0]), b(p[1]), c(p[0] + p[1]), inv_temperature(row.inv_temperature),
        student_power(-Math::set(c) * row.log_student_sum), teacher_power(-Math::set(c) * row.log_teacher_sum) {}

  // larger^(a+b)
  KD_INLINE V base(const Column<Math>& col) const {
    if (c == 1) return col.larger;
    const V x = Math::max(col.larger_logit * inv_temperature, Math::set(-1e30));
    return Math::exp(Math::set(c) * x + Math::select(col.teacher_larger, teacher_power, student_power));
  }
  static KD_INLINE auto power(double exponent, V k) {
    return Math::template exponential<true>(Math::set(exponent) * Math::max(k, Math::set(-1e30)));
  }
  // The value per unit of base where the larger side carries the exponent `mine` and the smaller one `other`.
  // Swapping the models swaps a and b, so one formula serves both sides; k <= 0 is the smaller side's log-ratio.
  KD_INLINE V from_larger(V k, double other, double mine) const {
    if (other == 0 && mine == 0) return Math::set(0.5) * k * k;
    if (other == 0) return Math::set(1 / (mine * mine)) * power(mine, k).phi;
    const auto by_other = power(other, k);
    if (c == 0) return Math::set(1 / (other * other)) * by_other.phi;
    if (mine == 0) {  // psi(other·k)
      const V one = Math::set(1), x = Math::set(other) * k;
      const V near = x * x + (x - one) * by_other.phi;
      const V far = one + (Math::max(x, Math::set(-1000)) - one) * by_other.e;
      return Math::set(1 / (other * other)) * Math::select(Math::greater(one, Math::abs(x)), near, far);
    }
    const auto by_both = power(c, k);
    const V ratio = Math::set(other / c);
    // Near 0 through phi (the linear parts cancel exactly), far from it through e^x - 1 (which stays finite).
    const V near = ratio * by_both.phi - by_other.phi, far = ratio * by_both.em - by_other.em;
    return Math::set(1 / (other * mine)) * Math::select(Math::greater(k, Math::set(-1)), near, far);
  }
  KD_INLINE V value(const Column<Math>& col) const {
    const V by_student = from_larger(col.k, a, b), by_teacher = from_larger(col.k, b, a);
    return base(col) * Math::select(col.teacher_larger, by_teacher, by_student);
  }
  KD_INLINE V derivative(const Column<Math>& col) const { return slope(col, Math::set(0)) / col.student(); }
  // (q^(a+b) - p^a q^b)/a
  KD_INLINE V slope(const Column<Math>& col, V pivot) const {
    V by_student, by_teacher;
    if (a == 0) {
      const V ratio = power(b, col.k).e;
      by_student = -col.k;
      by_teacher = Math::select(Math::greater(ratio, Math::set(0)), ratio * col.k, Math::set(0));
    } else {
      by_student = Math::set(-1 / a) * power(a, col.k).em;
      const auto both = power(c, col.k), student = power(b, col.k);
      const Mask near = Math::greater(col.k, Math::set(-1));  // e^x - 1 keeps the digits near 0, e^x far from it
      by_teacher = Math::set(1 / a) * Math::select(near, both.em - student.em, both.e - student.e);
    }
    const V h = Math::select(col.teacher_larger, by_teacher, by_student);
    // Where base is the larger probability itself, the pivot comes off before the product, and is exactly 0 at its column.
    if (c == 1) return col.larger * (h - Math::select(col.teacher_larger, col.ratio, Math::set(1)) * pivot);
    return base(col) * h - col.student() * pivot;
  }
};

template <template <class> class... Ds>
struct DivergenceList {};
using AllDivergences = DivergenceList<ForwardKL, ReverseKL, SymmetricKL, JensenShannon, SkewForwardKL, SkewReverseKL,
                                      TotalVariation, AlphaBeta>;  // in the order of DivergenceId (rows.h)

}  // namespace kdkernels
