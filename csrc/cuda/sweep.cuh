// The row sweeps on a GPU of compute capability 9.0 or newer: one thread-block cluster owns a row at a time and holds it
// in shared memory, so that it is read from device memory once however often it is swept:
//     statistics -> (sums) -> gradient
// Between the sweeps of a row lies an exchange over the cluster. Consumers do not wait for it but sweep another row, the
// next one's statistics, where the ring holds both. Which sweeps a row takes depends on its numbers; every thread of the
// cluster sees the same totals and so takes the same turns.
#pragma once
#include "totals.cuh"

namespace kdkernels::cuda {

// Masked: slots hold a mask as well, for those that derive from this (split.cuh).
template <class T, template <class> class Divergence, bool Masked = false>
class RowSweep {
  using Math = FloatMath;
  using D = Divergence<Math>;
  using FarD = Far<Divergence, Math>;
  static constexpr int G = kGroup<T>;
  static constexpr bool kFar = Totals<T, Divergence>::kFar;

 public:
  __device__ RowSweep(const ClusterProblem& problem, const Ring<T>& ring, const Exchange& exchange, int blocks, int rank)
      : problem_(problem), p_(problem.rows), ring_(ring), exchange_(exchange), blocks_(blocks),
        rank_(rank), mine_(kept(threadIdx.x * G)), step_(kept(exchange.warps * 32 * G)) {}

  __device__ void consume(uint32_t first_row, uint32_t row_step) {
    const uint32_t rows = uint32_t(p_.rows);
    InFlight now, next;
    if (first_row < rows) now = begin(first_row, 0, 0, 0);
    for (uint32_t row = first_row; row < rows; row += row_step) {
      int after = now.slot + now.chunks;
      uint32_t parity = now.parity;
      if (after >= ring_.count) after -= ring_.count, parity ^= 1;
      if constexpr (kFar && !FarD::from_kl)
        if (now.counts && short_forms<T>(problem_)) now.sums = far_sums(now);
      const bool more = row + row_step < rows;
      if (more && problem_.ahead) next = begin(row + row_step, after, parity, now.buffer ^ 1);
      finish(row, now);
      if (more && !problem_.ahead) next = begin(row + row_step, after, parity, now.buffer ^ 1);
      now = next;
    }
    exchange_.post({Wanted::nothing_more, 0, false, 0, 0});
  }

 protected:
  // A row between its first sweep and its last.
  struct InFlight {
    int slot = 0, chunks = 1;
    uint32_t parity = 0;
    int buffer = 0;               // of its numbers
    int statistics = 0, sums = 0;  // the exchanges to wait for
    bool counts = false;
  };

  // Which of this block's columns the sweeps go over. The header is the ring's until the row's last sweep.
  __device__ __forceinline__ const RowHeader& enter(const InFlight& at) {
    const RowHeader& header = ring_.headers[at.slot];
    slot_ = at.slot, parity_ = at.parity;
    low_ = header.phase, columns_ = header.columns, scale_ = header.log2e_over_temperature;
    return header;
  }

  __device__ __forceinline__ InFlight begin(uint32_t row, int slot, uint32_t parity, int buffer) {
    InFlight at;
    at.slot = slot, at.parity = parity, at.buffer = buffer;
    barrier_wait(ring_.full_barrier(slot), parity);
    const RowHeader& header = enter(at);
    at.counts = header.scale != 0, at.chunks = header.chunks;
    if (at.counts) {
      const Request request{Wanted::statistics, buffer, false, slot, row};
      at.statistics = problem_.with_ce && header.temperature != 1 ? statistics<true>(request) : statistics<false>(request);
    }
    return at;
  }

  __device__ __forceinline__ void finish(uint32_t row, const InFlight& at) {
    const RowHeader& header = enter(at);
    const GradientRow<T> gradient = gradient_row<T>(p_, header.gradient);
    if (!at.counts) {
      if (rank_ == 0 && threadIdx.x == 0) Totals<T, Divergence>::write_report(p_, row, 0, 0, 0, 0, 0);
      if (gradient) fill(gradient, 0, int(p_.student.width), 0.0f);
      release(1);
      return;
    }
    exchange_.wait(at.statistics);
    if (at.sums > at.statistics) exchange_.wait(at.sums);  // which may have changed the turn
    const RowNumbers& n = row_numbers(exchange_.memory, at.buffer);
    const Turn turn = n.turn;
    if (turn == Turn::nan) {
      if (gradient) fill(gradient, 0, int(p_.student.width), __builtin_nanf(""));
      release(at.chunks);
      return;
    }
    label_ = problem_.with_ce ? header.label + low_ : -1;
    bool released = false;
    if constexpr (kFar) {
      if (turn == Turn::far) {
        if (gradient) far_gradient(n, gradient), released = columns_ > 0;
      } else {
        const Apart apart = everywhere_apart(*this, at, header.temperature, gradient);
        exchange_.count = apart.exchanges, released = apart.released;
      }
    } else {
      released = run_everywhere(at, header.temperature, gradient);
    }
    if (gradient && p_.student.width > p_.vocab_size) fill(gradient, int(p_.vocab_size), int(p_.student.width), 0.0f);
    if (!released) release(at.chunks);
  }

  // ---- Sweeps over this block's share: f<Special>(student, teacher, column), G columns a call, this thread's own every
  // time, loaded one call ahead. Special: the slot holds columns outside the row, or the one that `special_column` says.
  // After each slot, again(first, address) may ask for the same slot once more.
  static constexpr auto never = [](int, uint32_t) { return false; };
  template <bool Wait, bool Release, class F, class Again = decltype(never)>
  __device__ __forceinline__ void sweep(F f, bool always_special = false, int special_column = -1, Again again = never) {
    int slot = slot_;
    uint32_t parity = parity_;
    const int begin = rank_ * problem_.share, end = begin + columns_;
    for (int first = begin; first < end; first += ring_.slot_columns) {
      if constexpr (Wait) barrier_wait(ring_.full_barrier(slot), parity);
      limit_ = min(first + ring_.slot_columns, end);
      if constexpr (Masked) mask_ = ring_.mask(slot) - uint32_t(first);
      const uint32_t address = ring_.student(slot) + mine_ * uint32_t(sizeof(T));
      const bool special = always_special || first < low_ || (limit_ - first) % (32 * G) != 0 ||
                           unsigned(special_column - first) < unsigned(limit_ - first);
      do {
        if (!special)
          sweep_slot<false>(f, first, address);
        else
          sweep_slot<true>(f, first, address);
      } while (again(first, address));
      if constexpr (Release) {
        __syncwarp();
        if (exchange_.lane == 0) barrier_arrive(ring_.empty_barrier(slot));
      }
      if (++slot == ring_.count) slot = 0, parity ^= 1;
    }
  }
  template <bool Special, class F>
  __device__ __forceinline__ void sweep_slot(F f, int first, uint32_t student) {
    const uint32_t step_bytes = step_ * uint32_t(sizeof(T)), to_teacher = ring_.half_bytes();
    int column = first + int(mine_);
    const int last = limit_ + exchange_.lane * G;  // whole warps take each turn
    if (column >= last) return;
    uint4 x = load_shared(student), y = load_shared(student + to_teacher);
    while (true) {
      const int next = column + int(step_);
      const uint4 this_x = x, this_y = y;
      const bool more = next < last;
      student += step_bytes;
      if (more) x = load_shared(student), y = load_shared(student + to_teacher);
      f.template operator()<Special>(this_x, this_y, column);
      if (!more) return;
      column = next;
    }
  }

  // Columns of both models as floats; those outside the row become `padding`.
  template <bool Special>
  __device__ __forceinline__ void load(uint4 student, uint4 teacher, int column, float padding, float (&x)[G],
                                       float (&y)[G]) const {
    widen(student, x, T{}), widen(teacher, y, T{});
    if constexpr (Special)
      if (edge(column)) {
#pragma unroll
        for (int i = 0; i < G; i++)
          if (column + i < low_ || column + i >= limit_) x[i] = padding, y[i] = padding;
      }
  }
  __device__ __forceinline__ bool edge(int column) const { return column < low_ || column + G > limit_; }

  // Slots that no sweep has released are the producer's again.
  __device__ __forceinline__ void release(int chunks) {
    __syncwarp();
    int slot = slot_;
    for (int c = 0; c < chunks; c++) {
      if (exchange_.lane == 0) barrier_arrive(ring_.empty_barrier(slot));
      if (++slot == ring_.count) slot = 0;
    }
  }

  // Columns [begin, end) of a gradient row, by the whole cluster.
  __device__ void fill(GradientRow<T> row, int begin, int end, float with) const {
    fill_row<T>(row, begin, end, with, rank_ * int(step_) + int(mine_), blocks_ * int(step_));
  }

  // ---- What few rows take is a function of its own, on a copy: in the others it costs no registers.
  struct Apart {
    int exchanges;
    bool released;
  };
  static __device__ __noinline__ Apart everywhere_apart(RowSweep self, InFlight at, float temperature, GradientRow<T> gradient) {
    const bool released = self.run_everywhere(at, temperature, gradient);
    return {self.exchange_.count, released};
  }

  // ---- Statistics
  // A warp's references are guessed from the first columns it sees. Where a slot shows them to be far too small (its
  // exponentials exceed 2^12: fp32 has the range for more, but a large exponent is a rounded one), they are raised and the
  // slot is swept again.
  template <bool Hard>
  __device__ __forceinline__ int statistics(const Request& request) {
    const int begin = rank_ * problem_.share;
    limit_ = begin + min(ring_.slot_columns, columns_);
    References to;
    if (begin + int(mine_) - exchange_.lane * G < limit_) {
      const uint32_t address = ring_.student(slot_) + mine_ * uint32_t(sizeof(T));
      to.see(*this, load_shared(address), load_shared(address + ring_.half_bytes()), begin + int(mine_));
    }
    to.settle();
    const float k = scale_;
    // With whole-number references both models share one constant, and their difference is nearly x - its mean.
    float origin = to.b - to.a, constant = to.a * k;
    float v[4] = {0, 0, 0, 0}, odd_forward = 0, odd_reverse = 0, h = 0;
    float before[5] = {0, 0, 0, 0, 0};  // of this slot
    sweep<true, false>(
        [&]<bool Special>(uint4 s, uint4 t, int column) {
          float x[G], y[G], e[G], f[G];
          load<Special>(s, t, column, kPadding, x, y);
#pragma unroll
          for (int i = 0; i < G; i++)
            e[i] = Math::exp2(fmaf(x[i], k, -constant)), f[i] = Math::exp2(fmaf(y[i] - origin, k, -constant));
          v[0] += pairwise(e), v[1] += pairwise(f);
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
            for (int i = 0; i < G; i++) e[i] = Math::exp2((x[i] - to.a) * kLog2Ef);
            h += pairwise(e);
          }
        },
        false, -1,
        [&](int first, uint32_t address) {
          v[2] += odd_forward, v[3] += odd_reverse, odd_forward = 0, odd_reverse = 0;
          const bool far_off = fmaxf(v[0] - before[0], v[1] - before[1]) > 4096;
          if (__any_sync(kAllLanes, far_off) || !to.student_known || !to.teacher_known) {
            References higher = to;
            sweep_slot<true>([&]<bool>(uint4 s, uint4 t, int column) { higher.see(*this, s, t, column); }, first, address);
            higher.settle();
            if (higher.a != to.a || higher.b != to.b) {
              v[0] = before[0], v[1] = before[1], v[2] = before[2], v[3] = before[3], h = before[4];
              move(to, higher, v, h);
              to = higher, origin = to.b - to.a, constant = to.a * k;
              before[0] = v[0], before[1] = v[1], before[2] = v[2], before[3] = v[3], before[4] = h;
              return true;
            }
          }
          before[0] = v[0], before[1] = v[1], before[2] = v[2], before[3] = v[3], before[4] = h;
          return false;
        });
    const float of_warp = warp_sums(v, exchange_.lane);
    if constexpr (Hard) {
      float of_hard[1] = {h};
      const float hard_sum = warp_sums(of_hard, exchange_.lane);
      if (exchange_.lane == 0) exchange_.mine().v[6] = hard_sum;
    }
    if (exchange_.lane == 0) {
      Parcel& parcel = exchange_.mine();
      parcel.v[4] = to.student_known ? to.a : kPadding, parcel.v[5] = to.teacher_known ? to.b : kPadding;
      parcel.v[7] = fmaf(to.a, k, -(to.a * k));  // what rounding took of the constant
    }
    return exchange_.template post_sums<4>(of_warp, request);
  }

  static __device__ __forceinline__ float pairwise(const float (&v)[G]) {
    if constexpr (G == 8)
      return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    else
      return (v[0] + v[1]) + (v[2] + v[3]);
  }

  // A warp's references, a of the student and b of the teacher: whole numbers near the largest logits seen.
  struct References {
    float a = kPadding, b = kPadding;
    bool student_known = false, teacher_known = false;  // false: nothing but -inf so far

    __device__ __forceinline__ void see(const RowSweep& sweep, uint4 s, uint4 t, int column) {
      float x[G], y[G];
      sweep.load<true>(s, t, column, kPadding, x, y);
      if (!student_known) a = kPadding;
      if (!teacher_known) b = kPadding;
#pragma unroll
      for (int i = 0; i < G; i++) a = fmaxf(a, x[i]), b = fmaxf(b, y[i]);
      student_known = teacher_known = true;
    }
    __device__ __forceinline__ void settle() {
      a = rintf(warp_max(a)), b = rintf(warp_max(b));
      student_known = a > kPadding, teacher_known = b > kPadding;
      if (!student_known) a = teacher_known ? b : 0;
      if (!teacher_known) b = a;
    }
  };

  // A warp's sums from one pair of references to another. The constant fl(a·k) is rounded; they keep the new one's.
  __device__ __forceinline__ void move(const References& from, const References& to, float (&v)[4], float& h) const {
    const float rounding = fmaf(to.a, scale_, -(to.a * scale_)) - fmaf(from.a, scale_, -(from.a * scale_));
    const float by_student = Math::exp2((from.a - to.a) * scale_ + rounding);
    const float by_teacher = Math::exp2((from.b - to.b) * scale_ + rounding);
    const float moved = (from.b - from.a) - (to.b - to.a);
    v[2] = fmaf(moved, v[1], v[2]) * by_teacher, v[3] = fmaf(moved, v[0], v[3]) * by_student;
    // What is not known has summed nothing, and may be moved by any factor.
    v[0] = from.student_known ? v[0] * by_student : 0, v[1] = from.teacher_known ? v[1] * by_teacher : 0;
    h = from.student_known ? h * Math::exp2((from.a - to.a) * kLog2Ef) : 0;
  }

  // ---- Models that are far apart: pointwise divergences in their short forms (far.h). False: this row is not for them.
  __device__ __forceinline__ FarRow<Math> far_row(const RowNumbers& n) const {
    return {scale_, n.student_lse, n.teacher_lse, n.gap};
  }

  __device__ __forceinline__ FarD far_of(const RowNumbers& n) const { return *reinterpret_cast<const FarD*>(n.far); }

  // The exchange that brings them; 0 where the row is not for the short forms.
  __device__ __forceinline__ int far_sums(const InFlight& at) {
    exchange_.wait(at.statistics);
    const RowNumbers& n = row_numbers(exchange_.memory, at.buffer);
    if (n.turn != Turn::far) return 0;
    enter(at);
    const FarD far = far_of(n);
    const FarRow<Math> row = far_row(n);
    FarSums<Math> sums = {0, 0, 0}, odd = {0, 0, 0};
    sweep<false, false>([&]<bool Special>(uint4 s, uint4 t, int column) {
      float x[G], y[G];
      load<Special>(s, t, column, kPadding, x, y);
#pragma unroll
      for (int i = 0; i < G; i++) far.add(FarColumn<Math>(x[i], y[i], row), i % 2 ? odd : sums);
    });
    float v[4] = {sums.value + odd.value, sums.slope + odd.slope, sums.largest + odd.largest, 0};
    const Request request{Wanted::sums, at.buffer, true, 0, 0};
    return exchange_.template post_sums<4>(warp_sums(v, exchange_.lane), request);
  }

  __device__ __forceinline__ void far_gradient(const RowNumbers& n, GradientRow<T> gradient) {
    const FarD far = far_of(n);
    const FarRow<Math> row = far_row(n);
    kd_ = n.kd, ce_ = n.ce, hard_factor_ = n.hard_factor, hard_reference_ = n.student_reference;
    const GradientRow<T> out = gradient - low_;
    sweep<false, true>(
        [&]<bool Special>(uint4 s, uint4 t, int column) {
          float x[G], y[G], g[G];
          load<Special>(s, t, column, kPadding, x, y);
#pragma unroll
          for (int i = 0; i < G; i++) g[i] = far.gradient(FarColumn<Math>(x[i], y[i], row));
          write<Special>(out, column, x, g);
        },
        kd_ == 0 || hard_factor_ != 0, label_);
  }

  // Adds what is not the divergence's, and stores.
  template <bool Special>
  __device__ __forceinline__ void write(const GradientRow<T>& out, int column, const float (&x)[G], float (&g)[G]) const {
    if constexpr (!Special) {
      store(out, column, g);
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
        store(out, column, g);
      } else {
#pragma unroll
        for (int i = 0; i < G; i++)
          if (column + i >= low_ && column + i < limit_) store_one(out, column + i, g[i]);
      }
    }
  }

  // ---- Any models: the forms of pointwise.h, accurate relative to the divergence however small it is.
  // Whether it released the row's slots.
  __device__ __forceinline__ bool run_everywhere(const InFlight& at, float temperature, GradientRow<T> gradient) {
    const RowNumbers& n = row_numbers(exchange_.memory, at.buffer);
    const float inv_temperature = reciprocal(temperature), folded_ce = n.folded_ce;
    kd_ = n.kd, ce_ = n.ce, hard_factor_ = n.hard_factor, hard_reference_ = n.student_reference;
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
      row.gap_rest -= sums(row, ForwardKL<Math>(p_.parameters, row), 0, false, at.buffer);
      normalise_gap(row);
    }
    const D divergence(p_.parameters, row);
    float pivot = 0, mean_slope = 0;
    if (!D::slopes_sum_to_zero || !gradient) {
      if constexpr (!D::slopes_sum_to_zero) {
        pivot = divergence.derivative(top_column(row));
        if (!isfinite(pivot)) pivot = 0;
      }
      mean_slope = sums(row, divergence, pivot, true, at.buffer);
      if (D::slopes_sum_to_zero) mean_slope = 0;
    }
    if (gradient) {
      const float by_q = fmaf(-kd_, mean_slope, folded_ce);
      const GradientRow<T> out = gradient - low_;
      float v[1] = {0};
      sweep<false, true>(
          [&]<bool Special>(uint4 s, uint4 t, int column) {
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
        const Request request{Wanted::sums, at.buffer, true, 0, 0};  // the value, which nobody here waits for
        float all[4] = {v[0], 0, 0, 0};
        exchange_.template post_sums<4>(warp_sums(all, exchange_.lane), request);
      }
    }
    return gradient && columns_ > 0;
  }

  // Nats: log-ratios of a spread of 0.1, and of 0.045 where 16 bits hide more.
  static constexpr float kRefineBelow = sizeof(T) == 2 ? 0.001f : 0.005f;

  // The sum of the slopes. The values' is reported if it is the row's own divergence.
  template <class AnyD>
  __device__ __forceinline__ float sums(const RowConstants<Math>& row, const AnyD& divergence, float pivot, bool is_value,
                                        int buffer) {
    float v[2] = {0, 0};
    sweep<false, false>([&]<bool Special>(uint4 s, uint4 t, int column) {
      float x[G], y[G];
      load<Special>(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
      for (int i = 0; i < G; i++) {
        const auto c = Column<Math>::make(x[i], y[i], row);
        v[0] += divergence.value(c), v[1] += divergence.slope(c, pivot);
      }
    });
    float all[4] = {v[0], v[1], 0, 0};
    exchange_.sums(all, is_value, buffer);
    return all[1];
  }

  // The student's most likely column.
  __device__ __forceinline__ Column<Math> top_column(const RowConstants<Math>& row) {
    float best = -__builtin_inff(), with = 0;
    sweep<false, false>([&]<bool Special>(uint4 s, uint4 t, int column) {
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
  const int blocks_, rank_;
  const uint32_t mine_, step_;  // this thread's first column in a slot, and from there to the next
  // Of the row entered: where it begins in the ring; this block's columns, and the row's first, counted from the 16-byte
  // boundary before it; log2(e)/T.
  int slot_ = 0;
  uint32_t parity_ = 0;
  int columns_ = 0, low_ = 0, limit_ = 0;  // limit_: the end of the slot being swept
  float scale_ = kLog2Ef;
  float kd_ = 0, ce_ = 0, hard_factor_ = 0, hard_reference_ = 0;
  int label_ = -1;
  uint32_t mask_ = 0;  // where the slot's mask lies, less its first column
};

}  // namespace kdkernels::cuda
