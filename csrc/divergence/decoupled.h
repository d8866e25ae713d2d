// Decoupled divergences: what follows from the log-normalisers of a strong set S and of the rest W,
//     KL(p || q) = BCD + P_S·SCD + P_W·WCD     (CAKD, arXiv 2410.14741; with S = {label} DKD, arXiv 2203.08679)
// where P and Q are the teacher's and the student's masses of a set, BCD = KL([P_S, P_W] || [Q_S, Q_W]), and SCD and
// WCD are forward KL between the distributions within a set. Numbers of a row: `Real` is double or float.
#pragma once
#include <cmath>

#include "inline.h"

namespace kdkernels {

// e^k - 1 - k for k <= 0, accurate relative to itself.
template <class Real>
KD_INLINE Real phi_of(Real k) {
  if (k < Real(-0.5)) return std::expm1(k) - k;
  constexpr int last = sizeof(Real) == 4 ? 8 : 16;  // the term that is under the type's rounding at k = -1/2
  Real series = 1;
  for (int i = last; i > 2; i--) series = 1 + series * k / i;
  return k * k / 2 * series;
}

// 1 + (k - 1)·e^k for k <= 0, accurate relative to itself.
template <class Real>
KD_INLINE Real psi_of(Real k) {
  if (k > Real(-0.5)) return k * k + (k - 1) * phi_of(k);
  const Real e = std::exp(k);
  return e > 0 ? 1 + (k - 1) * e : Real(1);
}

// p·log(p/q) - p + q >= 0, given also d = log(p/q): +inf where q = 0 < p.
template <class Real>
KD_INLINE Real kl_term(Real p, Real q, Real d) {
  if (d > 0) return p > 0 ? p * phi_of(-d) : Real(0);
  return q * psi_of(d);
}

// log(1 / (1 + e^-odds)): the log-mass of a set from the log of its odds, which may be infinite.
template <class Real>
KD_INLINE Real log_mass(Real odds) {
  return odds < 0 ? odds - std::log1p(std::exp(odds)) : -std::log1p(std::exp(-odds));
}

// The masses of S and W, and of the two-way distributions [P_S, P_W] and [Q_S, Q_W] what their gradient needs.
template <class Real>
struct SetMasses {
  Real teacher_strong, teacher_weak, student_strong, student_weak;
  Real moved;                      // D = Q_S - P_S
  Real bcd;

  // From the log-odds log(P_S/P_W) and log(Q_S/Q_W), and their difference, which the caller knows to more digits where
  // the models nearly agree. Odds are -inf where S has no mass and +inf where W has none; if that holds for both models
  // (a set without tokens does this), the difference is NaN and the two-way distributions are equal.
  static KD_INLINE SetMasses make(Real teacher_odds, Real student_odds, Real difference) {
    const Real gap = difference != difference ? Real(0) : difference;
    const Real log_p_strong = log_mass(teacher_odds), log_p_weak = log_mass(-teacher_odds);
    const Real log_q_strong = log_mass(student_odds), log_q_weak = log_mass(-student_odds);
    SetMasses m;
    m.teacher_strong = std::exp(log_p_strong), m.teacher_weak = std::exp(log_p_weak);
    m.student_strong = std::exp(log_q_strong), m.student_weak = std::exp(log_q_weak);
    // Q_S·P_W - P_S·Q_W, with one product written through the other
    m.moved = gap > 0 ? m.teacher_strong * m.student_weak * std::expm1(-gap)
                      : -(m.student_strong * m.teacher_weak * std::expm1(gap));
    const bool near = std::fabs(gap) <= 1;
    const Real d_strong = near ? -std::log1p(m.student_weak * std::expm1(-gap)) : log_p_strong - log_q_strong;
    const Real d_weak = near ? -std::log1p(m.student_strong * std::expm1(gap)) : log_p_weak - log_q_weak;
    m.bcd = kl_term(m.teacher_strong, m.student_strong, d_strong) + kl_term(m.teacher_weak, m.student_weak, d_weak);
    return m;
  }
};

// 0·inf is 0: a term that is switched off does not count, however far apart the models are.
template <class Real>
KD_INLINE Real weighted(Real weight, Real term) {
  return weight != 0 ? weight * term : Real(0);
}

// A set's part of T·dD/dlogit, at a token of the set: slope·(q~ - p~) + student·q~.
template <class Real>
struct SetFactors {
  Real slope, student;
};

// What BCD, SCD and WCD are multiplied by in a row, masses included: constants to the gradient.
template <class Real>
struct TermWeights {
  Real bcd, scd, wcd;

  static KD_INLINE TermWeights make(Real bcd, Real scd, Real wcd, bool mass_weighted, const SetMasses<Real>& m) {
    if (!mass_weighted) return {bcd, scd, wcd};
    return {bcd, scd * m.teacher_strong, wcd * m.teacher_weak};
  }
  KD_INLINE Real total(Real of_bcd, Real of_scd, Real of_wcd) const {
    return weighted(bcd, of_bcd) + weighted(scd, of_scd) + weighted(wcd, of_wcd);
  }
  KD_INLINE SetFactors<Real> strong(const SetMasses<Real>& m) const { return {scd, bcd * m.moved}; }
  KD_INLINE SetFactors<Real> weak(const SetMasses<Real>& m) const { return {wcd, -(bcd * m.moved)}; }
};

}  // namespace kdkernels
