// The decoupled divergences: forward KL whose row is split into a strong and a weak set, each with accumulators of its own,
// so that a term keeps its digits however little mass its set has.
//     split -> statistics -> gradient
// With q~, p~ the distributions within a set and D = Q_S - P_S, T times the gradient is
//     bcd·D·q~ + w_S·(q~ - p~) in the strong set,   -bcd·D·q~ + w_W·(q~ - p~) in the weak one
#pragma once
#include "decoupled_totals.cuh"

namespace kdkernels::cuda {

template <class T, Split Kind>
class DecoupledSweep : public SplitSweep<T, Kind, RowSweep<T, ForwardKL, Kind == Split::given>> {
  using Base = SplitSweep<T, Kind, RowSweep<T, ForwardKL, Kind == Split::given>>;
  using Math = FloatMath;
  using Base::columns_;
  using Base::exchange_;
  using Base::G;
  using Base::hard_factor_;
  using Base::kd_;
  using Base::label_;
  using Base::limit_;
  using Base::low_;
  using Base::mine_;
  using Base::p_;
  using Base::problem_;
  using Base::rank_;
  using Base::ring_;
  using Base::scale_;
  using Base::slot_;
  using typename Base::InFlight;
  using typename Base::References;
  static constexpr bool kFar = DecoupledTotals<T, Kind>::kFar;

 public:
  using Totals = DecoupledTotals<T, Kind>;
  using Base::Base;

  __device__ void consume(uint32_t first_row, uint32_t row_step) {
    constexpr uint32_t late = Base::kBegin | Base::kFinish << 4 | Base::kStart << 8, early = Base::kBegin | Base::kStart << 4 | Base::kFinish << 8;
    Base::consume(*this, first_row, row_step, is_threshold(Kind) ? late : early);
  }

 private:
  friend Base;

  __device__ __forceinline__ void middle(const InFlight&) {}

  __device__ __forceinline__ int start(InFlight& at, uint32_t row) {
    this->settle(at);
    const RowHeader& header = this->enter(at);
    if (header.scale == 0) return 0;
    this->set_split(at, header.label);
    const bool hard = problem_.with_ce && header.temperature != 1;
    return hard ? statistics<true>(at, row) : statistics<false>(at, row);
  }

  __device__ __forceinline__ void finish(const InFlight& at, uint32_t row) {
    const RowHeader& header = this->enter(at);
    const GradientRow<T> gradient = gradient_row<T>(p_, header.gradient);
    const int chunks = header.chunks;
    if (header.scale == 0) {
      if (rank_ == 0 && threadIdx.x == 0) {
        Totals::write_report(p_, row, 0, 0, 0, 0, 0);
        Totals::write_terms(p_, row, 0, 0, 0, 0, 0);
      }
      if (gradient) this->fill(gradient, 0, int(p_.student.width), 0.0f);
      this->release(1);
      return;
    }
    this->set_split(at, header.label);
    label_ = problem_.with_ce ? header.label + low_ : -1;
    exchange_.wait(at.exchange);
    const DecoupledNumbers& n = decoupled_numbers(exchange_.memory, at.buffer());
    const Turn turn = n.turn;
    bool released = false;
    if (turn == Turn::nan) {
      if (gradient) this->fill(gradient, 0, int(p_.student.width), __builtin_nanf(""));
      this->release(chunks);
      return;
    }
    kd_ = n.kd, this->ce_ = n.ce, hard_factor_ = n.hard_factor, this->hard_reference_ = n.student_reference;
    if (kFar && turn == Turn::far) {
      if (gradient) far_gradient(n, gradient), released = columns_ > 0;
    } else {
      const auto everywhere = n.sets_apart ? everywhere_apart<true> : everywhere_apart<false>;
      const typename Base::Apart apart = everywhere(*this, at, header.temperature, gradient);
      exchange_.count = apart.exchanges, released = apart.released;
    }
    if (gradient && p_.student.width > p_.vocab_size)
      this->fill(gradient, int(p_.vocab_size), int(p_.student.width), 0.0f);
    if (!released) this->release(chunks);
  }

  template <bool OwnReferences>
  static __device__ __noinline__ typename Base::Apart everywhere_apart(DecoupledSweep self, InFlight at, float temperature,
                                                                       GradientRow<T> gradient) {
    const bool released = self.template run_everywhere<OwnReferences>(at, temperature, gradient);
    return {self.exchange_.count, released};
  }

  // A set's sums over a thread's columns: student, teacher, forward (of StatisticSums). Two chains: an addition need not
  // wait for the last.
  struct SetSums {
    float v[4] = {0, 0, 0, 0}, odd[3] = {0, 0, 0};
    __device__ __forceinline__ void add(bool is_odd, float e, float f, float difference) {
      float(&to)[3] = is_odd ? odd : reinterpret_cast<float(&)[3]>(v);
      to[0] += e, to[1] += f, to[2] = fmaf(f, difference, to[2]);
    }
    __device__ __forceinline__ void settle() {
#pragma unroll
      for (int i = 0; i < 3; i++) v[i] += odd[i], odd[i] = 0;
    }
  };

  // RowSweep::statistics by set. Both sets' sums stand against one pair of references a warp.
  template <bool Hard>
  __device__ __forceinline__ int statistics(const InFlight& at, uint32_t row) {
    const int begin = rank_ * problem_.share;
    limit_ = begin + min(ring_.slot_columns, columns_);
    References to;
    if (begin + int(mine_) - exchange_.lane * G < limit_) {
      const uint32_t address = ring_.student(slot_) + mine_ * uint32_t(sizeof(T));
      to.see(*this, load_shared(address), load_shared(address + ring_.half_bytes()), begin + int(mine_));
    }
    to.settle();
    const float k = scale_;
    float origin = to.b - to.a, constant = to.a * k;
    SetSums strong, weak, strong_before, weak_before;
    float h = 0, h_before = 0;
    this->template sweep<true, false>(
        [&]<bool Special>(uint4 s, uint4 t, int column) {
          float x[G], y[G], e[G], f[G];
          this->template load<Special>(s, t, column, kPadding, x, y);
          const auto bits = this->mask_bytes(column);
#pragma unroll
          for (int i = 0; i < G; i++)
            e[i] = Math::exp2(fmaf(x[i], k, -constant)), f[i] = Math::exp2(fmaf(y[i] - origin, k, -constant));
          if constexpr (Kind == Split::label && !Special) {
            weak.v[0] += Base::pairwise(e), weak.v[1] += Base::pairwise(f);
#pragma unroll
            for (int i = 0; i < G; i++) {
              float& forward = i % 2 ? weak.odd[2] : weak.v[2];
              forward = fmaf(f[i], (y[i] - origin) - x[i], forward);
            }
          } else {
#pragma unroll
            for (int i = 0; i < G; i++) {
              const float difference = (y[i] - origin) - x[i];
              if (this->template strong<Special>(y[i], column, bits, i))
                strong.add(i % 2, e[i], f[i], difference);
              else
                weak.add(i % 2, e[i], f[i], difference);
            }
          }
          if constexpr (Hard) {
#pragma unroll
            for (int i = 0; i < G; i++) e[i] = Math::exp2((x[i] - to.a) * kLog2Ef);
            h += Base::pairwise(e);
          }
        },
        false, this->split_column(),
        [&](int first, uint32_t address) {
          strong.settle(), weak.settle();
          const float student = (strong.v[0] - strong_before.v[0]) + (weak.v[0] - weak_before.v[0]);
          const float teacher = (strong.v[1] - strong_before.v[1]) + (weak.v[1] - weak_before.v[1]);
          if (__any_sync(kAllLanes, fmaxf(student, teacher) > 4096) || !to.student_known || !to.teacher_known) {
            References higher = to;
            this->template sweep_slot<true>([&]<bool>(uint4 s, uint4 t, int column) { higher.see(*this, s, t, column); },
                                            first, address);
            higher.settle();
            if (higher.a != to.a || higher.b != to.b) {
              strong = strong_before, weak = weak_before, h = h_before;
              float nothing = 0;
              this->move(to, higher, strong.v, nothing), this->move(to, higher, weak.v, h);
              to = higher, origin = to.b - to.a, constant = to.a * k;
              strong_before = strong, weak_before = weak, h_before = h;
              return true;
            }
          }
          strong_before = strong, weak_before = weak, h_before = h;
          return false;
        });
    float all[8] = {strong.v[0], strong.v[1], strong.v[2], 0, weak.v[0], weak.v[1], weak.v[2], h};
    const float of_warp = warp_sums(all, exchange_.lane);
    const int lane = exchange_.lane, value = lane / 4;
    Parcel& parcel = exchange_.mine();
    if (lane % 4 == 0) {
      if (value < 3) this->memory_->strong_of_warps[at.buffer()][value][exchange_.warp] = of_warp;
      if (value > 3) parcel.v[value == 7 ? 6 : value - 4] = of_warp;
    }
    if (lane == 0) {
      parcel.v[4] = to.student_known ? to.a : kPadding, parcel.v[5] = to.teacher_known ? to.b : kPadding;
      parcel.v[7] = fmaf(to.a, k, -(to.a * k));  // what rounding took of the constant
    }
    return exchange_.post({Wanted::statistics, at.buffer(), false, at.slot(), row});
  }

  __device__ __forceinline__ void far_gradient(const DecoupledNumbers& n, GradientRow<T> gradient) {
    const FarRow<Math> row = {scale_, n.student_lse, n.teacher_lse, 0};
    const float strong_q = n.by_q[kStrong], strong_p = n.by_p[kStrong], weak_q = n.by_q[kWeak], weak_p = n.by_p[kWeak];
    const GradientRow<T> out = gradient - low_;
    // The label's column in its special form; with cross-entropy it is the same one.
    this->template sweep<false, true>(
        [&]<bool Special>(uint4 s, uint4 t, int column) {
          float x[G], y[G], g[G];
          this->template load<Special>(s, t, column, kPadding, x, y);
          const auto bits = this->mask_bytes(column);
#pragma unroll
          for (int i = 0; i < G; i++) {
            const FarColumn<Math> c(x[i], y[i], row);
            const bool strong = this->template strong<Special>(y[i], column, bits, i);
            g[i] = fmaf(strong ? strong_q : weak_q, c.q, (strong ? strong_p : weak_p) * c.p);
          }
          this->template write<Special>(out, column, x, g);
        },
        kd_ == 0 || hard_factor_ != 0, Kind == Split::label ? this->split_column() : label_);
  }

  // ---- Any models. In a set's numbers, the forms of pointwise.h see the distributions within it.
  struct Set {
    float student_max, teacher_max, shift;  // the row's, unless the sets have references of their own
    float gap, gap_rest, inv_student_sum, inv_teacher_sum;
  };

  static __device__ __forceinline__ Set set_of(float a, float b, float student_sum, float teacher_sum, float log_gap,
                                               float inv_temperature) {
    Set set;
    const float max_gap = b - a;
    set.student_max = a, set.teacher_max = b, set.shift = truncf(max_gap / 4) * 4;
    // A set without mass has no distribution, and no column that would show it.
    set.inv_student_sum = student_sum > 0 ? reciprocal(student_sum) : 0;
    set.inv_teacher_sum = teacher_sum > 0 ? reciprocal(teacher_sum) : 0;
    set.gap = student_sum > 0 && teacher_sum > 0 ? log_gap : 0, set.gap_rest = (max_gap - set.shift) * inv_temperature;
    normalise_gap(set);
    return set;
  }

  // As RowSweep's, of a set.
  static __device__ void normalise_gap(Set& set) {
    const float sum = set.gap + set.gap_rest, part = sum - set.gap;
    set.gap_rest = (set.gap - (sum - part)) + (set.gap_rest - part);
    set.gap = sum;
  }

  template <bool OwnReferences>
  __device__ __forceinline__ Column<Math> column_of(float x, float y, bool strong, const Set& of_strong, const Set& of_weak,
                                                    float inv_temperature) const {
    RowConstants<Math> row;
    row.inv_temperature = inv_temperature, row.log2e_over_temperature = scale_;
    row.gap = strong ? of_strong.gap : of_weak.gap, row.gap_rest = strong ? of_strong.gap_rest : of_weak.gap_rest;
    row.inv_student_sum = strong ? of_strong.inv_student_sum : of_weak.inv_student_sum;
    row.inv_teacher_sum = strong ? of_strong.inv_teacher_sum : of_weak.inv_teacher_sum;
    row.student_max = of_weak.student_max, row.teacher_max = of_weak.teacher_max, row.shift = of_weak.shift;
    if (OwnReferences && strong)
      row.student_max = of_strong.student_max, row.teacher_max = of_strong.teacher_max, row.shift = of_strong.shift;
    return Column<Math>::make(x, y, row);
  }

  // The sums of q~ - p~ over both sets.
  template <bool OwnReferences>
  __device__ __forceinline__ void differences(const Set& in_strong, const Set& in_weak, float inv_temperature, float (&total)[2]) {
    float of_strong = 0, of_weak = 0;
    this->template sweep<false, false>(
        [&]<bool Special>(uint4 s, uint4 t, int column) {
          float x[G], y[G];
          this->template load<Special>(s, t, column, -__builtin_inff(), x, y);
          const auto bits = this->mask_bytes(column);
#pragma unroll
          for (int i = 0; i < G; i++) {
            const bool strong = this->template strong<Special>(y[i], column, bits, i);
            const float v =
                column_of<OwnReferences>(x[i], y[i], strong, in_strong, in_weak, inv_temperature).student_minus_teacher();
            if (strong)
              of_strong += v;
            else
              of_weak += v;
          }
        },
        false, this->split_column());
    float all[4] = {of_strong, of_weak, 0, 0};
    exchange_.sums(all, false, 0);
    total[kStrong] = all[0], total[kWeak] = all[1];
  }

  // The largest logits of a set; -inf where it has none.
  __device__ void set_maxima(bool of_strong, float& a, float& b) {
    a = b = -__builtin_inff();
    this->template sweep<false, false>(
        [&]<bool Special>(uint4 s, uint4 t, int column) {
          float x[G], y[G];
          this->template load<Special>(s, t, column, -__builtin_inff(), x, y);
          const auto bits = this->mask_bytes(column);
#pragma unroll
          for (int i = 0; i < G; i++)
            if (this->template strong<Special>(y[i], column, bits, i) == of_strong && !(Special && outside(column + i)))
              a = fmaxf(a, x[i]), b = fmaxf(b, y[i]);
        },
        true);
    float nothing = 0;
    exchange_.top(a, nothing), exchange_.top(b, nothing);
  }
  __device__ __forceinline__ bool outside(int column) const { return column < low_ || column >= limit_; }

  // Both sets' sums against references of their own.
  __device__ void sums_apart(float (&a)[2], float (&b)[2], float (&student)[2], float (&teacher)[2]) {
#pragma unroll
    for (int set = kStrong; set <= kWeak; set++) {
      set_maxima(set == kStrong, a[set], b[set]);
      // Nothing but -inf: any reference will do.
      const float to_a = isfinite(a[set]) ? a[set] : 0, to_b = isfinite(b[set]) ? b[set] : 0;
      float v[4] = {0, 0, 0, 0};
      this->template sweep<false, false>(
          [&]<bool Special>(uint4 s, uint4 t, int column) {
            float x[G], y[G];
            this->template load<Special>(s, t, column, -__builtin_inff(), x, y);
            const auto bits = this->mask_bytes(column);
#pragma unroll
            for (int i = 0; i < G; i++)
              if (this->template strong<Special>(y[i], column, bits, i) == (set == kStrong))
                v[0] += Math::exp2((x[i] - to_a) * scale_), v[1] += Math::exp2((y[i] - to_b) * scale_);
          },
          true);
      exchange_.sums(v, false, 0);
      a[set] = to_a, b[set] = to_b, student[set] = v[0], teacher[set] = v[1];
    }
  }

  // Whether it released the row's slots.
  template <bool OwnReferences>
  __device__ __forceinline__ bool run_everywhere(const InFlight& at, float temperature, GradientRow<T> gradient) {
    DecoupledNumbers& n = decoupled_numbers(exchange_.memory, at.buffer());
    const float inv_temperature = reciprocal(temperature), folded_ce = n.folded_ce;
    float a[2] = {n.student_reference, n.student_reference}, b[2] = {n.teacher_reference, n.teacher_reference};
    float student[2] = {n.student_sum[0], n.student_sum[1]}, teacher[2] = {n.teacher_sum[0], n.teacher_sum[1]};
    float gap[2] = {n.log_gap[0], n.log_gap[1]};
    if constexpr (OwnReferences) {
      sums_apart(a, b, student, teacher);
#pragma unroll
      for (int set = kStrong; set <= kWeak; set++) gap[set] = log_ratio(Logarithm::of(teacher[set]), Logarithm::of(student[set]));
    }
    Set sets[2];
#pragma unroll
    for (int set = kStrong; set <= kWeak; set++)
      sets[set] = set_of(a[set], b[set], student[set], teacher[set], gap[set], inv_temperature);
    Set &strong = sets[kStrong], &weak = sets[kWeak];
    // Where the models nearly agree, a gradient carries the normalisers' rounding at first order: one Newton step for
    // sum p~ = sum q~ in each set. (NaN: a column is -inf in both models.)
    float step[2] = {0, 0};
    const bool has[2] = {student[0] > 0 && teacher[0] > 0, student[1] > 0 && teacher[1] > 0};
    if (!(fminf(has[0] ? n.divergence[0] : 1, has[1] ? n.divergence[1] : 1) > Base::kRefineBelow) || OwnReferences) {
      differences<OwnReferences>(strong, weak, inv_temperature, step);
#pragma unroll
      for (int set = kStrong; set <= kWeak; set++)
        if (!has[set]) step[set] = 0;
#pragma unroll
      for (int set = kStrong; set <= kWeak; set++) sets[set].gap_rest -= step[set], normalise_gap(sets[set]);
    }
    // The sets' odds. Their difference keeps its digits: the references' differences in it are exact.
    const float apart_a = a[kStrong] - a[kWeak], apart_b = b[kStrong] - b[kWeak];
    const float difference = (apart_b - apart_a) * inv_temperature + ((gap[0] - step[0]) - (gap[1] - step[1]));
    const auto odds = [&](float apart, const float (&sum)[2]) { return fmaf(apart, inv_temperature, logf(sum[kStrong]) - logf(sum[kWeak])); };
    const auto m = SetMasses<float>::make(odds(apart_b, teacher), odds(apart_a, student),
                                          has[0] && has[1] ? difference : odds(apart_b, teacher) - odds(apart_a, student));
    if (threadIdx.x == 0) Totals::set_terms(n, m, problem_.parameters[3] != 0);
    __syncwarp();
    DecoupledNumbers own;
#pragma unroll
    for (int i = 0; i < 3; i++) own.weight[i] = n.weight[i];
    Totals::set_terms(own, m, problem_.parameters[3] != 0);
    const SetFactors<float> of_strong = own.weights.strong(m), of_weak = own.weights.weak(m);
    const float by_slope[2] = {kd_ * of_strong.slope, kd_ * of_weak.slope};
    const float by_q[2] = {fmaf(folded_ce, m.student_strong, kd_ * of_strong.student),
                           fmaf(folded_ce, m.student_weak, kd_ * of_weak.student)};
    const ForwardKL<Math> divergence(p_.parameters, {});
    float v[4] = {0, 0, 0, 0};
    const GradientRow<T> out = gradient ? gradient - low_ : GradientRow<T>{};
    auto block = [&]<bool Special>(uint4 s, uint4 t, int column) {
      float x[G], y[G], g[G];
      this->template load<Special>(s, t, column, -__builtin_inff(), x, y);
      const auto bits = this->mask_bytes(column);
#pragma unroll
      for (int i = 0; i < G; i++) {
        const bool in_strong = this->template strong<Special>(y[i], column, bits, i);
        const auto c = column_of<OwnReferences>(x[i], y[i], in_strong, strong, weak, inv_temperature);
        const float value = divergence.value(c);
        if (in_strong)
          v[0] += value;
        else
          v[1] += value;
        g[i] = (in_strong ? by_slope[0] : by_slope[1]) * c.student_minus_teacher();
        const float q = in_strong ? by_q[0] : by_q[1];
        if (q != 0) g[i] = fmaf(q, c.student(), g[i]);
      }
      if (out) this->template write<Special>(out, column, x, g);
    };
    if (gradient)
      this->template sweep<false, true>(block, kd_ == 0 || hard_factor_ != 0, Kind == Split::label ? this->split_column() : label_);
    else
      this->template sweep<false, false>(block, false, this->split_column());
    // A set without the teacher's mass has no term; one without the student's, where the teacher has some, an infinite one.
#pragma unroll
    for (int set = kStrong; set <= kWeak; set++)
      if (!has[set]) v[set] = teacher[set] > 0 && exchange_.lane == 0 && exchange_.warp == 0 && rank_ == 0 ? __builtin_inff() : 0;
    if (Kind == Split::label && has[kStrong]) v[kStrong] = 0;
    const Request request{Wanted::sums, at.buffer(), true, 0, 0};  // the values, which nobody here waits for
    exchange_.template post_sums<4>(warp_sums(v, exchange_.lane), request);
    return gradient && columns_ > 0;
  }
};

}  // namespace kdkernels::cuda
