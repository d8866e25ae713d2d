// The row sweeps on a GPU of compute capability 9.0 or newer: one thread-block cluster owns a row at a time and holds it
// in shared memory, so that it is read from device memory once however often it is swept:
//     statistics -> (sums) -> gradient
// with the cluster's totals exchanged in between. Which sweeps a row takes depends on its numbers; every thread of the
// cluster sees the same totals and so takes the same turns.
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

// What comes of a row's first sweep, worked out by one warp for everyone. References are whole numbers near the largest
// logits, so that their differences are exact.
enum class Turn : int { nan, far, everywhere };
struct RowNumbers {
  Turn turn;
  float student_reference, teacher_reference;
  float inv_student_sum, inv_teacher_sum, inv_hard_sum;  // of e^((z - reference)/T), and at temperature 1
  float student_log, teacher_log, hard_log;              // of these sums
  float gap_of_logs;                                     // teacher_log - student_log
  float forward_kl, reverse_kl;
  float student_lse, teacher_lse, gap;  // in base 2, for FarRow
  float by_q, by_p;                     // what their rounding took
};

// Sums of a part of a row, relative to its references.
struct Sums {
  float student_reference, teacher_reference;
  float student, teacher;  // of e^((z - reference)/T)
  float forward, reverse;  // of e^((y - reference)/T)·x and e^((z - reference)/T)·x,
                           // x = (y - teacher_reference) - (z - student_reference)
  float hard;              // of e^(z - reference): the student at temperature 1
};

template <class T, template <class> class Divergence>
class RowSweep {
  using Math = FloatMath;
  using D = Divergence<Math>;
  using FarD = Far<Divergence, Math>;
  static constexpr int G = kGroup<T>;
  // Short forms leave about 1e-7 of the probabilities in a gradient: nothing in 16 bits, too much in 32.
  static constexpr bool kFar = FarD::exists && sizeof(T) == 2;

 public:
  __device__ RowSweep(const ClusterProblem& problem, const Ring<T>& ring, const Exchange& exchange)
      : problem_(problem), p_(problem.rows), ring_(ring), exchange_(exchange), far_(problem.parameters), threads_(exchange.warps * 32) {}

  __device__ void consume(uint32_t first_row, uint32_t row_step) {
    for (uint32_t row = first_row; row < uint32_t(p_.rows); row += row_step) {
      barrier_wait(ring_.full_barrier(slot_), parity_);
      run(row, ring_.headers[slot_]);
    }
  }

 private:
  // In shared memory: read where needed instead of kept in registers.
  __device__ RowNumbers& row_numbers() const {
    static_assert(sizeof(RowNumbers) <= sizeof(ExchangeMemory::row));
    return *reinterpret_cast<RowNumbers*>(exchange_.memory->row);
  }

  __device__ bool reports() const { return exchange_.rank == 0 && threadIdx.x == 0; }
  __device__ void report(uint32_t row, float loss, float student_lse, float teacher_lse, float value, float hard) const {
    float* stats = static_cast<float*>(p_.stats) + row;
    static_cast<float*>(p_.loss)[row] = loss;
    stats[0] = student_lse, stats[p_.rows] = teacher_lse, stats[2 * p_.rows] = value, stats[3 * p_.rows] = hard;
  }

  __device__ __forceinline__ void run(uint32_t row, const RowHeader in) {
    T* gradient = p_.gradient ? static_cast<T*>(p_.gradient) + in.gradient : nullptr;
    begin_ = exchange_.rank * problem_.share;
    if (in.scale == 0) {
      if (reports()) report(row, 0, 0, 0, 0, 0);
      if (gradient) fill(gradient, 0, int(p_.student.width), 0.0f);
      columns_ = 0;
      finish_row();
      return;
    }
    low_ = in.phase, high_ = low_ + int(p_.vocab_size);
    columns_ = max(0, min(problem_.share, high_ - begin_));
    const float inv_temperature = reciprocal(in.temperature);
    scale_ = kLog2Ef * inv_temperature;
    const bool own_hard = problem_.with_ce && in.temperature != 1;
    const bool bad = problem_.with_ce && in.label < 0;
    float label_logit = 0;  // read before anyone may write a gradient over it
    if (problem_.with_ce && !bad && reports()) label_logit = float(row_begin<T>(p_.student, row)[in.label]);

    const Turn turn = statistics(bad || !is_positive_finite(in.temperature), own_hard);
    const RowNumbers& n = row_numbers();
    if (turn == Turn::nan) {
      const float nan = __builtin_nanf("");
      if (reports()) report(row, nan, nan, nan, nan, nan);
      if (gradient) fill(gradient, 0, int(p_.student.width), nan);
      finish_row();
      return;
    }

    // The gradient's factors.
    const float by_scale = problem_.scale_gradient ? in.scale : 1.0f;
    kd_ = problem_.kd_weight * (problem_.scale_by_temperature ? in.temperature : inv_temperature) * by_scale;
    const float ce = problem_.ce_weight * by_scale;
    const bool own_column = problem_.with_ce && (own_hard || kd_ == 0);  // the student at T = 1 is not the divergence's
    ce_ = ce, label_ = problem_.with_ce ? in.label + low_ : -1;
    hard_factor_ = own_column ? ce * n.inv_hard_sum : 0;
    hard_reference_ = n.student_reference;
    const float folded_ce = own_column ? 0 : ce;

    float value = 0;
    bool done = false;
    if constexpr (kFar)
      if (turn == Turn::far) done = run_far(n, folded_ce, gradient, value);
    if constexpr (kFar) {
      if (!done) {
        const Apart apart = everywhere_apart(*this, inv_temperature, folded_ce, gradient);
        value = apart.value, exchange_.count = apart.exchanges, released_ = apart.released;
      }
    } else {
      value = run_everywhere(n, inv_temperature, folded_ce, gradient);
    }
    if (gradient) fill(gradient, int(p_.vocab_size), int(p_.student.width), 0.0f);
    finish_row();

    if (reports()) {
      const float cross_entropy = problem_.with_ce ? n.hard_log - (label_logit - n.student_reference) : 0;
      const float kd = problem_.kd_weight * (problem_.scale_by_temperature ? in.temperature * in.temperature : 1.0f);
      const float loss = (kd != 0 ? kd * value : 0.0f) + (problem_.with_ce ? problem_.ce_weight * cross_entropy : 0.0f);
      report(row, in.scale * loss, fmaf(n.student_reference, inv_temperature, n.student_log),
             fmaf(n.teacher_reference, inv_temperature, n.teacher_log), value, cross_entropy);
    }
  }

  // ---- Sweeps over this block's share: f<Special>(student, teacher, column), G columns a call, this thread's own every
  // time. Special: the slot holds columns outside the row, or the one that `special_` says.
  template <bool Wait, bool Release, class F>
  __device__ __forceinline__ void sweep(F f, bool always_special = false, int special_column = -1) {
    int slot = slot_;
    uint32_t parity = parity_;
    for (int at = 0; at < columns_; at += ring_.slot_columns) {
      if constexpr (Wait) barrier_wait(ring_.full_barrier(slot), parity);
      const int n = min(ring_.slot_columns, columns_ - at), mine = int(threadIdx.x) * G, step = threads_ * G;
      const T *student = ring_.student(slot) + mine, *teacher = ring_.teacher(slot) + mine;
      const int first = begin_ + at;
      int column = first + mine;
      limit_ = first + n;
      const int last = limit_ + exchange_.lane * G;  // whole warps take each turn
      const bool special =
          always_special || first < low_ || n % (32 * G) != 0 || unsigned(special_column - first) < unsigned(n);
      if (!special) {
#pragma unroll 2
        for (; column < last; column += step, student += step, teacher += step)
          f.template operator()<false>(student, teacher, column);
      } else {
        for (; column < last; column += step, student += step, teacher += step)
          f.template operator()<true>(student, teacher, column);
      }
      if constexpr (Release) {
        __syncwarp();
        if (exchange_.lane == 0) barrier_arrive(ring_.empty_barrier(slot));
      }
      if (++slot == ring_.count) slot = 0, parity ^= 1;
    }
    if constexpr (Release) released_ = columns_ > 0;
  }

  // Columns of both models as floats; those outside the row become `padding`.
  template <bool Special>
  __device__ __forceinline__ void load(const T* student, const T* teacher, int column, float padding, float (&x)[G],
                                       float (&y)[G]) const {
    widen(student, x), widen(teacher, y);
    if constexpr (Special)
      if (edge(column)) {
#pragma unroll
        for (int i = 0; i < G; i++)
          if (column + i < low_ || column + i >= limit_) x[i] = padding, y[i] = padding;
      }
  }
  __device__ __forceinline__ bool edge(int column) const { return column < low_ || column + G > limit_; }

  // Every slot of the row is the producer's again, and the next row begins after it.
  __device__ void finish_row() {
    const int chunks = max(1, (columns_ + ring_.slot_columns - 1) / ring_.slot_columns);
    if (!released_) {
      __syncwarp();
      int slot = slot_;
      for (int c = 0; c < chunks; c++) {
        if (exchange_.lane == 0) barrier_arrive(ring_.empty_barrier(slot));
        if (++slot == ring_.count) slot = 0;
      }
    }
    released_ = false;
    slot_ += chunks;
    if (slot_ >= ring_.count) slot_ -= ring_.count, parity_ ^= 1;
  }

  // Columns [begin, end) of a gradient row, by the whole cluster.
  __device__ void fill(T* row, int begin, int end, float with) const {
    if (begin >= end) return;
    const int phase = phase_of(row + begin), n = end - begin + phase;
    T* base = row + begin - phase;
    float g[G];
#pragma unroll
    for (int i = 0; i < G; i++) g[i] = with;
    for (int at = (exchange_.rank * threads_ + int(threadIdx.x)) * G; at < n; at += exchange_.blocks * threads_ * G) {
      if (at >= phase && at + G <= n) {
        store(base + at, g);
      } else {
        for (int i = 0; i < G; i++)
          if (at + i >= phase && at + i < n) base[at + i] = narrow<T>(with);
      }
    }
  }

  // ---- What few rows take is a function of its own, on a copy: in the others it costs no registers.
  struct Apart {
    float value;
    int exchanges;
    bool released;
  };
  static __device__ __noinline__ Apart everywhere_apart(RowSweep self, float inv_temperature, float folded_ce, T* gradient) {
    const float value = self.run_everywhere(self.row_numbers(), inv_temperature, folded_ce, gradient);
    return {value, self.exchange_.count, self.released_};
  }

  // ---- Statistics
  __device__ __forceinline__ Turn statistics(bool bad, bool hard) {
    return hard ? statistics_with<true>(bad) : statistics_with<false>(bad);
  }

  // A warp's references are guessed from the first columns it sees, and raised where exponentials exceed 2^10: fp32 has
  // the range for more, but a large exponent is a rounded one.
  template <bool Hard>
  __device__ __forceinline__ Turn statistics_with(bool bad) {
    float a = kPadding, b = kPadding;  // the references, of student and teacher
    limit_ = begin_ + min(ring_.slot_columns, columns_);
    const int j = int(threadIdx.x) * G;
    if (begin_ + j < limit_) {
      float x[G], y[G];
      load<true>(ring_.student(slot_) + j, ring_.teacher(slot_) + j, begin_ + j, kPadding, x, y);
#pragma unroll
      for (int i = 0; i < G; i++) a = fmaxf(a, x[i]), b = fmaxf(b, y[i]);
    }
    a = rintf(warp_max(a)), b = rintf(warp_max(b));
    // With whole-number references both models share one constant, and their difference is nearly x - its mean.
    const float k = scale_;
    float origin = b - a, constant = a * k;
    float v[4] = {0, 0, 0, 0}, odd_forward = 0, odd_reverse = 0, h = 0;
    sweep<true, false>([&]<bool Special>(const T* s, const T* t, int column) {
      float x[G], y[G], e[G], f[G];
      load<Special>(s, t, column, kPadding, x, y);
      auto exponentials = [&] {
#pragma unroll
        for (int i = 0; i < G; i++)
          e[i] = Math::exp2(fmaf(x[i], k, -constant)), f[i] = Math::exp2(fmaf(y[i] - origin, k, -constant));
      };
      exponentials();
      float student = pairwise(e), teacher = pairwise(f);
      if (__any_sync(kAllLanes, fmaxf(student, teacher) > 1024)) {
        v[2] += odd_forward, v[3] += odd_reverse, odd_forward = 0, odd_reverse = 0;
        raise(x, y, a, b, v, h);
        origin = b - a, constant = a * k;
        exponentials();
        student = pairwise(e), teacher = pairwise(f);
      }
      v[0] += student, v[1] += teacher;
#pragma unroll
      for (int i = 0; i < G; i++) {
        const float difference = (y[i] - origin) - x[i];
        float& forward = i % 2 ? odd_forward : v[2];  // two chains: an addition need not wait for the last
        forward = fmaf(f[i], difference, forward);
        if constexpr (FarD::reads_reverse) {
          float& reverse = i % 2 ? odd_reverse : v[3];
          reverse = fmaf(e[i], difference, reverse);
        }
      }
      if constexpr (Hard) {
#pragma unroll
        for (int i = 0; i < G; i++) e[i] = Math::exp2((x[i] - a) * kLog2Ef);
        h += pairwise(e);
      }
    });
    v[2] += odd_forward, v[3] += odd_reverse;
    const float student_reference = a, teacher_reference = b;
    const float of_warp = warp_sums(v, exchange_.lane);
    Parcel parcel;
#pragma unroll
    for (int i = 0; i < 4; i++) parcel.v[i] = __shfl_sync(kAllLanes, of_warp, i * 8);
    parcel.v[4] = student_reference, parcel.v[5] = teacher_reference;
    float of_hard[1] = {h};
    if constexpr (Hard) parcel.v[6] = warp_sums(of_hard, exchange_.lane);
    parcel = exchange_.gather(parcel);
    if (exchange_.leads()) {
      Sums sums = add_up(parcel, exchange_.lane < exchange_.warps, true);
      if (exchange_.blocks > 1) {
        if (exchange_.lane == 0) {
          float* of_block = exchange_.memory->broadcast;
          of_block[0] = sums.student, of_block[1] = sums.teacher, of_block[2] = sums.forward, of_block[3] = sums.reverse;
          of_block[4] = sums.student_reference, of_block[5] = sums.teacher_reference, of_block[6] = sums.hard;
        }
        __syncwarp();
        const float mine = exchange_.memory->broadcast[exchange_.lane / 4];
        parcel = exchange_.template across<8>(mine);
        sums = add_up(parcel, exchange_.lane < exchange_.blocks, false);
      }
      const RowNumbers n = numbers(sums, bad, Hard);
      if (exchange_.lane == 0) row_numbers() = n;
    }
    exchange_.broadcast();
    return row_numbers().turn;
  }

  static __device__ __forceinline__ float pairwise(const float (&v)[G]) {
    if constexpr (G == 8)
      return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    else
      return (v[0] + v[1]) + (v[2] + v[3]);
  }

  // New references from a warp's columns, and its sums so far moved onto them.
  __device__ __forceinline__ void raise(const float (&x)[G], const float (&y)[G], float& a, float& b, float (&v)[4],
                                        float& h) const {
    float student = a, teacher = b;
#pragma unroll
    for (int i = 0; i < G; i++) student = fmaxf(student, x[i]), teacher = fmaxf(teacher, y[i]);
    student = rintf(warp_max(student)), teacher = rintf(warp_max(teacher));
    // The constant fl(a·k) is rounded; its sums keep the new one's rounding.
    const float rounding = fmaf(student, scale_, -(student * scale_)) - fmaf(a, scale_, -(a * scale_));
    const float by_student = Math::exp2((a - student) * scale_ + rounding);
    const float by_teacher = Math::exp2((b - teacher) * scale_ + rounding);
    const float moved = (b - a) - (teacher - student);
    v[2] = fmaf(moved, v[1], v[2]) * by_teacher, v[3] = fmaf(moved, v[0], v[3]) * by_student;
    v[0] *= by_student, v[1] *= by_teacher, h *= Math::exp2((a - student) * kLog2Ef);
    a = student, b = teacher;
  }

  // Parts of a row, one a lane, to the sums of them all. `of_warps`: the constant of a warp's reference r is fl(r·k), and
  // the rounding is put right here, where it costs nothing.
  __device__ Sums add_up(const Parcel& part, bool counts, bool of_warps) const {
    const float a = counts ? part.v[4] : kPadding, b = counts ? part.v[5] : kPadding;
    Sums sums;
    sums.student_reference = warp_max(a), sums.teacher_reference = warp_max(b);
    const float moved = (b - a) - (sums.teacher_reference - sums.student_reference);
    const float rounding = of_warps ? fmaf(a, scale_, -(a * scale_)) : 0;
    const float by_student = counts ? Math::exp2((a - sums.student_reference) * scale_ - rounding) : 0;
    const float by_teacher = counts ? Math::exp2((b - sums.teacher_reference) * scale_ - rounding) : 0;
    float v[4] = {part.v[0] * by_student, part.v[1] * by_teacher, fmaf(moved, part.v[1], part.v[2]) * by_teacher,
                  fmaf(moved, part.v[0], part.v[3]) * by_student};
    float h[1] = {counts ? part.v[6] * Math::exp2((a - sums.student_reference) * kLog2Ef) : 0};
    const float total = warp_sums(v, exchange_.lane);
    sums.student = __shfl_sync(kAllLanes, total, 0), sums.teacher = __shfl_sync(kAllLanes, total, 8);
    sums.forward = __shfl_sync(kAllLanes, total, 16), sums.reverse = __shfl_sync(kAllLanes, total, 24);
    sums.hard = warp_sums(h, exchange_.lane);
    return sums;
  }

  __device__ RowNumbers numbers(const Sums& sums, bool bad, bool hard) const {
    RowNumbers n;
    const float hard_sum = hard ? sums.hard : sums.student;
    const float max_gap = sums.teacher_reference - sums.student_reference;
    const bool usable = is_positive_finite(sums.student) && is_positive_finite(sums.teacher) &&
                        is_positive_finite(hard_sum) && isfinite(max_gap);
    n.turn = usable && !bad ? Turn::everywhere : Turn::nan;
    if (n.turn == Turn::nan) return n;
    // Three logarithms and reciprocals at once, a lane each.
    const int lane = exchange_.lane;
    const float which = lane == 0 ? sums.student : lane == 1 ? sums.teacher : hard_sum;
    const Logarithm mine = Logarithm::of(which);
    const float mine_inverse = reciprocal(which);
    const Logarithm student{__shfl_sync(kAllLanes, mine.exponent, 0), __shfl_sync(kAllLanes, mine.rest, 0)};
    const Logarithm teacher{__shfl_sync(kAllLanes, mine.exponent, 1), __shfl_sync(kAllLanes, mine.rest, 1)};
    const Logarithm of_hard{__shfl_sync(kAllLanes, mine.exponent, 2), __shfl_sync(kAllLanes, mine.rest, 2)};
    n.inv_student_sum = __shfl_sync(kAllLanes, mine_inverse, 0);
    n.inv_teacher_sum = __shfl_sync(kAllLanes, mine_inverse, 1);
    n.inv_hard_sum = __shfl_sync(kAllLanes, mine_inverse, 2);
    n.student_reference = sums.student_reference, n.teacher_reference = sums.teacher_reference;
    n.student_log = student.natural(), n.teacher_log = teacher.natural(), n.hard_log = of_hard.natural();
    n.gap_of_logs = log_ratio(teacher, student);
    const float inv_temperature = scale_ * kLn2f;
    n.forward_kl = fmaf(sums.forward * n.inv_teacher_sum, inv_temperature, -n.gap_of_logs);
    n.reverse_kl = fmaf(-sums.reverse * n.inv_student_sum, inv_temperature, n.gap_of_logs);
    if constexpr (kFar) {
      const FarD& far = far_;
      n.gap = fmaf(max_gap, scale_, n.gap_of_logs * kLog2Ef);
      // A NaN, of a column that is -inf in both models, fails the comparison.
      bool apart = n.forward_kl > 0.1f && n.forward_kl < 1e30f && fabsf(n.gap) < 24 && far.serves();
      if constexpr (FarD::from_kl) apart = apart && far.value(n.forward_kl, n.reverse_kl) >= far.floor();
      if (apart) n.turn = Turn::far;
      float student_rest, teacher_rest;
      n.student_lse = log2_normaliser(sums.student_reference, student, student_rest);
      n.teacher_lse = log2_normaliser(sums.teacher_reference, teacher, teacher_rest);
      n.by_q = Math::exp2(-student_rest), n.by_p = Math::exp2(-teacher_rest);
    }
    return n;
  }

  // log2 of a normaliser, rounded, and what the rounding took.
  __device__ float log2_normaliser(float reference, const Logarithm& log, float& rest) const {
    const float product = reference * scale_, low = fmaf(reference, scale_, -product), of_sum = log.base2();
    const float rounded = product + of_sum, part = rounded - product;
    rest = ((product - (rounded - part)) + (of_sum - part)) + low;
    return rounded;
  }

  // ---- Models that are far apart: pointwise divergences in their short forms (far.h). False: this row is not for them.
  __device__ __forceinline__ bool run_far(const RowNumbers& n, float folded_ce, T* gradient, float& value) {
    FarD far = far_;
    far.normalise(n.by_q, n.by_p);
    const FarRow<Math> row = {scale_, n.student_lse, n.teacher_lse, n.gap};
    float slope_sum;
    if constexpr (FarD::from_kl) {
      value = far.value(n.forward_kl, n.reverse_kl);
      slope_sum = far.slope_sum(n.forward_kl, n.reverse_kl);
    } else {
      FarSums<Math> sums = {0, 0, 0}, odd = {0, 0, 0};
      sweep<false, false>([&]<bool Special>(const T* s, const T* t, int column) {
        float x[G], y[G];
        load<Special>(s, t, column, kPadding, x, y);
#pragma unroll
        for (int i = 0; i < G; i++) far.add(FarColumn<Math>(x[i], y[i], row), i % 2 ? odd : sums);
      });
      float v[4] = {sums.value + odd.value, sums.slope + odd.slope, sums.largest + odd.largest, 0};
      exchange_.sums(v);
      sums = {v[0], v[1], v[2]};
      value = far.value(sums), slope_sum = far.slope_sum(sums);
      if (!(value >= far.floor() && value < 1e30f && sums.largest < kFarLargest && fabsf(slope_sum) < 1e30f)) return false;
    }
    if (gradient) {
      far.scale(kd_, fmaf(-kd_, slope_sum, folded_ce));
      T* out = gradient - low_;
      sweep<false, true>(
          [&]<bool Special>(const T* s, const T* t, int column) {
            float x[G], y[G], g[G];
            load<Special>(s, t, column, kPadding, x, y);
#pragma unroll
            for (int i = 0; i < G; i++) g[i] = far.gradient(FarColumn<Math>(x[i], y[i], row));
            write<Special>(out, column, x, g);
          },
          kd_ == 0 || hard_factor_ != 0, label_);
    }
    return true;
  }

  // Adds what is not the divergence's, and stores.
  template <bool Special>
  __device__ __forceinline__ void write(T* out, int column, const float (&x)[G], float (&g)[G]) const {
    if constexpr (!Special) {
      store(out + column, g);
    } else {
      if (kd_ == 0) {  // no divergence in the gradient, not even as 0·inf
#pragma unroll
        for (int i = 0; i < G; i++) g[i] = 0;
      }
      if (hard_factor_ != 0) {
#pragma unroll
        for (int i = 0; i < G; i++)
          g[i] = fmaf(hard_factor_, Math::exp2((x[i] - hard_reference_) * kLog2Ef), g[i]);
      }
      if (unsigned(label_ - column) < unsigned(G)) {
#pragma unroll
        for (int i = 0; i < G; i++)
          if (column + i == label_) g[i] -= ce_;
      }
      if (!edge(column)) {
        store(out + column, g);
      } else {
#pragma unroll
        for (int i = 0; i < G; i++)
          if (column + i >= low_ && column + i < limit_) out[column + i] = narrow<T>(g[i]);
      }
    }
  }

  // ---- Any models: the forms of pointwise.h, accurate relative to the divergence however small it is.
  __device__ __forceinline__ float run_everywhere(const RowNumbers& n, float inv_temperature, float folded_ce, T* gradient) {
    const float max_gap = n.teacher_reference - n.student_reference;
    RowConstants<Math> row;
    row.student_max = n.student_reference, row.teacher_max = n.teacher_reference;
    row.shift = truncf(max_gap / 4) * 4;
    row.inv_temperature = inv_temperature, row.log2e_over_temperature = scale_;
    row.inv_student_sum = n.inv_student_sum, row.inv_teacher_sum = n.inv_teacher_sum;
    row.log_student_sum = n.student_log, row.log_teacher_sum = n.teacher_log;
    row.gap = n.gap_of_logs, row.gap_rest = (max_gap - row.shift) * inv_temperature;
    normalise_gap(row);
    // Where the models nearly agree, a gradient carries the normalisers' rounding at first order: one Newton step for
    // sum p = sum q. (NaN: a column is -inf in both models.)
    if (gradient && !(n.forward_kl > kRefineBelow)) {
      float value, slopes;
      sums(row, ForwardKL<Math>(p_.parameters, row), 0, value, slopes);
      row.gap_rest -= slopes;
      normalise_gap(row);
    }
    const D divergence(p_.parameters, row);
    float value = 0, pivot = 0, mean_slope = 0;
    if (!D::slopes_sum_to_zero || !gradient) {
      if constexpr (!D::slopes_sum_to_zero) {
        pivot = divergence.derivative(top_column(row));
        if (!isfinite(pivot)) pivot = 0;
      }
      sums(row, divergence, pivot, value, mean_slope);
      if (D::slopes_sum_to_zero) mean_slope = 0;
    }
    if (gradient) {
      const float by_q = fmaf(-kd_, mean_slope, folded_ce);
      T* out = gradient - low_;
      float v[1] = {0};
      sweep<false, true>(
          [&]<bool Special>(const T* s, const T* t, int column) {
            float x[G], y[G], g[G];
            load<Special>(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
            for (int i = 0; i < G; i++) {
              const auto c = Column<Math>::make(x[i], y[i], row);
              if constexpr (D::slopes_sum_to_zero) v[0] += divergence.value(c);
              g[i] = kd_ * divergence.slope(c, pivot);
              if (by_q != 0) g[i] = fmaf(by_q, c.student(), g[i]);
            }
            write<Special>(out, column, x, g);
          },
          kd_ == 0 || hard_factor_ != 0, label_);
      if constexpr (D::slopes_sum_to_zero) {
        exchange_.sums(v);
        value = v[0];
      }
    }
    return value;
  }

  static constexpr float kRefineBelow = 0.005f;

  template <class AnyD>
  __device__ __forceinline__ void sums(const RowConstants<Math>& row, const AnyD& divergence, float pivot, float& value,
                                       float& slope) {
    float v[2] = {0, 0};
    sweep<false, false>([&]<bool Special>(const T* s, const T* t, int column) {
      float x[G], y[G];
      load<Special>(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
      for (int i = 0; i < G; i++) {
        const auto c = Column<Math>::make(x[i], y[i], row);
        v[0] += divergence.value(c), v[1] += divergence.slope(c, pivot);
      }
    });
    exchange_.sums(v);
    value = v[0], slope = v[1];
  }

  // The student's most likely column.
  __device__ __forceinline__ Column<Math> top_column(const RowConstants<Math>& row) {
    float best = -__builtin_inff(), with = 0;
    sweep<false, false>([&]<bool Special>(const T* s, const T* t, int column) {
      float x[G], y[G];
      load<Special>(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
      for (int i = 0; i < G; i++)
        if (x[i] > best) best = x[i], with = y[i];
    });
    exchange_.top(best, with);
    return Column<Math>::make(best, with, row);
  }

  // gap + gap_rest unchanged, with gap their rounded sum.
  static __device__ void normalise_gap(RowConstants<Math>& row) {
    const float sum = row.gap + row.gap_rest, part = sum - row.gap;
    row.gap_rest = (row.gap - (sum - part)) + (row.gap_rest - part);
    row.gap = sum;
  }

  const ClusterProblem& problem_;
  const RowProblem& p_;
  Ring<T> ring_;
  Exchange exchange_;
  const FarD far_;
  const int threads_;
  int slot_ = 0;  // where this row begins in the ring
  uint32_t parity_ = 0;
  bool released_ = false;
  // Of this row: this block's columns, the row's first and last, counted from the 16-byte boundary before it.
  int begin_ = 0, columns_ = 0, low_ = 0, high_ = 0, limit_ = 0;  // limit_: the end of the slot being swept

  float scale_ = kLog2Ef;  // log2(e)/T
  float kd_ = 0, ce_ = 0, hard_factor_ = 0, hard_reference_ = 0;
  int label_ = -1;
};

}  // namespace kdkernels::cuda
