// The sweep for adaptive KL (AKL, arXiv 2404.02657): forward and reverse KL, mixed by how far the models are apart in
// the teacher's head and in its tail. The weights are constants to the gradient.
#pragma once
#include "split.h"
#include "sweep.h"

namespace kdkernels {
namespace {

template <class Math>
class AdaptiveSweep : WholeRow<Math> {
  using Base = WholeRow<Math>;

 public:
  explicit AdaptiveSweep(const RowProblem& problem) : Base(problem), head_(problem) {}

  void run(int64_t row) {
    typename Base::Prepared prepared;
    if (!this->begin(row) || !this->prepare(prepared)) return;
    head_.choose(row, 0, this->inv_temperature_, [this](int64_t b) { return this->read_teacher(b); });
    double apart[2];
    sweep_apart(prepared.constants, apart);
    const double total = apart[kStrong] + apart[kWeak];
    const double tail[1] = {total > 0 ? apart[kWeak] / total : 0};  // SymmetricKL's weight, that of reverse KL
    // With a weight of 0, the other side's divergence does not count even where it is infinite.
    if (tail[0] == 0)
      this->finish(prepared, ForwardKL<Math>(tail, prepared.constants));
    else if (tail[0] == 1)
      this->finish(prepared, ReverseKL<Math>(tail, prepared.constants));
    else
      this->finish(prepared, SymmetricKL<Math>(tail, prepared.constants));
  }

 private:
  // 1/2·sum |p - q| over head and tail.
  void sweep_apart(const RowConstants<Math>& row, double* apart) {
    const RowConstants<Math> both[2] = {row, row};
    const TotalVariation<Math> variation(nullptr, row);
    Sums sums[2];
    for (int64_t b = this->blocks() - 1; b >= 0; b--) {
      const auto [student, teacher, n] = this->read(b);
      const auto members = head_.of(b, teacher, this->columns(b));
      add_split_sums(student, teacher, members, n, both, variation, sums);
    }
    for (int set : {kStrong, kWeak}) apart[set] = sums[set].value;
  }

  StrongTokens<Math> head_;
};

}  // namespace
}  // namespace kdkernels
