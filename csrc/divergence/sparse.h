// Sparse teachers: what a row's loss and gradient are made of, from the teacher's mass P_S of the given ids S and the
// student's log-odds of S against the rest W. With D the divergence within S (both models normalised there), gap its
// T·dD/dlogit, and q~ the student within S, or within W,
//     loss = within·D + offset,   T·gradient = within·gap + moved·q~ in S, -moved·q~ in W
// `Real` is double or float; the teacher's mass is always double: what it leaves outside S is a difference.
#pragma once
#include <cmath>

#include "../rows.h"
#include "decoupled.h"

namespace kdkernels {

constexpr double kLeastMass = 1e-7;  // that Tail::bucket takes a teacher to leave outside S

template <class Real>
struct SparseRow {
  Real within = 0, moved = 0, offset = 0;
  Real student_strong, student_weak;  // Q_S, Q_W

  // log_mass: logsumexp of the log-probabilities as given, -inf where S has no ids or they have no mass.
  // student_odds: logsumexp of the student's logits over S minus that over W, each summed directly; -inf and +inf where
  // one of them has no mass. NaN where W is not read, which is for Tail::renormalize.
  // ids: how many tokens are in S.
  static KD_INLINE SparseRow make(Tail tail, double log_mass, Real student_odds, int64_t ids, int64_t vocab_size) {
    const Real log_strong = kdkernels::log_mass(student_odds);
    SparseRow row;
    row.student_strong = std::exp(log_strong);
    row.student_weak = std::exp(kdkernels::log_mass(-student_odds));
    const bool has_mass = log_mass > -__builtin_inf();
    if (ids == 0 || (!has_mass && tail != Tail::bucket)) return row;
    if (tail == Tail::renormalize || (tail == Tail::bucket && ids == vocab_size)) {
      row.within = has_mass ? Real(1) : Real(0);
    } else if (tail == Tail::bucket) {
      const double left = -std::expm1(log_mass);
      const double log_strong_mass = left > kLeastMass ? log_mass : std::log1p(-kLeastMass);
      const Real odds = Real(log_strong_mass - std::log(left > kLeastMass ? left : kLeastMass));
      const auto masses = SetMasses<Real>::make(odds, student_odds, odds - student_odds);
      row.within = masses.teacher_strong, row.moved = masses.moved, row.offset = masses.bcd;
    } else if (tail == Tail::teacher) {
      row.within = 1, row.moved = -row.student_weak, row.offset = -log_strong;
    } else {
      row.within = Real(std::exp(log_mass));
      row.moved = -row.within * row.student_weak;
      row.offset = weighted(row.within, Real(log_mass) - log_strong);
    }
    return row;
  }

  KD_INLINE Real loss(Real divergence) const { return weighted(within, divergence) + offset; }
};

}  // namespace kdkernels
