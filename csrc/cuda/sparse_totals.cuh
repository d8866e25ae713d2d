// The totals of a sparse teacher's rows.
#pragma once
#include "sparse_warps.cuh"

namespace kdkernels::cuda {

// The warp that makes a row's numbers of all sums, and reports it.
template <class T>
class SparseTotals : Totals<T, ForwardKL> {
  using Base = Totals<T, ForwardKL>;
  using Math = FloatMath;
  using Base::across;
  using Base::blocks_;
  using Base::headers_;
  using Base::lane_;
  using Base::memory_;
  using Base::p_;
  using Base::problem_;
  using Base::rank_;
  using Base::warps_;

 public:
  __device__ SparseTotals(const ClusterProblem& problem, const RowHeader* headers, ExchangeMemory* memory, SparseMemory* sparse,
                          int blocks, int rank, int warps, int lane)
      : Base(problem, headers, memory, blocks, rank, warps, lane), sparse_(sparse) {}

  __device__ void serve(uint32_t first_row, uint32_t row_step) {
    wait_for_launch_before();
    uint32_t row = first_row;
    IdsRow found = prepared(row);  // on its way while the row is swept
    for (int n = 0;; n++) {
      const int b = n % ExchangeMemory::kInFlight;
      barrier_wait(shared_address(&memory_->posted[b]), n / ExchangeMemory::kInFlight & 1);
      const Request request = memory_->request[b];
      if (request.what == Wanted::nothing_more) return;
      Parcel part;
      if (lane_ < warps_) part = memory_->of_warps[b][lane_];
      const int ordinal = int((request.row - first_row) / row_step);
      if (request.row != row) found = prepared(request.row);
      const Report report = statistics(part, request, found, ordinal);
      __syncwarp();
      if (lane_ == 0) barrier_arrive(shared_address(&memory_->ready[b]));
      const IdsRow of_report = found;
      row = request.row + row_step, found = prepared(row);
      if (lane_ == 0 && rank_ == 0) write(request.row, of_report, report);  // which nobody waits for
    }
  }

 private:
  __device__ IdsRow prepared(uint32_t row) const { return row < uint32_t(p_.rows) ? problem_.sparse.rows[row] : IdsRow{}; }

  struct All {
    float sum, hard, reference, largest;
  };
  struct Report {
    bool good;
    float scale, temperature, inv_temperature, reference, total, hard_total, student_odds, largest;
    SparseRow<float> terms;
  };
  // Parts of a row, one a lane, to the sums of them all.
  __device__ All add_up(const Parcel& part, float k, bool counts) const {
    const float a = counts ? part.v[2] : kPadding;
    All all;
    all.reference = warp_max(a);
    float v[2] = {a > kPadding ? part.v[0] * Math::exp2((a - all.reference) * k) : (counts ? part.v[0] : 0),
                  a > kPadding ? part.v[1] * Math::exp2((a - all.reference) * kLog2Ef) : 0};
    const float total = warp_sums(v, lane_);
    all.sum = __shfl_sync(kAllLanes, total, 0), all.hard = __shfl_sync(kAllLanes, total, 16);
    all.largest = warp_max(counts ? part.v[3] : -__builtin_inff());
    return all;
  }

  // In lane 0, what is left to report.
  __device__ Report statistics(Parcel part, const Request& request, const IdsRow& found, int ordinal) {
    const RowHeader row = headers_[request.slot];
    const float k = row.log2e_over_temperature;
    All rest = add_up(part, k, lane_ < warps_);
    if (blocks_ > 1) {
      const float which = lane_ < 8 ? rest.sum : lane_ < 16 ? rest.hard : lane_ < 24 ? rest.reference : rest.largest;
      part = across<4>(which);
      rest = add_up(part, k, lane_ < blocks_);
    }
    return lane_ == 0 ? finish(row, found, rest, sparse_->numbers[ordinal % SparseMemory::kRows]) : Report{};
  }

  // One thread's work: a few dozen numbers, none of which waits for another's memory.
  __device__ Report finish(const RowHeader& row, const IdsRow& found, const All& rest, SparseNumbers& out) const {
    const float temperature = row.temperature, inv_temperature = reciprocal(temperature), k = row.log2e_over_temperature;
    const bool hard = problem_.with_ce && temperature != 1;
    const float reference = fmaxf(found.student_reference, rest.reference);
    // Of all columns, to the larger reference.
    const float of_ids = found.student_sum > 0 ? found.student_sum * exp2f((found.student_reference - reference) * k) : 0;
    const float of_rest = rest.sum > 0 ? rest.sum * exp2f((rest.reference - reference) * k) : rest.sum;
    const float total = of_ids + of_rest;
    float hard_total = total;
    if (hard)
      hard_total = (found.student_sum > 0 ? found.hard_sum * exp2f((found.student_reference - reference) * kLog2Ef) : 0) +
                   (rest.sum > 0 ? rest.hard * exp2f((rest.reference - reference) * kLog2Ef) : 0);
    const bool good = !(found.flags & kInvalid) && is_positive_finite(total) && is_positive_finite(hard_total) && rest.sum >= 0 &&
                      is_positive_finite(temperature);
    const Logarithm of_inside = Logarithm::of(found.student_sum), of_outside = Logarithm::of(rest.sum);
    float student_odds = __builtin_inff();
    if (!(found.student_sum > 0))
      student_odds = -__builtin_inff();
    else if (rest.sum > 0)
      student_odds = fmaf(found.student_reference - rest.reference, inv_temperature, log_ratio(of_inside, of_outside));
    const auto terms = SparseRow<float>::factors(p_.sparse.tail, found.teacher, student_odds);
    const float by_scale = problem_.scale_gradient ? row.scale : 1.0f;
    const float kd = problem_.kd_weight * (problem_.scale_by_temperature ? temperature : inv_temperature) * by_scale;
    const float ce = problem_.with_ce ? problem_.ce_weight * by_scale : 0, folded = hard ? 0 : ce;
    SparseNumbers n{good, 0, rest.reference, 0, reference, kd * terms.within, fmaf(kd, terms.moved, folded * terms.student_strong), ce};
    if (rest.sum > 0) n.by_rest = fmaf(-kd, terms.moved, folded * terms.student_weak) / rest.sum;
    if (hard) n.by_hard = ce / hard_total;
    out = n;
    return {good, row.scale, temperature, inv_temperature, reference, total, hard_total, student_odds, rest.largest, terms};
  }

  __device__ void write(uint32_t row, const IdsRow& found, const Report& r) const {
    SparseRow<float> terms = r.terms;
    terms.offset = SparseRow<float>::offset_of(p_.sparse.tail, found.teacher, r.student_odds);
    const float cross_entropy = problem_.with_ce ? (r.reference - found.label_logit) + logf(r.hard_total) : 0;
    const float lse = fmaf(r.reference, r.inv_temperature, logf(r.total));
    const float agrees = found.top_logit > -__builtin_inff() && found.top_logit >= fmaxf(r.largest, found.student_reference);
    report_sparse(p_, row, r.good, r.scale, r.temperature,
                  {terms.loss(found.within), cross_entropy, lse, found.teacher_lse, found.teacher_mass, terms.student_strong, agrees});
  }

  SparseMemory* sparse_;
};

}  // namespace kdkernels::cuda
