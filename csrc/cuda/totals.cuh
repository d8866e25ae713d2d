// The warp that turns consumers' sums into what they need next, and reports rows: loss and statistics are written here.
#pragma once
#include "../divergence/far.h"
#include "exchange.cuh"
#include "math.cuh"
#include "ring.cuh"

namespace kdkernels::cuda {

constexpr float kLog2Ef = 1.44269504f;
constexpr float kPadding = -1e30f;  // a logit without probability whose differences stay finite

// x = 2^exponent·m, sqrt(1/2) <= m < sqrt(2): log(x) in two numbers, so that differences of logarithms keep their digits.
struct Logarithm {
  int exponent;
  float rest;  // log(m)
  static __device__ Logarithm of(float x) {
    const int bits = __float_as_int(x), n = (bits - 0x3f3504f3) >> 23;
    return {n, logf(__int_as_float(bits - (n << 23)))};
  }
  __device__ float natural() const { return fmaf(float(exponent), kLn2f, rest); }
  __device__ float base2() const { return fmaf(rest, kLog2Ef, float(exponent)); }
};
__device__ inline float log_ratio(const Logarithm& a, const Logarithm& b) {
  return fmaf(float(a.exponent - b.exponent), kLn2f, a.rest - b.rest);
}

// To the last digit or so, without a division's special cases.
__device__ inline float reciprocal(float x) {
  const float r = FloatMath::reciprocal(x);
  return fmaf(r, fmaf(-x, r, 1.0f), r);
}

__device__ inline bool is_positive_finite(float x) { return x > 0 && x < __builtin_inff(); }

// Short forms leave about 1e-7 of the probabilities in a gradient: nothing in 16 bits, too much in 32.
template <class T>
__device__ __forceinline__ bool short_forms(const ClusterProblem& problem) {
  return sizeof(T) == 2 || problem.short_forms;
}

// What comes of a row's first sweep. References are whole numbers near the largest logits, so that their differences are
// exact.
enum class Turn : int { nan, far, everywhere };
struct RowNumbers {
  Turn turn;
  float student_reference, teacher_reference;
  float inv_student_sum, inv_teacher_sum, inv_hard_sum;  // of e^((z - reference)/T), and at temperature 1
  float student_log, teacher_log;                        // of the sums
  float gap_of_logs;                                     // teacher_log - student_log
  float forward_kl, reverse_kl;
  float student_lse, teacher_lse, gap;  // in base 2, for FarRow
  // The gradient's factors: of the divergence, of the cross-entropy, and of its column where that is folded into the
  // student's and where it is one of its own.
  float kd, ce, folded_ce, hard_factor;
  // For the report alone.
  uint32_t row;
  float scale, temperature, cross_entropy;
  alignas(16) unsigned char far[64];  // the divergence's Far, with this row's factors
};
static_assert(sizeof(RowNumbers) <= sizeof(ExchangeMemory::numbers[0]));

__device__ __forceinline__ RowNumbers& row_numbers(ExchangeMemory* memory, int buffer) {
  return *reinterpret_cast<RowNumbers*>(memory->numbers[buffer]);
}

// Sums of a part of a row, relative to its references: a warp's parcel holds them in this order.
struct StatisticSums {
  float student, teacher;  // of e^((z - reference)/T)
  float forward, reverse;  // of e^((y - reference)/T)·x and e^((z - reference)/T)·x,
                           // x = (y - teacher_reference) - (z - student_reference)
  float student_reference, teacher_reference;
  float hard;   // of e^(z - reference): the student at temperature 1
  float extra;  // of a warp's parcel: both models' exponents are larger by this; of more: the largest warp's `student`
};

template <class T, template <class> class Divergence>
class Totals {
  using Math = FloatMath;
  using FarD = Far<Divergence, Math>;

 public:
  static constexpr bool kFar = FarD::exists;

  __device__ Totals(const ClusterProblem& problem, const RowHeader* headers, ExchangeMemory* memory, int blocks, int rank, int warps, int lane)
      : problem_(problem), p_(problem.rows), headers_(headers), memory_(memory), far_(problem.parameters), blocks_(blocks), rank_(rank),
        warps_(warps), lane_(lane) {}

  __device__ void serve() {
    for (int n = 0;; n++) {
      const int b = n % ExchangeMemory::kInFlight;
      barrier_wait(shared_address(&memory_->posted[b]), n / ExchangeMemory::kInFlight & 1);
      const Request request = memory_->request[b];
      if (request.what == Wanted::nothing_more) return;
      Parcel part;
      if (lane_ < warps_) part = memory_->of_warps[b][lane_];
      if (request.what == Wanted::statistics)
        statistics(part, request);
      else if (request.what == Wanted::sums)
        sums(part, request, memory_->result[b]);
      else
        top(part, memory_->result[b]);
      __syncwarp();
      if (lane_ == 0) barrier_arrive(shared_address(&memory_->ready[b]));
    }
  }

 protected:
  // Value i of this block, in lanes i·32/N and on, to all blocks; lane i returns those of block i.
  template <int N>
  __device__ Parcel across(float mine) {
    constexpr int group = 32 / N;
    const int b = count_ & 1;
    const uint32_t barrier = shared_address(&memory_->sent[b]);
    const uint32_t to = shared_address(&memory_->of_blocks[b][lane_ / group][rank_]);
    for (int block = lane_ % group; block < blocks_; block += group)
      store_remote(address_in(to, block), mine, address_in(barrier, block));
    if (lane_ == 0) barrier_arrive_expecting(barrier, N * blocks_ * 4);
    barrier_wait_cluster(barrier, count_ >> 1 & 1);
    count_++;
    Parcel theirs;
    if (lane_ < blocks_)
#pragma unroll
      for (int i = 0; i < N; i++) theirs.v[i] = memory_->of_blocks[b][i][lane_];
    return theirs;
  }

  // Four sums over everyone, into the result; lane 0 returns the first.
  __device__ float add(Parcel part, Parcel& result) {
    float v[4] = {part.v[0], part.v[1], part.v[2], part.v[3]};
    float total = warp_sums(v, lane_);
    if (blocks_ > 1) {
      part = across<4>(total);
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = part.v[i];
      total = warp_sums(v, lane_);
    }
    if (lane_ % 8 == 0) result.v[lane_ / 8] = total;
    return total;
  }

  __device__ void sums(const Parcel& part, const Request& request, Parcel& result) {
    const float total = add(part, result);
    __syncwarp();
    if (request.is_value && lane_ == 0) {
      RowNumbers& n = row_numbers(memory_, request.buffer);
      float value = total;
      if constexpr (kFar && !FarD::from_kl)
        if (n.turn == Turn::far) {
          FarD& far = far_of(n);
          const FarSums<Math> far_sums = {result.v[0], result.v[1], result.v[2]};
          value = far.value(far_sums);
          if (!far.trusts(far_sums, value)) n.turn = Turn::everywhere;  // and another value comes
          far.scale(n.kd, fmaf(-n.kd, far.slope_sum(far_sums), n.folded_ce));
        }
      report(n, value);
    }
  }

  static __device__ FarD& far_of(RowNumbers& n) {
    static_assert(sizeof(FarD) <= sizeof(RowNumbers::far));
    return *reinterpret_cast<FarD*>(n.far);
  }

  __device__ void top(Parcel part, Parcel& result) {
    float x = lane_ < warps_ ? part.v[0] : -__builtin_inff(), y = part.v[1];
    warp_top(x, y);
    if (blocks_ > 1) {
      part = across<2>(lane_ < 16 ? x : y);
      x = lane_ < blocks_ ? part.v[0] : -__builtin_inff(), y = part.v[1];
      warp_top(x, y);
    }
    if (lane_ == 0) result.v[0] = x, result.v[1] = y;
  }

  __device__ void statistics(Parcel part, const Request& request) {
    const RowHeader row = headers_[request.slot];
    const float label_logit = read_label_logit(row, request.row);
    const float k = row.log2e_over_temperature;
    const bool hard = problem_.with_ce && row.temperature != 1;
    StatisticSums all = add_up(part, k, lane_ < warps_, true, hard);
    if (blocks_ > 1) {
      if (lane_ == 0) *reinterpret_cast<StatisticSums*>(memory_->of_warps_total) = all;
      __syncwarp();
      part = across<8>(memory_->of_warps_total[lane_ / 4]);
      all = add_up(part, k, lane_ < blocks_, false, hard);
    }
    RowNumbers n = numbers(all, row, hard);
    n.row = request.row;
    n.cross_entropy = problem_.with_ce ? hard_log_ - (label_logit - n.student_reference) : 0;
    if (lane_ == 0) {
      if constexpr (kFar)
        if (n.turn == Turn::far) {
          FarD& far = far_of(n);
          far = far_;
          far.normalise(by_q_, by_p_);
          if constexpr (FarD::from_kl) {
            far.scale(n.kd, fmaf(-n.kd, far.slope_sum(n.forward_kl, n.reverse_kl), n.folded_ce));
            report(n, far.value(n.forward_kl, n.reverse_kl));
          }
        }
      row_numbers(memory_, request.buffer) = n;
      if (n.turn == Turn::nan) report_nan(request.row);
    }
  }

  // The student's logit at the label, read before anyone may write a gradient over it.
  __device__ float read_label_logit(const RowHeader& header, uint32_t row) const {
    float logit = 0;
    if (problem_.with_ce && header.label >= 0 && rank_ == 0) logit = float(row_begin<T>(p_.student, row)[header.label]);
    return __shfl_sync(kAllLanes, logit, 0);  // it is here before anything goes out
  }

  // Parts of a row, one a lane, to the sums of them all. A reference of kPadding: nothing but -inf.
  __device__ StatisticSums add_up(const Parcel& part, float k, bool counts, bool of_warps, bool hard) const {
    const float a = counts ? part.v[4] : kPadding, b = counts ? part.v[5] : kPadding;
    const float rounding = of_warps ? part.v[7] : 0;
    StatisticSums all{};
    all.student_reference = warp_max(a), all.teacher_reference = warp_max(b);
    const float moved = (b - a) - (all.teacher_reference - all.student_reference);
    const float by_student = a > kPadding ? Math::exp2((a - all.student_reference) * k - rounding) : 0;
    const float by_teacher = b > kPadding ? Math::exp2((b - all.teacher_reference) * k - rounding) : 0;
    float v[4] = {part.v[0] * by_student, part.v[1] * by_teacher, fmaf(moved, part.v[1], part.v[2]) * by_teacher,
                  fmaf(moved, part.v[0], part.v[3]) * by_student};
    const float total = warp_sums(v, lane_);
    all.extra = warp_max((of_warps ? part.v[0] : part.v[7]) * by_student);
    all.student = __shfl_sync(kAllLanes, total, 0), all.teacher = __shfl_sync(kAllLanes, total, 8);
    all.forward = __shfl_sync(kAllLanes, total, 16), all.reverse = __shfl_sync(kAllLanes, total, 24);
    if (hard) {
      float h[1] = {a > kPadding ? part.v[6] * Math::exp2((a - all.student_reference) * kLog2Ef) : 0};
      all.hard = warp_sums(h, lane_);
    }
    return all;
  }

  __device__ RowNumbers numbers(const StatisticSums& sums, const RowHeader& row, bool hard) {
    RowNumbers n;
    const float k = row.log2e_over_temperature, inv_temperature = reciprocal(row.temperature);
    n.scale = row.scale, n.temperature = row.temperature;
    const bool own_column = set_factors(n, row, hard, inv_temperature);
    const float hard_sum = hard ? sums.hard : sums.student;
    const float max_gap = sums.teacher_reference - sums.student_reference;
    const bool good = is_positive_finite(sums.student) && is_positive_finite(sums.teacher) &&
                      is_positive_finite(hard_sum) && isfinite(max_gap) && is_positive_finite(row.temperature) &&
                      row.label >= 0;
    n.turn = good ? Turn::everywhere : Turn::nan;
    // Three logarithms and reciprocals at once, a lane each.
    const float which = lane_ == 0 ? sums.student : lane_ == 1 ? sums.teacher : hard_sum;
    const Logarithm mine = Logarithm::of(which);
    const float mine_inverse = reciprocal(which);
    const Logarithm student{__shfl_sync(kAllLanes, mine.exponent, 0), __shfl_sync(kAllLanes, mine.rest, 0)};
    const Logarithm teacher{__shfl_sync(kAllLanes, mine.exponent, 1), __shfl_sync(kAllLanes, mine.rest, 1)};
    n.inv_student_sum = __shfl_sync(kAllLanes, mine_inverse, 0);
    n.inv_teacher_sum = __shfl_sync(kAllLanes, mine_inverse, 1);
    n.inv_hard_sum = __shfl_sync(kAllLanes, mine_inverse, 2);
    hard_log_ = __shfl_sync(kAllLanes, mine.natural(), 2);
    n.hard_factor = own_column ? n.ce * n.inv_hard_sum : 0;
    n.student_reference = sums.student_reference, n.teacher_reference = sums.teacher_reference;
    n.student_log = student.natural(), n.teacher_log = teacher.natural();
    n.gap_of_logs = log_ratio(teacher, student);
    n.forward_kl = fmaf(sums.forward * n.inv_teacher_sum, inv_temperature, -n.gap_of_logs);
    n.reverse_kl = fmaf(-sums.reverse * n.inv_student_sum, inv_temperature, n.gap_of_logs);
    if constexpr (kFar) {
      n.gap = fmaf(max_gap, k, n.gap_of_logs * kLog2Ef);
      // A NaN, of a column that is -inf in both models, fails the comparison.
      bool apart = short_forms<T>(problem_) && n.forward_kl > 0.1f && n.forward_kl < 1e30f && fabsf(n.gap) < 24 && far_.serves();
      if constexpr (FarD::from_kl) apart = apart && far_.value(n.forward_kl, n.reverse_kl) >= far_.floor();
      // One token with nearly all of the student's mass: its slope and the sum of the slopes nearly cancel.
      const bool sure = FarD::cancels_at_top && sums.extra > 0.9f * sums.student;
      if (apart && good && !sure) n.turn = Turn::far;
      float student_rest, teacher_rest;
      n.student_lse = log2_normaliser(sums.student_reference, k, student, student_rest);
      n.teacher_lse = log2_normaliser(sums.teacher_reference, k, teacher, teacher_rest);
      by_q_ = Math::exp2(-student_rest), by_p_ = Math::exp2(-teacher_rest);
    }
    return n;
  }

  // Of a gradient; whether the cross-entropy's softmax is one of its own.
  template <class Numbers>
  __device__ bool set_factors(Numbers& n, const RowHeader& row, bool hard, float inv_temperature) const {
    const float by_scale = problem_.scale_gradient ? row.scale : 1.0f;
    n.kd = problem_.kd_weight * (problem_.scale_by_temperature ? row.temperature : inv_temperature) * by_scale;
    n.ce = problem_.ce_weight * by_scale;
    const bool own_column = problem_.with_ce && (hard || n.kd == 0);
    n.folded_ce = own_column ? 0 : n.ce;
    return own_column;
  }

  // log2 of a normaliser, rounded, and what the rounding took.
  static __device__ float log2_normaliser(float reference, float k, const Logarithm& log, float& rest) {
    const float product = reference * k, low = fmaf(reference, k, -product), of_sum = log.base2();
    const float rounded = product + of_sum, part = rounded - product;
    rest = ((product - (rounded - part)) + (of_sum - part)) + low;
    return rounded;
  }

  template <class Numbers>
  __device__ void report(const Numbers& n, float value) const {
    if (rank_ != 0) return;
    const float kd = problem_.kd_weight * (problem_.scale_by_temperature ? n.temperature * n.temperature : 1.0f);
    const float loss = (kd != 0 ? kd * value : 0.0f) + (problem_.with_ce ? problem_.ce_weight * n.cross_entropy : 0.0f);
    const float inv_temperature = reciprocal(n.temperature);
    write_report(p_, n.row, n.scale * loss, fmaf(n.student_reference, inv_temperature, n.student_log),
                 fmaf(n.teacher_reference, inv_temperature, n.teacher_log), value, n.cross_entropy);
  }
  __device__ void report_nan(uint32_t row) const {
    const float nan = __builtin_nanf("");
    if (rank_ == 0) write_report(p_, row, nan, nan, nan, nan, nan);
  }

 public:
  static __device__ void write_report(const RowProblem& p, uint32_t row, float loss, float student_lse, float teacher_lse,
                                      float value, float cross_entropy) {
    float* stats = static_cast<float*>(p.stats) + row;
    static_cast<float*>(p.loss)[row] = loss;
    stats[0] = student_lse, stats[p.rows] = teacher_lse, stats[2 * p.rows] = value, stats[3 * p.rows] = cross_entropy;
  }

 protected:
  const ClusterProblem& problem_;
  const RowProblem& p_;
  const RowHeader* headers_;
  ExchangeMemory* memory_;
  const FarD far_;
  const int blocks_, rank_, warps_, lane_;
  int count_ = 0;
  float hard_log_ = 0;         // of the row at hand
  float by_q_ = 1, by_p_ = 1;  // what the rounding of its log2-normalisers took
};

}  // namespace kdkernels::cuda
