// One vocabulary entry of both models, in the form every divergence reads.
//
// With p the teacher's and q the student's probability, d = log(p/q) and k = -|d|, everything is expressed through
// the larger of the two and e^k - 1, so that nothing overflows, and nothing cancels where the models agree:
//     larger = max(p, q),   smaller = larger·e^k,   phi = e^k - 1 - k,   psi = 1 + (k - 1)·e^k      (both >= 0)
// phi and psi are the f-divergence generators of reverse and forward KL seen from the larger side; they are accurate
// relative to their own size, which is k²/2 near 0.
//
// `Math` supplies the number type V (a SIMD vector, a double, a CUDA float) and its elementary functions.
#pragma once
#include "inline.h"

namespace kdkernels {

// What the first sweep of a row leaves for the others.
template <class Math>
struct RowConstants {
  using V = typename Math::V;
  V student_max, teacher_max;    // of the logits, before the temperature
  V shift;                       // a coarse multiple near teacher_max - student_max: teacher - shift is exact
  V inv_temperature, log2e_over_temperature;
  V gap, gap_rest;               // log-normaliser of the teacher minus the student's, after the shift: their sum
  V inv_student_sum, inv_teacher_sum;
  V log_student_sum, log_teacher_sum;
};

template <class Math>
struct Column {
  using V = typename Math::V;
  using Mask = typename Math::Mask;

  V d;                       // log(p / q); 0 where both are 0
  V k;                       // -|d|
  Mask teacher_larger;       // p > q
  V larger;                  // max(p, q)
  V ratio;                   // e^k = min(p, q) / max(p, q)
  V em;                      // e^k - 1
  V phi;                     // e^k - 1 - k
  V larger_logit;            // of the larger side, minus that side's maximum; before the temperature

  static KD_INLINE Column make(V student, V teacher, const RowConstants<Math>& row) {
    Column c;
    const V difference = (teacher - row.shift) - student;
    // NaN: -inf on both sides (a NaN row never comes here); such a column contributes nothing.
    c.d = Math::select(Math::is_nan(difference), Math::set(0), (difference * row.inv_temperature - row.gap) - row.gap_rest);
    c.k = -Math::abs(c.d);
    c.teacher_larger = Math::greater(c.d, Math::set(0));
    c.larger_logit = Math::select(c.teacher_larger, teacher - row.teacher_max, student - row.student_max);
    c.larger = Math::exp2_nonpositive(c.larger_logit * row.log2e_over_temperature) *
               Math::select(c.teacher_larger, row.inv_teacher_sum, row.inv_student_sum);
    const auto e = Math::exponential(c.k);
    c.ratio = e.e, c.em = e.em, c.phi = e.phi;
    return c;
  }

  KD_INLINE V psi() const {
    const V one = Math::set(1);
    const V near = k * k + (k - one) * phi;
    const V far = one + (Math::max(k, Math::set(-1000)) - one) * ratio;
    return Math::select(Math::greater(k, Math::set(-1)), near, far);
  }
  KD_INLINE V smaller() const { return larger * ratio; }
  KD_INLINE V student() const { return Math::select(teacher_larger, smaller(), larger); }
  KD_INLINE V teacher() const { return Math::select(teacher_larger, larger, smaller()); }
  KD_INLINE V student_minus_teacher() const {
    const V difference = larger * em;
    return Math::select(teacher_larger, difference, -difference);
  }
  // x where the models' probabilities allow it to count: 0·inf and 0·NaN are 0 where the student has no mass.
  KD_INLINE V times_student(V x) const {
    const V q = student();
    return Math::select(Math::greater(q, Math::set(0)), q * x, Math::set(0));
  }
};

}  // namespace kdkernels
