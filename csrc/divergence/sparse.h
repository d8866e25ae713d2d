// Sparse teachers: what a row's loss and gradient are made of, from the teacher's mass P_S of the given ids S and the
// student's log-odds of S against the rest W. With D the divergence within S (both models normalised there), gap its
// T·dD/dlogit, and q~ the student within S, or within W,
//     loss = within·D + offset,   T·gradient = within·gap + moved·q~ in S, -moved·q~ in W
// `Real` is double or float; what a teacher leaves outside S is a difference, formed in double.
#pragma once
#include <cmath>

#include "../rows.h"
#include "decoupled.h"

namespace kdkernels {

constexpr double kLeastMass = 1e-7;  // that Tail::bucket takes a teacher to leave outside S

// What the teacher gives to S and W: the student has no part in it.
template <class Real>
struct TeacherMass {
  Real log_strong;    // log(P_S) as given; -inf where S has no ids or they have no mass
  Real strong, weak;  // P_S and P_W as Tail::bucket takes them, 1 together
  Real odds;          // log(P_S / P_W)
  bool some_ids, all_ids;

  // log_mass: logsumexp of the log-probabilities as given. ids: how many tokens are in S.
  static KD_INLINE TeacherMass make(double log_mass, int64_t ids, int64_t vocab_size) {
    const double left = -std::expm1(log_mass), weak = left > kLeastMass ? left : kLeastMass;
    const double log_strong = left > kLeastMass ? log_mass : std::log1p(-kLeastMass);
    return {Real(log_mass), Real(1 - weak), Real(weak), Real(log_strong - std::log(weak)), ids != 0, ids == vocab_size};
  }
  KD_INLINE bool has_mass() const { return log_strong > -__builtin_inff(); }
  // Whether no probability lies outside S, or none is asked for.
  KD_INLINE bool within_alone(Tail tail) const { return tail == Tail::renormalize || (tail == Tail::bucket && all_ids); }
  KD_INLINE bool nothing(Tail tail) const { return !some_ids || (!has_mass() && tail != Tail::bucket); }
};

template <class Real>
struct SparseRow {
  Real within = 0, moved = 0, offset = 0;
  Real student_strong, student_weak;  // Q_S, Q_W

  // student_odds: logsumexp of the student's logits over S minus that over W, each summed directly; -inf and +inf where
  // one of them has no mass. NaN where W is not read, which is for Tail::renormalize.
  static KD_INLINE SparseRow make(Tail tail, const TeacherMass<Real>& teacher, Real student_odds) {
    SparseRow row = factors(tail, teacher, student_odds);
    row.offset = offset_of(tail, teacher, student_odds);
    return row;
  }

  // What the gradient needs, in few steps: the offset is left 0.
  static KD_INLINE SparseRow factors(Tail tail, const TeacherMass<Real>& teacher, Real student_odds) {
    const Real ratio = std::exp(-std::fabs(student_odds)), larger = 1 / (1 + ratio), smaller = ratio * larger;
    SparseRow row;
    row.student_strong = student_odds < 0 ? smaller : larger, row.student_weak = student_odds < 0 ? larger : smaller;
    if (teacher.nothing(tail)) return row;
    if (teacher.within_alone(tail)) {
      row.within = teacher.has_mass() ? Real(1) : Real(0);
    } else if (tail == Tail::bucket) {
      const Real gap = teacher.odds - student_odds;
      row.within = teacher.has_mass() ? teacher.strong : Real(0);
      // Q_S·P_W - P_S·Q_W, with one product written through the other
      if (gap > 0)
        row.moved = teacher.strong * row.student_weak * std::expm1(-gap);
      else if (gap <= 0)
        row.moved = -(row.student_strong * teacher.weak * std::expm1(gap));
    } else {
      row.within = tail == Tail::teacher ? Real(1) : std::exp(teacher.log_strong);
      row.moved = -row.within * row.student_weak;
    }
    return row;
  }

  static KD_INLINE Real offset_of(Tail tail, const TeacherMass<Real>& teacher, Real student_odds) {
    if (teacher.nothing(tail) || teacher.within_alone(tail)) return 0;
    if (tail == Tail::bucket) return SetMasses<Real>::make(teacher.odds, student_odds, teacher.odds - student_odds).bcd;
    const Real log_strong = log_mass(student_odds);
    if (tail == Tail::teacher) return -log_strong;
    return weighted(std::exp(teacher.log_strong), teacher.log_strong - log_strong);
  }

  KD_INLINE Real loss(Real divergence) const { return weighted(within, divergence) + offset; }
};

}  // namespace kdkernels
