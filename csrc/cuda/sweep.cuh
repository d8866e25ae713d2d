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

__device__ inline bool is_positive_finite(float x) { return x > 0 && x < __builtin_inff(); }

// What a row's first sweep finds, the same in every thread. References are whole numbers near the largest logits, so
// that their differences are exact.
struct Statistics {
  float student_reference, teacher_reference;
  float student_sum, teacher_sum;  // of e^((z - reference)/T)
  float forward, reverse;          // of e^((y - reference)/T)·x and of e^((z - reference)/T)·x,
                                   // x = (y - teacher_reference) - (z - student_reference)
  float hard_sum;                  // of e^(z - reference): the student at temperature 1

  __device__ bool usable(bool hard) const {
    return is_positive_finite(student_sum) && is_positive_finite(teacher_sum) && (!hard || is_positive_finite(hard_sum));
  }
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
      : problem_(problem), p_(problem.rows), ring_(ring), exchange_(exchange), threads_(exchange.warps * 32) {}

  __device__ void consume(uint32_t first_row, uint32_t row_step) {
    const uint32_t rows = uint32_t(p_.rows);
    RowInputs next = inputs(first_row);
    for (uint32_t row = first_row; row < rows; row += row_step) {
      const RowInputs in = next;
      next = inputs(row + row_step);  // fetched while this row is worked on
      run(row, in);
    }
  }

 private:
  struct RowInputs {
    float scale = 0, temperature = 1;
    int64_t label = 0;
  };
  __device__ RowInputs inputs(uint32_t row) const {
    RowInputs in;
    if (row >= uint32_t(p_.rows)) return in;
    in.scale = static_cast<const float*>(p_.row_scale)[row];
    in.temperature = p_.temperatures ? static_cast<const float*>(p_.temperatures)[row] : float(p_.temperature);
    if (p_.ce_weight != 0) in.label = p_.labels[row];
    return in;
  }

  __device__ bool reports() const { return exchange_.rank == 0 && threadIdx.x == 0; }
  __device__ void report(uint32_t row, float loss, float student_lse, float teacher_lse, float value, float hard) const {
    float* stats = static_cast<float*>(p_.stats) + row;
    static_cast<float*>(p_.loss)[row] = loss;
    stats[0] = student_lse, stats[p_.rows] = teacher_lse, stats[2 * p_.rows] = value, stats[3 * p_.rows] = hard;
  }

  __device__ void run(uint32_t row, const RowInputs& in) {
    T* gradient = nullptr;
    if (p_.gradient) gradient = static_cast<T*>(p_.gradient) + row_offset(p_.gradient_rows, row);
    if (in.scale == 0) {
      if (reports()) report(row, 0, 0, 0, 0, 0);
      if (gradient) fill(gradient, 0, int(p_.student.width), 0.0f);
      return;
    }
    const T* student_row = row_begin<T>(p_.student, row);
    const int phase = phase_of(student_row);
    low_ = phase, high_ = phase + int(p_.vocab_size);
    begin_ = exchange_.rank * problem_.share;
    columns_ = max(0, min(problem_.share, high_ - begin_));

    const bool with_ce = p_.ce_weight != 0, own_hard = with_ce && in.temperature != 1;
    const bool bad_label = with_ce && (in.label < 0 || in.label >= p_.vocab_size);
    float label_logit = 0;  // read before anyone may write a gradient over it
    if (with_ce && !bad_label && reports()) label_logit = float(student_row[in.label]);

    inv_temperature_ = 1 / in.temperature;
    scale_ = inv_temperature_ * kLog2Ef;
    Statistics st = statistics(own_hard);
    const Logarithm student_log = Logarithm::of(st.student_sum), teacher_log = Logarithm::of(st.teacher_sum);
    const float gap_of_logs = log_ratio(teacher_log, student_log);
    const float max_gap = st.teacher_reference - st.student_reference;
    if (!is_positive_finite(in.temperature) || bad_label || !st.usable(own_hard) || !isfinite(max_gap)) {
      const float nan = __builtin_nanf("");
      if (reports()) report(row, nan, nan, nan, nan, nan);
      if (gradient) fill(gradient, 0, int(p_.student.width), nan);
      finish_row();
      return;
    }
    const float forward_kl = fmaf(st.forward / st.teacher_sum, inv_temperature_, -gap_of_logs);
    const float reverse_kl = fmaf(-st.reverse / st.student_sum, inv_temperature_, gap_of_logs);

    // The gradient's factors.
    const float gradient_scale = p_.scale_gradient ? in.scale : 1.0f;
    const float kd_weight = float(p_.kd_weight), ce_weight = float(p_.ce_weight);
    kd_ = kd_weight * (p_.scale_by_temperature ? in.temperature : inv_temperature_) * gradient_scale;
    const float ce = ce_weight * gradient_scale;
    const bool hard_column = with_ce && (own_hard || kd_ == 0);  // the student at T = 1 is an exponential of its own
    const float hard_sum = own_hard ? st.hard_sum : st.student_sum;
    const Logarithm hard_log = Logarithm::of(hard_sum);
    ce_ = ce, label_ = with_ce ? int(in.label) + phase : -1;
    hard_factor_ = hard_column ? ce / hard_sum : 0;
    hard_reference_ = st.student_reference;
    const float folded_ce = with_ce && !hard_column ? ce : 0;

    float value = 0;
    bool done = false;
    if constexpr (kFar)
      done = run_far(st, student_log, teacher_log, max_gap, gap_of_logs, forward_kl, reverse_kl, folded_ce,
                     gradient, phase, value);
    if (!done) value = run_everywhere(st, max_gap, gap_of_logs, forward_kl, folded_ce, gradient, phase);
    if (gradient) fill(gradient, int(p_.vocab_size), int(p_.student.width), 0.0f);
    finish_row();

    if (reports()) {
      const float cross_entropy = with_ce ? hard_log.natural() - (label_logit - st.student_reference) : 0;
      const float kd_factor = kd_weight * (p_.scale_by_temperature ? in.temperature * in.temperature : 1.0f);
      const float loss = (kd_factor != 0 ? kd_factor * value : 0.0f) + (with_ce ? ce_weight * cross_entropy : 0.0f);
      report(row, in.scale * loss, fmaf(st.student_reference, inv_temperature_, student_log.natural()),
             fmaf(st.teacher_reference, inv_temperature_, teacher_log.natural()), value, cross_entropy);
    }
  }

  // ---- Sweeps over this block's share: f(student, teacher, column), G columns a call, this thread's own every time.
  template <bool Wait, bool Release, class F>
  __device__ __forceinline__ void sweep(F f) {
    int slot = slot_;
    uint32_t parity = parity_;
    for (int at = 0; at < columns_; at += ring_.slot_columns) {
      if constexpr (Wait) barrier_wait(ring_.full_barrier(slot), parity);
      const int n = min(ring_.slot_columns, columns_ - at);
      const T *student = ring_.student(slot), *teacher = ring_.teacher(slot);
      for (int j = int(threadIdx.x) * G; j < n; j += threads_ * G) f(student + j, teacher + j, begin_ + at + j);
      if constexpr (Release) {
        __syncwarp();
        if (exchange_.lane == 0) barrier_arrive(ring_.empty_barrier(slot));
      }
      if (++slot == ring_.count) slot = 0, parity ^= 1;
    }
    if constexpr (Release) released_ = true;
  }

  // Columns of both models as floats; those outside the row become `padding`.
  __device__ __forceinline__ void load(const T* student, const T* teacher, int column, float padding, float (&x)[G],
                                       float (&y)[G]) const {
    widen(student, x), widen(teacher, y);
    if (edge(column)) {
#pragma unroll
      for (int i = 0; i < G; i++)
        if (column + i < low_ || column + i >= high_) x[i] = padding, y[i] = padding;
    }
  }
  __device__ __forceinline__ bool edge(int column) const { return column < low_ || column + G > high_; }

  // Every slot of the row is the producer's again, and the next row begins after it.
  __device__ void finish_row() {
    const int chunks = (columns_ + ring_.slot_columns - 1) / ring_.slot_columns;
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

  // ---- Statistics
  // References guessed from the first columns a warp sees: fp32 has the range for a guess that is 60 nats off. Where it is
  // further off, the sums show it, and the row is swept again for its exact maxima.
  __device__ Statistics statistics(bool hard) {
    float student = kPadding, teacher = kPadding;
    if (columns_ > 0) {
      barrier_wait(ring_.full_barrier(slot_), parity_);
      const int j = int(threadIdx.x) * G;
      if (j < min(ring_.slot_columns, columns_)) {
        float x[G], y[G];
        load(ring_.student(slot_) + j, ring_.teacher(slot_) + j, begin_ + j, kPadding, x, y);
#pragma unroll
        for (int i = 0; i < G; i++) student = fmaxf(student, x[i]), teacher = fmaxf(teacher, y[i]);
      }
    }
    Statistics st = statistics_from<true>(rintf(warp_max(student)), rintf(warp_max(teacher)), hard);
    if (st.usable(hard)) return st;
    student = teacher = -__builtin_inff();
    sweep<false, false>([&](const T* s, const T* t, int column) {
      float x[G], y[G];
      load(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
      for (int i = 0; i < G; i++) student = fmaxf(student, x[i]), teacher = fmaxf(teacher, y[i]);
    });
    exchange_.maxima(student, teacher);
    return statistics_from<false>(rintf(student), rintf(teacher), hard);
  }

  template <bool Wait>
  __device__ Statistics statistics_from(float student_reference, float teacher_reference, bool hard) {
    // With whole-number references both models share one constant, and their difference is nearly x - its mean.
    const float origin = teacher_reference - student_reference;
    const float k = scale_, constant = student_reference * k, hard_constant = student_reference * kLog2Ef;
    float v[4] = {0, 0, 0, 0}, h[1] = {0};
    sweep<Wait, false>([&](const T* s, const T* t, int column) {
      float x[G], y[G];
      load(s, t, column, kPadding, x, y);
#pragma unroll
      for (int i = 0; i < G; i++) {
        const float moved = y[i] - origin, difference = moved - x[i];
        const float e = Math::exp2(fmaf(x[i], k, -constant)), f = Math::exp2(fmaf(moved, k, -constant));
        v[0] += e, v[1] += f;
        v[2] = fmaf(f, difference, v[2]);
        if constexpr (FarD::reads_reverse) v[3] = fmaf(e, difference, v[3]);
      }
      if (hard)
#pragma unroll
        for (int i = 0; i < G; i++) h[0] += Math::exp2(fmaf(x[i], kLog2Ef, -hard_constant));
    });
    return merge(student_reference, teacher_reference, v, h, hard);
  }

  // The constant of a reference r is fl(r·k): its rounding is put right here, where it costs nothing.
  static __device__ __forceinline__ float rescale(float reference, float common, float k) {
    const float rounded = reference * k;
    return Math::exp2((reference - common) * k - fmaf(reference, k, -rounded));
  }

  __device__ Statistics merge(float student_reference, float teacher_reference, float (&v)[4], float (&h)[1], bool hard) {
    Exchange& ex = exchange_;
    const int lane = ex.lane;
    const float mine = warp_sums(v, lane);
    ex.send(lane / 8, mine, lane % 8, 8);
    ex.send(4 + lane / 16, lane < 16 ? student_reference : teacher_reference, lane % 16, 16);
    if (hard) {
      const float hard_sum = warp_sums(h, lane);
      ex.send(6, hard_sum, lane, 32);
    }
    ex.wait(hard ? 7 : 6);
    Statistics st;
    st.student_reference = st.teacher_reference = -__builtin_inff();
    for (int e = lane; e < ex.senders(); e += 32) {
      st.student_reference = fmaxf(st.student_reference, ex.received(4)[e]);
      st.teacher_reference = fmaxf(st.teacher_reference, ex.received(5)[e]);
    }
    st.student_reference = warp_max(st.student_reference), st.teacher_reference = warp_max(st.teacher_reference);
    const float origin = st.teacher_reference - st.student_reference;
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = 0;
    h[0] = 0;
    for (int e = lane; e < ex.senders(); e += 32) {
      const float a = ex.received(4)[e], b = ex.received(5)[e], moved = (b - a) - origin;
      const float by_student = rescale(a, st.student_reference, scale_);
      // The teacher's columns were moved onto the student's reference, and carry its constant's rounding.
      const float by_teacher = Math::exp2((b - st.teacher_reference) * scale_ - fmaf(a, scale_, -(a * scale_)));
      const float s = ex.received(0)[e], t = ex.received(1)[e];
      v[0] = fmaf(s, by_student, v[0]);
      v[1] = fmaf(t, by_teacher, v[1]);
      v[2] = fmaf(fmaf(moved, t, ex.received(2)[e]), by_teacher, v[2]);
      v[3] = fmaf(fmaf(moved, s, ex.received(3)[e]), by_student, v[3]);
      if (hard) h[0] = fmaf(ex.received(6)[e], rescale(a, st.student_reference, kLog2Ef), h[0]);
    }
    const float total = warp_sums(v, lane);
    st.student_sum = __shfl_sync(kAllLanes, total, 0), st.teacher_sum = __shfl_sync(kAllLanes, total, 8);
    st.forward = __shfl_sync(kAllLanes, total, 16), st.reverse = __shfl_sync(kAllLanes, total, 24);
    st.hard_sum = hard ? warp_sums(h, lane) : 0;
    ex.count++;
    return st;
  }

  // ---- Models that are far apart: pointwise divergences in their short forms (far.h). False: this row is not for them.
  __device__ bool run_far(const Statistics& st, const Logarithm& student_log, const Logarithm& teacher_log, float max_gap,
                          float gap_of_logs, float forward_kl, float reverse_kl, float folded_ce, T* gradient, int phase,
                          float& value) {
    FarD far(p_.parameters);
    // A NaN, of a column that is -inf in both models, fails the first comparison.
    if (!(forward_kl > 0.1f && forward_kl < 1e30f) || !far.serves()) return false;
    FarRow<Math> row;
    row.scale = scale_;
    row.gap = fmaf(max_gap, scale_, gap_of_logs * kLog2Ef);
    if (!(fabsf(row.gap) < 24)) return false;
    float student_rest, teacher_rest;
    row.student_lse = log2_normaliser(st.student_reference, student_log, student_rest);
    row.teacher_lse = log2_normaliser(st.teacher_reference, teacher_log, teacher_rest);
    far.normalise(Math::exp2(-student_rest), Math::exp2(-teacher_rest));
    float slope_sum;
    if constexpr (FarD::from_kl) {
      value = far.value(forward_kl, reverse_kl);
      if (!(value >= far.floor())) return false;
      slope_sum = far.slope_sum(forward_kl, reverse_kl);
    } else {
      FarSums<Math> sums = {0, 0, 0};
      sweep<false, false>([&](const T* s, const T* t, int column) {
        float x[G], y[G];
        load(s, t, column, kPadding, x, y);
#pragma unroll
        for (int i = 0; i < G; i++) far.add(FarColumn<Math>(x[i], y[i], row), sums);
      });
      float v[4] = {sums.value, sums.slope, sums.largest, 0};
      exchange_.sums(v);
      sums = {v[0], v[1], v[2]};
      value = far.value(sums), slope_sum = far.slope_sum(sums);
      if (!(value >= far.floor() && value < 1e30f && sums.largest < kFarLargest && fabsf(slope_sum) < 1e30f)) return false;
    }
    if (gradient) {
      far.scale(kd_, fmaf(-kd_, slope_sum, folded_ce));
      T* out = gradient - phase;
      sweep<false, true>([&](const T* s, const T* t, int column) {
        float x[G], y[G], g[G];
        load(s, t, column, kPadding, x, y);
#pragma unroll
        for (int i = 0; i < G; i++) g[i] = far.gradient(FarColumn<Math>(x[i], y[i], row));
        write(out, column, x, g);
      });
    }
    return true;
  }

  // log2 of a normaliser, rounded, and what the rounding took.
  __device__ float log2_normaliser(float reference, const Logarithm& log, float& rest) const {
    const float product = reference * scale_, low = fmaf(reference, scale_, -product), of_sum = log.base2();
    const float rounded = product + of_sum, part = rounded - product;
    rest = ((product - (rounded - part)) + (of_sum - part)) + low;
    return rounded;
  }

  // Adds what is not the divergence's, and stores.
  __device__ __forceinline__ void write(T* out, int column, const float (&x)[G], float (&g)[G]) const {
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
        if (column + i >= low_ && column + i < high_) out[column + i] = narrow<T>(g[i]);
    }
  }

  // ---- Any models: the forms of pointwise.h, accurate relative to the divergence however small it is.
  __device__ float run_everywhere(const Statistics& st, float max_gap, float gap_of_logs, float forward_kl,
                                  float folded_ce, T* gradient, int phase) {
    RowConstants<Math> row;
    row.student_max = st.student_reference, row.teacher_max = st.teacher_reference;
    row.shift = truncf(max_gap / 4) * 4;
    row.inv_temperature = inv_temperature_, row.log2e_over_temperature = scale_;
    row.inv_student_sum = 1 / st.student_sum, row.inv_teacher_sum = 1 / st.teacher_sum;
    row.log_student_sum = Logarithm::of(st.student_sum).natural();
    row.log_teacher_sum = Logarithm::of(st.teacher_sum).natural();
    row.gap = gap_of_logs, row.gap_rest = (max_gap - row.shift) * inv_temperature_;
    normalise_gap(row);
    // Where the models nearly agree, a gradient carries the normalisers' rounding at first order: one Newton step for
    // sum p = sum q. (NaN: a column is -inf in both models.)
    if (gradient && !(forward_kl > kRefineBelow)) {
      const ForwardKL<Math> step(p_.parameters, row);
      const float slopes = sums(row, step, 0).slope;
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
      const Sums s = sums(row, divergence, pivot);
      value = s.value, mean_slope = D::slopes_sum_to_zero ? 0 : s.slope;
    }
    if (gradient) {
      const float by_q = fmaf(-kd_, mean_slope, folded_ce);
      T* out = gradient - phase;
      float v[1] = {0};
      sweep<false, true>([&](const T* s, const T* t, int column) {
        float x[G], y[G], g[G];
        load(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
        for (int i = 0; i < G; i++) {
          const auto c = Column<Math>::make(x[i], y[i], row);
          if constexpr (D::slopes_sum_to_zero) v[0] += divergence.value(c);
          g[i] = kd_ * divergence.slope(c, pivot);
          if (by_q != 0) g[i] = fmaf(by_q, c.student(), g[i]);
        }
        write(out, column, x, g);
      });
      if constexpr (D::slopes_sum_to_zero) {
        exchange_.sums(v);
        value = v[0];
      }
    }
    return value;
  }

  static constexpr float kRefineBelow = 0.005f;

  struct Sums {
    float value, slope;
  };
  template <class AnyD>
  __device__ Sums sums(const RowConstants<Math>& row, const AnyD& divergence, float pivot) {
    float v[2] = {0, 0};
    sweep<false, false>([&](const T* s, const T* t, int column) {
      float x[G], y[G];
      load(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
      for (int i = 0; i < G; i++) {
        const auto c = Column<Math>::make(x[i], y[i], row);
        v[0] += divergence.value(c), v[1] += divergence.slope(c, pivot);
      }
    });
    exchange_.sums(v);
    return {v[0], v[1]};
  }

  // The student's most likely column.
  __device__ Column<Math> top_column(const RowConstants<Math>& row) {
    float best = -__builtin_inff(), with = 0;
    sweep<false, false>([&](const T* s, const T* t, int column) {
      float x[G], y[G];
      load(s, t, column, -__builtin_inff(), x, y);
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
  const int threads_;
  int slot_ = 0;  // where this row begins in the ring
  uint32_t parity_ = 0;
  bool released_ = false;
  // Of this row: this block's columns, the row's first and last, counted from the 16-byte boundary before it.
  int begin_ = 0, columns_ = 0, low_ = 0, high_ = 0;
  float inv_temperature_ = 1, scale_ = kLog2Ef;  // 1/T, log2(e)/T
  float kd_ = 0, ce_ = 0, hard_factor_ = 0, hard_reference_ = 0;
  int label_ = -1;
};

}  // namespace kdkernels::cuda
