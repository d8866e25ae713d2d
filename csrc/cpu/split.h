// Blocks whose columns fall into two sets, strong and weak: each column enters its own set's sums, with its own set's
// constants. Pairs are {strong, weak}.
#pragma once
#include "blocks.h"
#include "strong.h"

namespace kdkernels {
namespace {

enum : int { kStrong = 0, kWeak = 1 };

template <class Math>
KD_INLINE typename Math::Mask weak_columns(const Members<Math>& members, int i) {
  return Math::greater(Math::set(members.threshold), Math::load(members.score + i));
}

// The columns of one set; -inf, which weighs nothing, in place of the other's.
template <class Math>
void keep_set(const typename Math::Real* logits, const Members<Math>& members, int n, int set,
              typename Math::Real* out) {
  const auto nothing = Math::set(-INFINITY);
  for (int i = 0; i < n; i += Math::lanes) {
    const auto x = Math::load(logits + i);
    const auto weak = weak_columns(members, i);
    Math::store(out + i, set == kWeak ? Math::select(weak, x, nothing) : Math::select(weak, nothing, x));
  }
}

// Of what Column and the slopes q - p read; the rest is the strong set's.
template <class Math>
KD_INLINE RowConstants<Math> own_constants(typename Math::Mask weak, const RowConstants<Math>* sets) {
  const RowConstants<Math>&s = sets[kStrong], &w = sets[kWeak];
  RowConstants<Math> own = s;
  own.student_max = Math::select(weak, w.student_max, s.student_max);
  own.teacher_max = Math::select(weak, w.teacher_max, s.teacher_max);
  own.shift = Math::select(weak, w.shift, s.shift);
  own.gap = Math::select(weak, w.gap, s.gap);
  own.gap_rest = Math::select(weak, w.gap_rest, s.gap_rest);
  own.inv_student_sum = Math::select(weak, w.inv_student_sum, s.inv_student_sum);
  own.inv_teacher_sum = Math::select(weak, w.inv_teacher_sum, s.inv_teacher_sum);
  return own;
}

// x into the sum of the set it belongs to.
template <class Math>
KD_INLINE void add_to_own(typename Math::Mask weak, typename Math::V x, typename Math::V* sums) {
  const auto zero = Math::set(0);
  sums[kStrong] = sums[kStrong] + Math::select(weak, zero, x);
  sums[kWeak] = sums[kWeak] + Math::select(weak, x, zero);
}

// Without a pivot: for divergences whose slopes need none, or are not wanted.
template <class Math, class D>
void add_split_sums(const typename Math::Real* student, const typename Math::Real* teacher,
                    const Members<Math>& members, int n, const RowConstants<Math>* sets, const D& divergence,
                    Sums* sums) {
  const auto zero = Math::set(0);
  typename Math::V value[2] = {zero, zero}, slope[2] = {zero, zero};
  for (int i = 0; i < n; i += Math::lanes) {
    const auto weak = weak_columns(members, i);
    const auto c = Column<Math>::make(Math::load(student + i), Math::load(teacher + i), own_constants(weak, sets));
    add_to_own<Math>(weak, divergence.value(c), value);
    add_to_own<Math>(weak, divergence.slope(c, zero), slope);
  }
  for (int set : {kStrong, kWeak}) sums[set].value += Math::sum(value[set]), sums[set].slope += Math::sum(slope[set]);
}

// out = slope_factor·(q~ - p~) + q_factor·q~, each by the column's own set; adds up forward KL's values.
template <bool Stream, class Math>
void split_gradient_columns(const typename Math::Real* student, const typename Math::Real* teacher,
                            const Members<Math>& members, int n, const RowConstants<Math>* sets,
                            const double* slope_factor, const double* q_factor, typename Math::Real* out,
                            double* values) {
  const auto zero = Math::set(0);
  const ForwardKL<Math> divergence(nullptr, sets[kStrong]);
  typename Math::V value[2] = {zero, zero};
  for (int i = 0; i < n; i += Math::lanes) {
    const auto weak = weak_columns(members, i);
    const auto c = Column<Math>::make(Math::load(student + i), Math::load(teacher + i), own_constants(weak, sets));
    add_to_own<Math>(weak, divergence.value(c), value);
    const auto by_slope = Math::select(weak, Math::set(slope_factor[kWeak]), Math::set(slope_factor[kStrong]));
    const auto by_q = Math::select(weak, Math::set(q_factor[kWeak]), Math::set(q_factor[kStrong]));
    const auto g = by_slope * c.student_minus_teacher() + by_q * c.student();
    if constexpr (Stream)
      Math::stream(out + i, g);
    else
      Math::store(out + i, g);
  }
  for (int set : {kStrong, kWeak}) values[set] += Math::sum(value[set]);
}

}  // namespace
}  // namespace kdkernels
