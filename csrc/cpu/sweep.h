// The sweeps over one row for a pointwise divergence: statistics -> (sums) -> gradient. Each works block by block, so
// that the row pair stays in L2 between the sweeps.
#pragma once
#include "row.h"

namespace kdkernels {
namespace {

// A row whose softmaxes are over the whole vocabulary.
template <class Math>
class WholeRow : protected Row<Math> {
 protected:
  using Base = Row<Math>;
  using Base::p_, Base::blocks, Base::read, Base::inv_temperature_, Base::own_hard_sum_;

  struct Prepared {
    Statistics statistics;
    RowConstants<Math> constants;
  };

  explicit WholeRow(const RowProblem& problem) : Base(problem) {}

  // What a divergence's gradient needs to know of the row.
  struct Slopes {
    double mean = 0, pivot = 0;
  };

  // False: the row has no distributions (NaN, +inf, or -inf throughout), which has been written.
  bool prepare(Prepared& row) {
    row.statistics = statistics();
    if (prepare_constants(row)) return true;
    this->put_all(NAN);
    return false;
  }

  Statistics statistics() {
    Statistics st;
    for (int64_t b = 0; b < blocks(); b++) {
      const auto [student, teacher, n] = read(b);
      statistics_block<Math>(student, teacher, n, b, this->ahead(b + 1), inv_temperature_, own_hard_sum_,
                             p_.gradient && kRefineBelow<Math> > 0, st);
    }
    return st;
  }

  // False: these statistics are of no two distributions.
  bool prepare_constants(Prepared& row) {
    const Statistics& st = row.statistics;
    const double gap_of_logs = std::log(st.teacher_sum) - std::log(st.student_sum);
    const double max_gap = st.teacher_max - st.student_max;
    if (!std::isfinite(max_gap + gap_of_logs)) return false;
    const double shift = std::trunc(max_gap / 4) * 4;
    double gap = (max_gap - shift) * inv_temperature_ + gap_of_logs;
    if (p_.gradient && st.variance() < kRefineBelow<Math> * kRefineBelow<Math>) {
      const auto rough = this->constants(st, shift, gap);
      gap -= sums(rough, ForwardKL<Math>(p_.parameters, rough), 0).slope;
    }
    row.constants = this->constants(st, shift, gap);
    return true;
  }

  // The divergence and its slopes; 0 where both come with the gradient, or the slopes are not needed.
  template <class D>
  double measure(const Prepared& row, const D& divergence, Slopes& slopes) {
    if (D::slopes_sum_to_zero && p_.gradient) return 0;
    if (!D::slopes_sum_to_zero) slopes.pivot = derivative_at_top(row, divergence);
    const Sums s = sums(row.constants, divergence, slopes.pivot);
    if (!D::slopes_sum_to_zero) slopes.mean = s.slope;
    return s.value;
  }

  template <class D>
  void finish(const Prepared& row, const D& divergence) {
    const Statistics& st = row.statistics;
    Slopes slopes;
    double value = measure(row, divergence, slopes);
    const HardSoftmax hard{st.student_max, own_hard_sum_ ? st.hard_sum : st.student_sum};
    const double cross_entropy = this->cross_entropy(hard);
    if (p_.gradient) {
      const double kd = this->kd_factor(), by_student = this->shared_ce_factor() - kd * slopes.mean;
      double values = 0;
      this->write_gradient(hard, [&](int64_t, const auto* student, const auto* teacher, int n, bool stream, auto* out) {
        values += gradient_block<Math>(student, teacher, n, row.constants, divergence, slopes.pivot, kd, by_student,
                                       stream, out);
      });
      if (D::slopes_sum_to_zero) value = values;
    }
    this->put_stat(0, st.student_max * inv_temperature_ + std::log(st.student_sum));
    this->put_stat(1, st.teacher_max * inv_temperature_ + std::log(st.teacher_sum));
    this->put_loss(value, cross_entropy);
  }

 private:
  // h = dD/dq at the student's largest logit.
  template <class D>
  double derivative_at_top(const Prepared& row, const D& divergence) {
    const auto [student, teacher, n] = read(row.statistics.top_block);
    int top = 0;
    while (top < n - 1 && double(student[top]) != row.statistics.student_max) top++;
    const auto c = Column<Math>::make(Math::set(student[top]), Math::set(teacher[top]), row.constants);
    return finite_or_zero(Math::largest(divergence.derivative(c)));
  }

  // From the row's end: what the sweep before left in the cache is used first.
  template <class D>
  Sums sums(const RowConstants<Math>& row, const D& divergence, double pivot) {
    Sums total;
    for (int64_t b = blocks() - 1; b >= 0; b--) {
      const auto [student, teacher, n] = read(b);
      const Sums s = sums_block(student, teacher, n, row, divergence, pivot);
      total.value += s.value, total.slope += s.slope;
    }
    return total;
  }
};

template <class Math, template <class> class Divergence>
class PointwiseSweep : WholeRow<Math> {
 public:
  explicit PointwiseSweep(const RowProblem& problem) : WholeRow<Math>(problem) {}

  void run(int64_t row) {
    typename WholeRow<Math>::Prepared prepared;
    if (!this->begin(row) || !this->prepare(prepared)) return;
    this->finish(prepared, Divergence<Math>(this->p_.parameters, prepared.constants));
  }
};

}  // namespace
}  // namespace kdkernels
