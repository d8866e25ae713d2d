// The divergences in few instructions, for rows where the models are far apart and nothing is infinite: there plain
// differences keep their digits, and the forms of pointwise.h, which keep them everywhere, cost twice the time. A sweep
// uses these where the row's divergence is large enough (`floor`), and pointwise.h for the rest.
//
// With D = log2(p/q), a column contributes to the row's two sums, and its gradient is A·slope + B·q with A, B of the row.
// A divergence that is a function of KL(p||q), KL(q||p) and nothing else needs no sums beyond the statistics.
#pragma once
#include "pointwise.h"

namespace kdkernels {

constexpr float kLn2f = 0.693147181f;

template <class Math>
struct FarRow {
  using V = typename Math::V;
  V scale;                     // log2(e)/T
  V student_lse, teacher_lse;  // log2 of the normalisers, so that q = 2^(scale·z - student_lse)
  V gap;                       // teacher_lse - student_lse
};

// What no divergence reads is not computed: everything here is free of side effects.
template <class Math>
struct FarColumn {
  using V = typename Math::V;
  V q, p;
  V ratio;  // D = log2(p/q)
  V s, t;   // log2 q, log2 p
  KD_INLINE FarColumn(V student, V teacher, const FarRow<Math>& row) {
    s = Math::fma(student, row.scale, -row.student_lse), t = Math::fma(teacher, row.scale, -row.teacher_lse);
    q = Math::exp2(s), p = Math::exp2(t);
    ratio = Math::fma(teacher - student, row.scale, -row.gap);
  }
};

template <class Math>
struct FarSums {
  typename Math::V value, slope;
  typename Math::V largest;  // stays under kFarLargest where 2^D was safe to use
};
// 2^60: where q rounds to 0 at 2^-126, p = q·2^D counts for nothing either.
constexpr float kFarLargest = 1e18f;

template <class Math>
KD_INLINE bool far_sums_hold(const FarSums<Math>& sums, float value, float floor) {
  return value >= floor && value < 1e30f && sums.largest < kFarLargest && Math::abs(sums.slope) < 1e30f;
}

// The rounding of the row's log2-normalisers leaves the probabilities off by a factor; `normalise` takes it into the
// row's own factors. `exists`: there is a short form. `from_kl`: no sums sweep.
// `cancels_at_top`: not for rows where one column holds nearly all of q. `floor`: the least value it is accurate for.
template <template <class> class D, class Math>
struct Far {
  static constexpr bool exists = false, from_kl = false, reads_reverse = false;
  KD_INLINE Far(const float*) {}
};

template <class Math>
struct Far<ForwardKL, Math> {
  using V = typename Math::V;
  static constexpr bool exists = true, from_kl = true, reads_reverse = false, cancels_at_top = false;
  KD_INLINE Far(const float*) {}
  KD_INLINE bool serves() const { return true; }
  float by_q = 1, by_p = 1;
  KD_INLINE void normalise(float of_q, float of_p) { by_q = of_q, by_p = of_p; }
  KD_INLINE bool trusts(const FarSums<Math>& sums, float value) const { return far_sums_hold(sums, value, floor()); }
  KD_INLINE float floor() const { return 0.25f; }
  KD_INLINE float value(float forward, float) const { return forward; }
  KD_INLINE float slope_sum(float, float) const { return 0; }
  V a, b;
  KD_INLINE void scale(float A, float B) { a = -A * by_p, b = (A + B) * by_q; }
  KD_INLINE V gradient(const FarColumn<Math>& c) const { return Math::fma(b, c.q, a * c.p); }
};

template <class Math>
struct Far<ReverseKL, Math> {
  using V = typename Math::V;
  static constexpr bool exists = true, from_kl = true, reads_reverse = true, cancels_at_top = true;
  KD_INLINE Far(const float*) {}
  KD_INLINE bool serves() const { return true; }
  float by_q = 1, by_p = 1;
  KD_INLINE void normalise(float of_q, float of_p) { by_q = of_q, by_p = of_p; }
  KD_INLINE bool trusts(const FarSums<Math>& sums, float value) const { return far_sums_hold(sums, value, floor()); }
  KD_INLINE float floor() const { return 0.25f; }
  KD_INLINE float value(float, float reverse) const { return reverse; }
  KD_INLINE float slope_sum(float, float reverse) const { return reverse; }
  V a, b;
  KD_INLINE void scale(float A, float B) { a = -kLn2f * A * by_q, b = B * by_q; }
  KD_INLINE V gradient(const FarColumn<Math>& c) const { return c.q * Math::fma(a, c.ratio, b); }
};

template <class Math>
struct Far<SymmetricKL, Math> {
  using V = typename Math::V;
  static constexpr bool exists = true, from_kl = true, reads_reverse = true, cancels_at_top = true;
  float weight;
  KD_INLINE Far(const float* p) : weight(p[0]) {}
  KD_INLINE bool serves() const { return true; }
  float by_q = 1, by_p = 1;
  KD_INLINE void normalise(float of_q, float of_p) { by_q = of_q, by_p = of_p; }
  KD_INLINE bool trusts(const FarSums<Math>& sums, float value) const { return far_sums_hold(sums, value, floor()); }
  KD_INLINE float floor() const { return 0.25f; }
  KD_INLINE float value(float forward, float reverse) const { return (1 - weight) * forward + weight * reverse; }
  KD_INLINE float slope_sum(float, float reverse) const { return weight * reverse; }
  V a, b, c;
  KD_INLINE void scale(float A, float B) {
    a = -kLn2f * A * weight * by_q, b = (B + A * (1 - weight)) * by_q, c = -A * (1 - weight) * by_p;
  }
  KD_INLINE V gradient(const FarColumn<Math>& col) const {
    return Math::fma(col.q, Math::fma(a, col.ratio, b), c * col.p);
  }
};

// Those that need a sweep for their sums: `add` accumulates a column, `value` and `slope_sum` read the row's totals.
template <class Math>
struct Far<TotalVariation, Math> {
  using V = typename Math::V;
  static constexpr bool exists = true, from_kl = false, reads_reverse = false, cancels_at_top = true;
  KD_INLINE Far(const float*) {}
  KD_INLINE bool serves() const { return true; }
  float by_q = 1, by_p = 1;
  KD_INLINE void normalise(float of_q, float of_p) { by_q = of_q, by_p = of_p; }
  KD_INLINE bool trusts(const FarSums<Math>& sums, float value) const { return far_sums_hold(sums, value, floor()); }
  KD_INLINE float floor() const { return 0.05f; }
  KD_INLINE V sign(const FarColumn<Math>& c) const {  // of q - p
    return Math::greater_one(Math::set(0), c.ratio) - Math::greater_one(c.ratio, Math::set(0));
  }
  KD_INLINE void add(const FarColumn<Math>& c, FarSums<Math>& sums) const {
    sums.value = sums.value + Math::abs(Math::fma(-by_p / by_q, c.p, c.q));
    sums.slope = Math::fma(c.q, sign(c), sums.slope);
  }
  KD_INLINE float value(const FarSums<Math>& sums) const { return 0.5f * by_q * sums.value; }
  KD_INLINE float slope_sum(const FarSums<Math>& sums) const { return 0.5f * by_q * sums.slope; }
  V a, b;
  KD_INLINE void scale(float A, float B) { a = 0.5f * A * by_q, b = B * by_q; }
  KD_INLINE V gradient(const FarColumn<Math>& c) const { return c.q * Math::fma(a, sign(c), b); }
};

// With r = M/q = beta·2^D + 1 - beta: q·(beta·2^D·(D - log2 r) - (1 - beta)·log2 r), and h = -(1 - beta)·log2 r.
template <class Math>
struct Far<JensenShannon, Math> {
  using V = typename Math::V;
  static constexpr bool exists = true, from_kl = false, reads_reverse = false, cancels_at_top = true;
  float beta, rest;
  KD_INLINE Far(const float* p) : beta(p[0]), rest(1 - p[0]) {}
  KD_INLINE bool serves() const { return true; }
  float by_q = 1, by_p = 1;
  KD_INLINE void normalise(float of_q, float of_p) { by_q = of_q, by_p = of_p; }
  KD_INLINE bool trusts(const FarSums<Math>& sums, float value) const { return far_sums_hold(sums, value, floor()); }
  KD_INLINE float floor() const { return 0.25f * beta * rest; }
  KD_INLINE void add(const FarColumn<Math>& c, FarSums<Math>& sums) const {
    const V e = Math::exp2(c.ratio), weighted = beta * e, r = weighted + rest, l = Math::log2(r);
    sums.value = Math::fma(c.q, Math::fma(weighted, c.ratio, -r * l), sums.value);
    sums.slope = Math::fma(c.q, l, sums.slope);
    sums.largest = sums.largest + e;
  }
  KD_INLINE float value(const FarSums<Math>& sums) const { return kLn2f * by_q * sums.value; }
  KD_INLINE float slope_sum(const FarSums<Math>& sums) const { return -kLn2f * rest * by_q * sums.slope; }
  V a, b;
  KD_INLINE void scale(float A, float B) { a = -kLn2f * rest * A * by_q, b = B * by_q; }
  KD_INLINE V gradient(const FarColumn<Math>& c) const {
    const V l = Math::log2(Math::fma(beta, Math::exp2(c.ratio), rest));
    return c.q * Math::fma(a, l, b);
  }
};

// r = M/q = lam·2^D + 1 - lam: q·2^D·(D - log2 r), and h = -(1 - lam)·2^D/r up to a constant.
template <class Math>
struct Far<SkewForwardKL, Math> {
  using V = typename Math::V;
  static constexpr bool exists = true, from_kl = false, reads_reverse = false, cancels_at_top = true;
  float lam, rest;
  KD_INLINE Far(const float* p) : lam(p[0]), rest(1 - p[0]) {}
  KD_INLINE bool serves() const { return true; }
  float by_q = 1, by_p = 1;
  KD_INLINE void normalise(float of_q, float of_p) { by_q = of_q, by_p = of_p; }
  KD_INLINE bool trusts(const FarSums<Math>& sums, float value) const { return far_sums_hold(sums, value, floor()); }
  KD_INLINE float floor() const { return 0.25f * rest * rest; }
  KD_INLINE void add(const FarColumn<Math>& c, FarSums<Math>& sums) const {
    const V e = Math::exp2(c.ratio), r = Math::fma(lam, e, rest);
    sums.value = Math::fma(c.q * e, c.ratio - Math::log2(r), sums.value);
    sums.slope = Math::fma(c.q * e, Math::reciprocal(r), sums.slope);
    sums.largest = sums.largest + e;
  }
  KD_INLINE float value(const FarSums<Math>& sums) const { return kLn2f * by_q * sums.value; }
  KD_INLINE float slope_sum(const FarSums<Math>& sums) const { return -rest * by_q * sums.slope; }
  V a, b;
  KD_INLINE void scale(float A, float B) { a = -rest * A * by_q, b = B * by_q; }
  KD_INLINE V gradient(const FarColumn<Math>& c) const {
    const V e = Math::exp2(c.ratio);
    return c.q * Math::fma(a, e * Math::reciprocal(Math::fma(lam, e, rest)), b);
  }
};

// r = M/q = (1 - lam)·2^D + lam: -q·log2 r, and h = -log r - lam/r.
template <class Math>
struct Far<SkewReverseKL, Math> {
  using V = typename Math::V;
  static constexpr bool exists = true, from_kl = false, reads_reverse = false, cancels_at_top = true;
  float lam, rest;
  KD_INLINE Far(const float* p) : lam(p[0]), rest(1 - p[0]) {}
  KD_INLINE bool serves() const { return true; }
  float by_q = 1, by_p = 1;
  KD_INLINE void normalise(float of_q, float of_p) { by_q = of_q, by_p = of_p; }
  KD_INLINE bool trusts(const FarSums<Math>& sums, float value) const { return far_sums_hold(sums, value, floor()); }
  KD_INLINE float floor() const { return 0.25f * rest * rest; }
  KD_INLINE void add(const FarColumn<Math>& c, FarSums<Math>& sums) const {
    const V e = Math::exp2(c.ratio), r = Math::fma(rest, e, lam);
    sums.value = Math::fma(c.q, Math::log2(r), sums.value);
    sums.slope = Math::fma(c.q, Math::reciprocal(r), sums.slope);
    sums.largest = sums.largest + e;
  }
  KD_INLINE float value(const FarSums<Math>& sums) const { return -kLn2f * by_q * sums.value; }
  KD_INLINE float slope_sum(const FarSums<Math>& sums) const { return value(sums) - lam * by_q * sums.slope; }
  V a, b, c;
  KD_INLINE void scale(float A, float B) { a = -kLn2f * A * by_q, b = B * by_q, c = -lam * A * by_q; }
  KD_INLINE V gradient(const FarColumn<Math>& col) const {
    const V r = Math::fma(rest, Math::exp2(col.ratio), lam);
    return col.q * Math::fma(a, Math::log2(r), Math::fma(c, Math::reciprocal(r), b));
  }
};

// a + b = 1: with P = p^a q^b, the value is (1 - sum P)/(ab) and the slope (q - P)/a.
template <class Math>
struct Far<AlphaBeta, Math> {
  using V = typename Math::V;
  static constexpr bool exists = true, from_kl = false, reads_reverse = false, cancels_at_top = true;
  float alpha, beta;
  bool simple;
  KD_INLINE Far(const float* p)
      : alpha(p[0]), beta(p[1]), simple(p[0] + p[1] == 1 && p[0] > 0 && p[1] > 0) {}
  KD_INLINE bool serves() const { return simple; }
  float by_q = 1, by_p = 1;
  KD_INLINE void normalise(float of_q, float of_p) { by_q = of_q, by_p = of_p; }
  KD_INLINE bool trusts(const FarSums<Math>& sums, float value) const { return far_sums_hold(sums, value, floor()); }
  KD_INLINE float floor() const { return 0.1f / (alpha * beta); }
  KD_INLINE float by_product() const { return 1 + alpha * (by_p - 1) + beta * (by_q - 1); }  // both are near 1
  KD_INLINE V product(const FarColumn<Math>& c) const { return Math::exp2(Math::fma(alpha, c.t, beta * c.s)); }
  KD_INLINE void add(const FarColumn<Math>& c, FarSums<Math>& sums) const { sums.value = sums.value + product(c); }
  KD_INLINE float value(const FarSums<Math>& sums) const { return (1 - by_product() * sums.value) / (alpha * beta); }
  KD_INLINE float slope_sum(const FarSums<Math>& sums) const { return (1 - by_product() * sums.value) / alpha; }
  V a, b;
  KD_INLINE void scale(float A, float B) { a = -A / alpha * by_product(), b = (A / alpha + B) * by_q; }
  KD_INLINE V gradient(const FarColumn<Math>& c) const { return Math::fma(b, c.q, a * product(c)); }
};

}  // namespace kdkernels
