// The sweep for decoupled divergences: statistics of each set -> (sums) -> gradient. Either set has references and
// constants of its own, so that its inner distributions are exact however little of the row's mass it holds. Blocks
// that lie in one set, which most do, are swept as those of a pointwise divergence.
#pragma once
#include "../divergence/decoupled.h"
#include "row.h"
#include "split.h"

namespace kdkernels {
namespace {

template <class Math>
class DecoupledSweep : Row<Math> {
  using Base = Row<Math>;
  using Real = typename Math::Real;
  using Base::p_, Base::blocks, Base::read, Base::inv_temperature_, Base::own_hard_sum_, Base::put_stat;

 public:
  explicit DecoupledSweep(const RowProblem& problem) : Base(problem), tokens_(problem) {}

  void run(int64_t row) {
    if (!this->begin(row)) return;
    tokens_.choose(row, this->label_, inv_temperature_, [this](int64_t b) { return this->read_teacher(b); });
    sweep_statistics();
    if (!has_distributions()) return this->put_all(NAN);
    for (int set : {kStrong, kWeak}) prepare(set);
    if (wants_refinement()) refine();
    const auto masses = this->masses();
    const auto weights = term_weights(masses);
    double divergence[2] = {};
    const HardSoftmax hard = this->hard();
    const double cross_entropy = this->cross_entropy(hard);
    if (p_.gradient)
      write_gradient(hard, masses, weights, divergence);
    else
      sweep_values(divergence);
    const double scd = term(kStrong, divergence[kStrong]), wcd = term(kWeak, divergence[kWeak]);
    put_stat(0, log_add(student_lse(kStrong), student_lse(kWeak)));
    put_stat(1, log_add(teacher_lse(kStrong), teacher_lse(kWeak)));
    const double stats[] = {masses.bcd, scd, wcd, masses.teacher_strong, masses.student_strong};
    for (int i = 0; i < 5; i++) put_stat(4 + i, stats[i]);
    this->put_loss(weights.total(masses.bcd, scd, wcd), cross_entropy);
  }

 private:
  struct Set {
    Statistics statistics;
    int64_t tokens = 0;
    bool in_student = false, in_teacher = false;  // whether it has mass there
    double shift = 0, gap = 0;                    // see RowConstants
  };

  static double lse(double max, double sum, double inv_temperature) {
    return sum > 0 ? max * inv_temperature + std::log(sum) : -INFINITY;
  }
  double student_lse(int set) const {
    const Statistics& st = sets_[set].statistics;
    return lse(st.student_max, st.student_sum, inv_temperature_);
  }
  double teacher_lse(int set) const {
    const Statistics& st = sets_[set].statistics;
    return lse(st.teacher_max, st.teacher_sum, inv_temperature_);
  }

  void sweep_statistics() {
    sets_[kStrong] = sets_[kWeak] = Set();
    for (int64_t b = 0; b < blocks(); b++) {
      const auto [student, teacher, n] = read(b);
      const int columns = this->columns(b);
      const auto members = tokens_.of(b, teacher, columns);
      const int tokens[2] = {members.strong, columns - members.strong};
      for (int set : {kStrong, kWeak}) {
        if (tokens[set] == 0) continue;
        sets_[set].tokens += tokens[set];
        const Real *own_student = student, *own_teacher = teacher;
        if (tokens[set] != columns) {
          keep_set(student, members, n, set, own_student_);
          keep_set(teacher, members, n, set, own_teacher_);
          own_student = own_student_, own_teacher = own_teacher_;
        }
        statistics_block<Math>(own_student, own_teacher, n, b, this->ahead(b + 1), inv_temperature_, own_hard_sum_,
                               kRefineBelow<Math> > 0, sets_[set].statistics);
      }
    }
  }

  // Not so where a model has NaN or +inf, or -inf throughout.
  bool has_distributions() const {
    const Statistics &s = sets_[kStrong].statistics, &w = sets_[kWeak].statistics;
    const auto usable = [](double max_s, double max_w, double sum) {
      return max_s < INFINITY && max_w < INFINITY && sum > 0 && std::isfinite(sum);
    };
    return usable(s.student_max, w.student_max, s.student_sum + w.student_sum) &&
           usable(s.teacher_max, w.teacher_max, s.teacher_sum + w.teacher_sum);
  }

  void prepare(int set) {
    Set& s = sets_[set];
    const Statistics st = s.statistics.with_references();
    s.in_student = s.statistics.student_sum > 0, s.in_teacher = s.statistics.teacher_sum > 0;
    const double max_gap = st.teacher_max - st.student_max;
    s.shift = std::trunc(max_gap / 4) * 4;
    s.gap = (max_gap - s.shift) * inv_temperature_ + (std::log(st.teacher_sum) - std::log(st.student_sum));
    constants_[set] = this->constants(st, s.shift, s.gap);
  }

  // log(P/Q) of a set plus the same constant for both: the teacher's log-normaliser minus the student's.
  double log_mass_gap(int set) const {
    const Set& s = sets_[set];
    if (s.in_student && s.in_teacher) return s.gap + s.shift * inv_temperature_;
    return s.in_student ? -INFINITY : s.in_teacher ? INFINITY : NAN;
  }
  double log_odds_gap() const {
    const double strong = log_mass_gap(kStrong), weak = log_mass_gap(kWeak);
    return strong == weak ? 0 : std::isnan(strong) || std::isnan(weak) ? NAN : strong - weak;
  }

  // Where the models nearly agree inside a set, or on the masses, see kRefineBelow. One token's gap is exact.
  bool wants_refinement() const {
    if (!(kRefineBelow<Math> > 0)) return false;
    if (std::fabs(log_odds_gap()) < kRefineBelow<Math>) return true;
    for (const Set& s : sets_)
      if (s.tokens > 1 && s.statistics.variance() < kRefineBelow<Math> * kRefineBelow<Math>) return true;
    return false;
  }
  void refine() {
    Sums sums[2];
    sweep_sums(sums);
    for (int set : {kStrong, kWeak}) {
      Set& s = sets_[set];
      if (!s.in_student || !s.in_teacher || s.tokens == 1) continue;
      s.gap -= sums[set].slope;
      constants_[set] = this->constants(s.statistics, s.shift, s.gap);
    }
  }

  SetMasses<double> masses() const {
    return SetMasses<double>::make(teacher_lse(kStrong) - teacher_lse(kWeak), student_lse(kStrong) - student_lse(kWeak),
                                   log_odds_gap());
  }
  TermWeights<double> term_weights(const SetMasses<double>& masses) const {
    double w[3];
    for (int i = 0; i < 3; i++) w[i] = p_.weights ? this->number(p_.weights, i) : p_.parameters[i];
    for (int set : {kStrong, kWeak})
      if (!has_inner(set)) w[1 + set] = 0;
    return TermWeights<double>::make(w[0], w[1], w[2], p_.parameters[3] != 0, masses);
  }
  // Whether the distributions within the set can differ: not those over one token, nor without a teacher's.
  bool has_inner(int set) const {
    const Set& s = sets_[set];
    return s.in_teacher && !(s.in_student && s.tokens == 1);
  }
  // SCD or WCD, from the set's sum of values.
  double term(int set, double sum) const {
    if (!has_inner(set)) return 0;
    return sets_[set].in_student ? sum : INFINITY;
  }

  HardSoftmax hard() const {
    const Statistics &s = sets_[kStrong].statistics, &w = sets_[kWeak].statistics;
    const double max = s.student_max > w.student_max ? s.student_max : w.student_max;
    const auto part = [&](const Statistics& st) {
      const double sum = own_hard_sum_ ? st.hard_sum : st.student_sum;
      return sum > 0 ? sum * std::exp(st.student_max - max) : 0;
    };
    return {max, part(s) + part(w)};
  }

  // From the row's end: what the sweep before left in the cache is used first.
  void sweep_sums(Sums* sums) {
    for (int64_t b = blocks() - 1; b >= 0; b--) {
      const auto [student, teacher, n] = read(b);
      const int columns = this->columns(b);
      const auto members = tokens_.of(b, teacher, columns);
      const ForwardKL<Math> divergence(p_.parameters, constants_[kStrong]);
      if (members.strong != 0 && members.strong != columns) {
        add_split_sums(student, teacher, members, n, constants_, divergence, sums);
        continue;
      }
      const int set = members.strong == 0 ? kWeak : kStrong;
      const Sums s = sums_block(student, teacher, n, constants_[set], divergence, 0);
      sums[set].value += s.value, sums[set].slope += s.slope;
    }
  }
  void sweep_values(double* values) {
    Sums sums[2];
    sweep_sums(sums);
    for (int set : {kStrong, kWeak}) values[set] = sums[set].value;
  }

  void write_gradient(const HardSoftmax& hard, const SetMasses<double>& masses, const TermWeights<double>& weights,
                      double* values) {
    const double kd = this->kd_factor(), ce = this->shared_ce_factor();
    const SetFactors<double> strong = weights.strong(masses), weak = weights.weak(masses);
    const double slope[2] = {kd * strong.slope, kd * weak.slope};
    const double by_student[2] = {kd * strong.student + ce * masses.student_strong,
                                  kd * weak.student + ce * masses.student_weak};
    Base::write_gradient(hard, [&](int64_t b, const Real* student, const Real* teacher, int n, bool stream, Real* out) {
      const int columns = this->columns(b);
      const auto members = tokens_.of(b, teacher, columns);
      if (members.strong != 0 && members.strong != columns) {
        auto split = stream ? split_gradient_columns<true, Math> : split_gradient_columns<false, Math>;
        split(student, teacher, members, n, constants_, slope, by_student, out, values);
        return;
      }
      const int set = members.strong == 0 ? kWeak : kStrong;
      const ForwardKL<Math> divergence(p_.parameters, constants_[set]);
      values[set] += gradient_block<Math>(student, teacher, n, constants_[set], divergence, 0, slope[set],
                                          by_student[set], stream, out);
    });
  }

  StrongTokens<Math> tokens_;
  Set sets_[2];
  RowConstants<Math> constants_[2];
  alignas(64) Real own_student_[kBlock], own_teacher_[kBlock];
};

}  // namespace
}  // namespace kdkernels
