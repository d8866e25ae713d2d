// What consumers of the decoupled divergences need between their sweeps: sums per set, their logarithms, the terms, and
// the gradient's factors; and their rows' reports.
#pragma once
#include "../divergence/decoupled.h"
#include "split.cuh"

namespace kdkernels::cuda {

constexpr int kStrong = 0, kWeak = 1;

struct DecoupledNumbers {
  Turn turn;
  bool sets_apart;  // a set's sums do not stand against the row's references
  float student_reference, teacher_reference;
  float student_sum[2], teacher_sum[2];  // of e^((z - reference)/T), by set
  float divergence[2];                   // within the sets, roughly
  float log_gap[2];                      // log of teacher_sum minus log of student_sum, by set
  float student_lse, teacher_lse;        // in base 2, for FarColumn
  float by_q[2], by_p[2];                // factors of a far gradient
  float kd, ce, folded_ce, hard_factor;
  float weight[3];  // of BCD, SCD, WCD as given
  // For the report.
  uint32_t row;
  float scale, temperature, cross_entropy, student_log, teacher_log;  // logs of the whole sums
  TermWeights<float> weights;       // masses included
  float bcd, strong_mass_teacher, strong_mass_student;
};
static_assert(sizeof(DecoupledNumbers) <= sizeof(ExchangeMemory::numbers[0]));

__device__ __forceinline__ DecoupledNumbers& decoupled_numbers(ExchangeMemory* memory, int buffer) {
  return *reinterpret_cast<DecoupledNumbers*>(memory->numbers[buffer]);
}

// A warp's parcel holds the weak set's sums in the order of the first three of StatisticSums, and in v[4] to v[7] what it
// has there of the whole row; the strong set's sums lie in the split's memory.
template <class T, Split Kind>
class DecoupledTotals : public Totals<T, ForwardKL> {
  using Base = Totals<T, ForwardKL>;
  using Math = FloatMath;
  using Base::blocks_;
  using Base::headers_;
  using Base::lane_;
  using Base::memory_;
  using Base::p_;
  using Base::problem_;
  using Base::rank_;
  using Base::warps_;

 public:
  __device__ DecoupledTotals(const ClusterProblem& problem, const Ring<T>& ring, ExchangeMemory* memory, int blocks, int rank,
                             int warps, int lane, SplitMemory<T>* split, uint32_t* counts)
      : Base(problem, ring.headers, memory, blocks, rank, warps, lane), split_(split),
        select_(problem, &split->select, counts, blocks, rank, lane) {
#pragma unroll
    for (int i = 0; i < 3; i++)
      weight_[i] = p_.weights ? static_cast<const float*>(p_.weights)[i] : problem.parameters[i];
  }

  __device__ void serve(bool second) {
    second_ = second;
    for (int n = 0;; n++) {
      const int b = n % ExchangeMemory::kInFlight;
      barrier_wait(shared_address(&memory_->posted[b]), n / ExchangeMemory::kInFlight & 1);
      const Request request = memory_->request[b];
      if (request.what == Wanted::nothing_more) return;
      if (!is_own(request, Kind, second)) continue;
      Parcel part;
      if (lane_ < warps_) part = memory_->of_warps[b][lane_];
      switch (request.what) {
        case Wanted::select:
          if constexpr (is_threshold(Kind)) select(part, request);
          break;
        case Wanted::statistics: statistics(part, request); break;
        case Wanted::sums: sums(part, request, memory_->result[b]); break;
        default: top(part, memory_->result[b]);
      }
      __syncwarp();
      if (lane_ == 0) barrier_arrive(shared_address(&memory_->ready[b]));
    }
  }

 private:
  __device__ void select(const Parcel& part, const Request& request) {
    float v[4] = {part.v[0], part.v[1], 0, 0};
    select_.round(warp_sums(v, lane_), request, headers_[request.slot].log2e_over_temperature);
  }

  __device__ void top(const Parcel& part, Parcel& result) {
    Base::top(part, result);
    __syncwarp();
    select_.set_maximum(result.v[0]);
  }

  // The values within the sets, where the gradient's sweep found them.
  __device__ void sums(const Parcel& part, const Request& request, Parcel& result) {
    this->add(part, result);
    __syncwarp();
    if (request.is_value && lane_ == 0)
      report(decoupled_numbers(memory_, request.buffer), result.v[kStrong], result.v[kWeak]);
  }

  struct Sums {
    float v[2][3];  // student, teacher, forward, by set
    float a, b, hard;
  };

  __device__ void statistics(const Parcel& weak, const Request& request) {
    const RowHeader row = headers_[request.slot];
    const float label_logit = this->read_label_logit(row, request.row);
    const float k = row.log2e_over_temperature;
    const bool hard = problem_.with_ce && row.temperature != 1;
    Sums parts;
#pragma unroll
    for (int i = 0; i < 3; i++) {
      parts.v[kStrong][i] = lane_ < warps_ ? split_->strong_of_warps[request.buffer][i][lane_] : 0;
      parts.v[kWeak][i] = weak.v[i];
    }
    parts.a = lane_ < warps_ ? weak.v[4] : kPadding, parts.b = lane_ < warps_ ? weak.v[5] : kPadding, parts.hard = weak.v[6];
    Sums all = add_up(parts, k, weak.v[7], hard);
    if (blocks_ > 1) all = add_up(across(all), k, 0, hard);
    DecoupledNumbers n = numbers(all, row, hard);
    n.row = request.row;
    n.cross_entropy = problem_.with_ce ? this->hard_log_ - (label_logit - n.student_reference) : 0;
    if (lane_ == 0) {
      decoupled_numbers(memory_, request.buffer) = n;
      if (n.turn == Turn::far) report(n, n.divergence[kStrong], n.divergence[kWeak]);
      if (n.turn == Turn::nan) report_nan(request.row);
    }
  }

  // Parts of a row, one a lane, to the sums of them all, in every lane. A reference of kPadding: nothing but -inf.
  __device__ Sums add_up(const Sums& part, float k, float rounding, bool hard) const {
    Sums all;
    all.a = warp_max(part.a), all.b = warp_max(part.b);
    const float moved = (part.b - part.a) - (all.b - all.a);
    const float by_student = part.a > kPadding ? Math::exp2((part.a - all.a) * k - rounding) : 0;
    const float by_teacher = part.b > kPadding ? Math::exp2((part.b - all.b) * k - rounding) : 0;
    float v[8];
#pragma unroll
    for (int set = kStrong; set <= kWeak; set++) {
      const float* x = part.v[set];
      v[4 * set] = x[0] * by_student, v[4 * set + 1] = x[1] * by_teacher;
      v[4 * set + 2] = fmaf(moved, x[1], x[2]) * by_teacher;
    }
    v[3] = hard && part.a > kPadding ? part.hard * Math::exp2((part.a - all.a) * kLog2Ef) : 0, v[7] = 0;
    const float total = warp_sums(v, lane_);
#pragma unroll
    for (int set = kStrong; set <= kWeak; set++)
      for (int i = 0; i < 3; i++) all.v[set][i] = __shfl_sync(kAllLanes, total, 16 * set + 4 * i);
    all.hard = __shfl_sync(kAllLanes, total, 12);
    return all;
  }

  // Every block's sums to every block; lane i returns those of block i.
  __device__ Sums across(const Sums& mine) {
    constexpr int kValues = 9;
    const float values[kValues] = {mine.v[0][0], mine.v[0][1], mine.v[0][2], mine.v[1][0], mine.v[1][1], mine.v[1][2], mine.a, mine.b, mine.hard};
    const int b = statistics_ & 1;
    const uint32_t barrier = shared_address(&split_->sent[second_][b]);
    if (lane_ < blocks_)
#pragma unroll
      for (int i = 0; i < kValues; i++)
        store_remote(address_in(shared_address(&split_->of_blocks[second_][b][i][rank_]), lane_), values[i], address_in(barrier, lane_));
    if (lane_ == 0) barrier_arrive_expecting(barrier, kValues * blocks_ * 4);
    barrier_wait_cluster(barrier, statistics_ >> 1 & 1);
    statistics_++;
    float theirs[kValues];
#pragma unroll
    for (int i = 0; i < kValues; i++) theirs[i] = lane_ < blocks_ ? split_->of_blocks[second_][b][i][lane_] : 0;
    Sums out{{{theirs[0], theirs[1], theirs[2]}, {theirs[3], theirs[4], theirs[5]}}, theirs[6], theirs[7], theirs[8]};
    if (lane_ >= blocks_) out.a = out.b = kPadding;
    return out;
  }

  __device__ DecoupledNumbers numbers(const Sums& sums, const RowHeader& row, bool hard) {
    DecoupledNumbers n;
    const float inv_temperature = reciprocal(row.temperature), k = row.log2e_over_temperature;
    float student = 0, teacher = 0;
    bool apart = false;
#pragma unroll
    for (int set = kStrong; set <= kWeak; set++) {
      n.student_sum[set] = sums.v[set][0], n.teacher_sum[set] = sums.v[set][1];
      student += n.student_sum[set], teacher += n.teacher_sum[set];
      apart = apart || !(fminf(n.student_sum[set], n.teacher_sum[set]) > 1e-20f);
    }
    n.scale = row.scale, n.temperature = row.temperature;
    n.student_reference = sums.a, n.teacher_reference = sums.b;
#pragma unroll
    for (int i = 0; i < 3; i++) n.weight[i] = weight_[i];
    const float max_gap = sums.b - sums.a, hard_sum = hard ? sums.hard : student;
    const bool good = is_positive_finite(student) && is_positive_finite(teacher) && is_positive_finite(hard_sum) &&
                      isfinite(max_gap) && is_positive_finite(row.temperature) && row.label >= 0;
    n.hard_factor = this->set_factors(n, row, hard, inv_temperature) ? n.ce * reciprocal(hard_sum) : 0;
    // Logarithms, a lane each: of the sets' sums, of both whole sums, of the cross-entropy's.
    const float which = lane_ == 0   ? n.student_sum[kStrong]
                        : lane_ == 1 ? n.teacher_sum[kStrong]
                        : lane_ == 2 ? n.student_sum[kWeak]
                        : lane_ == 3 ? n.teacher_sum[kWeak]
                        : lane_ == 4 ? student
                        : lane_ == 5 ? teacher
                                     : hard_sum;
    const Logarithm mine = Logarithm::of(which);
    auto logarithm = [&](int lane) {
      return Logarithm{__shfl_sync(kAllLanes, mine.exponent, lane), __shfl_sync(kAllLanes, mine.rest, lane)};
    };
    n.log_gap[kStrong] = log_ratio(logarithm(1), logarithm(0)), n.log_gap[kWeak] = log_ratio(logarithm(3), logarithm(2));
    const Logarithm of_student = logarithm(4), of_teacher = logarithm(5);
    n.student_log = of_student.natural(), n.teacher_log = of_teacher.natural();
    this->hard_log_ = logarithm(6).natural();
#pragma unroll
    for (int set = kStrong; set <= kWeak; set++)
      n.divergence[set] = fmaxf(0, fmaf(sums.v[set][2] * reciprocal(n.teacher_sum[set]), inv_temperature, -n.log_gap[set]));
    if constexpr (Kind == Split::label) n.divergence[kStrong] = 0;
    n.sets_apart = apart;
    n.turn = good ? Turn::everywhere : Turn::nan;
    if constexpr (Base::kFar)
      if (good && !apart && short_forms<T>(problem_)) {
        // Plain differences, which models far apart allow.
        const float inv_student = reciprocal(student), inv_teacher = reciprocal(teacher), whole_gap = log_ratio(of_teacher, of_student);
        SetMasses<float> m;
        m.student_strong = n.student_sum[kStrong] * inv_student, m.student_weak = n.student_sum[kWeak] * inv_student;
        m.teacher_strong = n.teacher_sum[kStrong] * inv_teacher, m.teacher_weak = n.teacher_sum[kWeak] * inv_teacher;
        m.moved = m.teacher_weak < 0.5f ? m.teacher_weak - m.student_weak : m.student_strong - m.teacher_strong;
        m.bcd = m.teacher_strong * (n.log_gap[kStrong] - whole_gap) + m.teacher_weak * (n.log_gap[kWeak] - whole_gap);
        m.bcd = fmaxf(0, m.bcd);
        set_terms(n, m, problem_.parameters[3] != 0);
        const float value = n.weights.total(n.bcd, n.divergence[kStrong], n.divergence[kWeak]);
        const float term_weight[2] = {n.weights.scd, n.weights.wcd};
        float most = n.weights.bcd;
        bool agree = false;  // in a set of weight, where plain differences would lose their digits
#pragma unroll
        for (int set = kStrong; set <= kWeak; set++) {
          most = fmaxf(most, term_weight[set] * fmaxf(1, 0.5f * fabsf(n.log_gap[set])));
          agree = agree || (n.divergence[set] < 0.05f && term_weight[set] > 0.02f * value);
        }
        const float gap = fmaf(max_gap, k, whole_gap * kLog2Ef);
        // A NaN, of a column that is -inf in both models, fails the comparison.
        if (!agree && value >= 0.25f * most && value > 0 && value < 1e30f && fabsf(gap) < 24) n.turn = Turn::far;
        float student_rest, teacher_rest;
        n.student_lse = this->log2_normaliser(sums.a, k, of_student, student_rest);
        n.teacher_lse = this->log2_normaliser(sums.b, k, of_teacher, teacher_rest);
        const float exact_q = Math::exp2(-student_rest), exact_p = Math::exp2(-teacher_rest);
        const SetFactors<float> strong = n.weights.strong(m), weak = n.weights.weak(m);
        n.by_q[kStrong] = fmaf(n.kd * (strong.student + strong.slope), reciprocal(m.student_strong), n.folded_ce) * exact_q;
        n.by_q[kWeak] = fmaf(n.kd * (weak.student + weak.slope), reciprocal(m.student_weak), n.folded_ce) * exact_q;
        n.by_p[kStrong] = -n.kd * strong.slope * reciprocal(m.teacher_strong) * exact_p;
        n.by_p[kWeak] = -n.kd * weak.slope * reciprocal(m.teacher_weak) * exact_p;
      }
    return n;
  }

 public:
  // What follows from the masses.
  static __device__ void set_terms(DecoupledNumbers& n, const SetMasses<float>& m, bool mass_weighted) {
    n.bcd = m.bcd, n.strong_mass_teacher = m.teacher_strong, n.strong_mass_student = m.student_strong;
    n.weights = TermWeights<float>::make(n.weight[0], n.weight[1], n.weight[2], mass_weighted, m);
    if constexpr (Kind == Split::label) n.weights.scd = 0;  // of one token, p~ = q~
  }

 private:
  __device__ void report(const DecoupledNumbers& n, float strong, float weak) const {
    if (rank_ != 0) return;
    Base::report(n, n.weights.total(n.bcd, strong, weak));
    write_terms(p_, n.row, n.bcd, strong, weak, n.strong_mass_teacher, n.strong_mass_student);
  }
  __device__ void report_nan(uint32_t row) const {
    const float nan = __builtin_nanf("");
    if (rank_ != 0) return;
    Base::write_report(p_, row, nan, nan, nan, nan, nan);
    write_terms(p_, row, nan, nan, nan, nan, nan);
  }

 public:
  static __device__ void write_terms(const RowProblem& p, uint32_t row, float bcd, float strong, float weak, float teacher, float student) {
    float* stats = static_cast<float*>(p.stats) + row;
    stats[4 * p.rows] = bcd, stats[5 * p.rows] = strong, stats[6 * p.rows] = weak;
    stats[7 * p.rows] = teacher, stats[8 * p.rows] = student;
  }

 private:
  SplitMemory<T>* split_;
  SelectTotals<T, Kind == Split::top_p> select_;
  int statistics_ = 0;
  bool second_ = false;
  float weight_[3];
};

}  // namespace kdkernels::cuda
