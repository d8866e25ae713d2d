// The sweeps over one block of columns: statistics, sums, gradient. A block's columns are in L1 while they are used.
#pragma once
#include "../divergence/pointwise.h"
#include "../rows.h"
#include "convert.h"
#include "vector.h"

namespace kdkernels {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// What the first sweep knows after some blocks; merging is rescaling to a common maximum.
struct Statistics {
  double student_max = -INFINITY, teacher_max = -INFINITY;
  double student_sum = 0, teacher_sum = 0;  // of e^((z - max)/T)
  double hard_sum = 0;                      // of e^(z - max): the student at temperature 1
  int64_t top_block = 0;                    // where student_max is
  // Teacher-weighted moments of x = ((teacher - student) - origin)/T, the spread of the log-ratios.
  double origin = 0, moment1 = 0, moment2 = 0;

  double variance() const {
    const double mean = moment1 / teacher_sum;
    return moment2 / teacher_sum - mean * mean;
  }
  // A model without mass stays -inf in all of its columns under any finite reference.
  Statistics with_references() const {
    Statistics st = *this;
    if (!(st.student_sum > 0)) st.student_max = 0, st.student_sum = 1;
    if (!(st.teacher_sum > 0)) st.teacher_max = 0, st.teacher_sum = 1;
    return st;
  }
};

inline double finite_or_zero(double x) { return std::isfinite(x) ? x : 0; }

inline double log_add(double a, double b) {
  const double larger = a > b ? a : b;
  return larger + std::log1p(std::exp(-std::fabs(a - b)));
}

// Adds a block's moments: of its columns where the block carries much of the teacher's mass, else of its two maxima
// alone, which costs nothing and tells models that agree from models that do not.
template <class Math>
void add_moments(const typename Math::Real* student, const typename Math::Real* teacher, int n, double inv_temperature,
                 double block_student_max, double block_teacher_max, double block_sum, Statistics& st) {
  using V = typename Math::V;
  if (block_sum < st.teacher_sum / 16) {
    const double x = finite_or_zero((block_teacher_max - block_student_max - st.origin) * inv_temperature);
    st.moment1 += block_sum * x;
    st.moment2 += block_sum * x * x;
    return;
  }
  const V scale = Math::set(inv_temperature), zero = Math::set(0), origin = Math::set(st.origin);
  const V max = Math::set(st.teacher_max), log2_scale = Math::set(inv_temperature * kLog2E);
  V moment1 = zero, moment2 = zero;
  for (int i = 0; i < n; i += Math::lanes) {
    const V z = Math::load(student + i), y = Math::load(teacher + i);
    const V p = Math::exp2_nonpositive((y - max) * log2_scale);
    const V x = ((y - z) - origin) * scale;
    const V px = Math::select(Math::greater(p, zero), p * x, zero);
    moment1 = moment1 + px;
    moment2 = moment2 + Math::select(Math::greater(p, zero), px * x, zero);
  }
  st.moment1 += Math::sum(moment1);
  st.moment2 += Math::sum(moment2);
}

// The block to come: fetched while this one is computed, so that memory never waits for arithmetic.
struct Ahead {
  const char *student, *teacher;
  int64_t student_bytes, teacher_bytes;  // per column
};

template <class Math>
void statistics_block(const typename Math::Real* student, const typename Math::Real* teacher, int n,
                      int64_t block, const Ahead& ahead, double inv_temperature, bool hard, bool moments,
                      Statistics& st) {
  using V = typename Math::V;
  V student_max = Math::set(-INFINITY), teacher_max = student_max;
  for (int i = 0; i < n; i += Math::lanes) {
    student_max = Math::max(Math::load(student + i), student_max);
    teacher_max = Math::max(Math::load(teacher + i), teacher_max);
  }
  const double old_student = st.student_max, old_teacher = st.teacher_max;
  const double block_student = Math::largest(student_max), block_teacher = Math::largest(teacher_max);
  if (block_student > old_student) {
    st.student_max = block_student;
    st.top_block = block;
    st.student_sum *= std::exp((old_student - st.student_max) * inv_temperature);
    st.hard_sum *= std::exp(old_student - st.student_max);
  }
  if (block_teacher > old_teacher) {
    st.teacher_max = block_teacher;
    const double factor = std::exp((old_teacher - st.teacher_max) * inv_temperature);
    st.teacher_sum *= factor, st.moment1 *= factor, st.moment2 *= factor;
  }
  if (old_student == -INFINITY) st.origin = float(finite_or_zero(st.teacher_max - st.student_max));

  const V scale = Math::set(inv_temperature * kLog2E), zero = Math::set(0);
  student_max = Math::set(finite_or_zero(st.student_max));  // all -inf so far: e^-inf = 0, and NaN stays NaN
  teacher_max = Math::set(finite_or_zero(st.teacher_max));
  V student_sum = zero, teacher_sum = zero;
  for (int i = 0; i < n; i += Math::lanes) {
    __builtin_prefetch(ahead.student + i * ahead.student_bytes);
    __builtin_prefetch(ahead.teacher + i * ahead.teacher_bytes);
    student_sum = student_sum + Math::exp2_nonpositive((Math::load(student + i) - student_max) * scale);
    teacher_sum = teacher_sum + Math::exp2_nonpositive((Math::load(teacher + i) - teacher_max) * scale);
  }
  const double block_sum = Math::sum(teacher_sum);
  st.student_sum += Math::sum(student_sum);
  st.teacher_sum += block_sum;
  if (moments)
    add_moments<Math>(student, teacher, n, inv_temperature, block_student, block_teacher, block_sum, st);
  if (hard) {
    const V log2e = Math::set(kLog2E);
    V hard_sum = zero;
    for (int i = 0; i < n; i += Math::lanes)
      hard_sum = hard_sum + Math::exp2_nonpositive((Math::load(student + i) - student_max) * log2e);
    st.hard_sum += Math::sum(hard_sum);
  }
}

struct Sums {
  double value = 0, slope = 0;
};

template <class Math, class D>
Sums sums_block(const typename Math::Real* student, const typename Math::Real* teacher, int n,
                const RowConstants<Math>& row, const D& divergence, double pivot) {
  using V = typename Math::V;
  const V at = Math::set(pivot);
  V value = Math::set(0), slope = Math::set(0);
  for (int i = 0; i < n; i += Math::lanes) {
    const auto c = Column<Math>::make(Math::load(student + i), Math::load(teacher + i), row);
    value = value + divergence.value(c);
    slope = slope + divergence.slope(c, at);
  }
  return {Math::sum(value), Math::sum(slope)};
}

// out = slope_factor·slope + q_factor·q; returns the sum of the values.
template <bool WithQ, bool Stream, class Math, class D>
double gradient_columns(const typename Math::Real* student, const typename Math::Real* teacher, int n,
                        const RowConstants<Math>& row, const D& divergence, double pivot, double slope_factor, double q_factor,
                        typename Math::Real* out) {
  using V = typename Math::V;
  const V at = Math::set(pivot), by_slope = Math::set(slope_factor), by_q = Math::set(q_factor);
  V value = Math::set(0);
  for (int i = 0; i < n; i += Math::lanes) {
    const auto c = Column<Math>::make(Math::load(student + i), Math::load(teacher + i), row);
    if constexpr (D::slopes_sum_to_zero) value = value + divergence.value(c);
    V g = by_slope * divergence.slope(c, at);
    if constexpr (WithQ) g = g + by_q * c.student();
    if constexpr (Stream)
      Math::stream(out + i, g);
    else
      Math::store(out + i, g);
  }
  return Math::sum(value);
}

template <class Math, class D>
double gradient_block(const typename Math::Real* student, const typename Math::Real* teacher, int n,
                      const RowConstants<Math>& row, const D& divergence, double pivot, double slope_factor,
                      double q_factor, bool stream, typename Math::Real* out) {
  auto columns = gradient_columns<true, false, Math, D>;
  if (q_factor == 0)
    columns = stream ? gradient_columns<false, true, Math, D> : gradient_columns<false, false, Math, D>;
  else if (stream)
    columns = gradient_columns<true, true, Math, D>;
  return columns(student, teacher, n, row, divergence, pivot, slope_factor, q_factor, out);
}

// out += factor·e^(student - max)
template <class Math>
void add_hard_softmax(const typename Math::Real* student, int n, double student_max, double factor,
                      typename Math::Real* out) {
  const typename Math::V max = Math::set(student_max), by = Math::set(factor), log2e = Math::set(kLog2E);
  for (int i = 0; i < n; i += Math::lanes)
    Math::store(out + i, Math::load(out + i) + by * Math::exp2_nonpositive((Math::load(student + i) - max) * log2e));
}

// Where the log-normalisers' gap is uncertain by more than this share of the log-ratios' spread, it is refined: sums
// of fp32 exponentials leave about 3e-8 in it, and a gradient of norm ~spread carries it at first order.
template <class Math>
constexpr double kRefineBelow = sizeof(typename Math::Real) == 4 ? 0.1 : 0;

}  // namespace
}  // namespace kdkernels
