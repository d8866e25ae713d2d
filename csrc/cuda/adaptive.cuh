// Adaptive KL: symmetric KL whose weight is the row's own, from what the models differ by over the head and over the tail.
//     split -> statistics -> sums of |p - q| by set -> gradient
#pragma once
#include "split.cuh"

namespace kdkernels {

// Names the divergence to far.h's and the sweeps' templates; its columns are those of SymmetricKL.
template <class Math>
struct AdaptiveKL {};

template <class Math>
struct Far<AdaptiveKL, Math> : Far<SymmetricKL, Math> {
  using V = typename Math::V;
  static constexpr bool from_kl = false;
  KD_INLINE Far(const float* p) : Far<SymmetricKL, Math>(p) {}
  KD_INLINE V apart(const FarColumn<Math>& c) const { return Math::abs(Math::fma(-this->by_p / this->by_q, c.p, c.q)); }
  KD_INLINE void set_weight(float head, float tail) { this->weight = head + tail > 0 ? tail / (head + tail) : 0; }
};

}  // namespace kdkernels

namespace kdkernels::cuda {

template <class T>
class AdaptiveTotals : public Totals<T, AdaptiveKL> {
  using Base = Totals<T, AdaptiveKL>;
  using Base::headers_;
  using Base::lane_;
  using Base::memory_;
  using Base::warps_;

 public:
  __device__ AdaptiveTotals(const ClusterProblem& problem, const Ring<T>& ring, ExchangeMemory* memory, int blocks, int rank,
                            int warps, int lane, SplitMemory<T>* split, uint32_t* counts)
      : Base(problem, ring.headers, memory, blocks, rank, warps, lane), select_(problem, &split->select, counts, blocks, rank, lane) {}

  __device__ void serve(bool second) {
    if (second) return;
    for (int n = 0;; n++) {
      const int b = n % ExchangeMemory::kInFlight;
      barrier_wait(shared_address(&memory_->posted[b]), n / ExchangeMemory::kInFlight & 1);
      const Request request = memory_->request[b];
      if (request.what == Wanted::nothing_more) return;
      Parcel part;
      if (lane_ < warps_) part = memory_->of_warps[b][lane_];
      switch (request.what) {
        case Wanted::select: {
          float v[4] = {part.v[0], part.v[1], 0, 0};
          select_.round(warp_sums(v, lane_), request, headers_[request.slot].log2e_over_temperature);
          break;
        }
        case Wanted::statistics: this->statistics(part, request); break;
        case Wanted::sums: sums(part, request, memory_->result[b]); break;
        default: top(part, memory_->result[b]);
      }
      __syncwarp();
      if (lane_ == 0) barrier_arrive(shared_address(&memory_->ready[b]));
    }
  }

 private:
  __device__ void top(const Parcel& part, Parcel& result) {
    Base::top(part, result);
    __syncwarp();
    select_.set_maximum(result.v[0]);
  }

  __device__ void sums(const Parcel& part, const Request& request, Parcel& result) {
    const float total = this->add(part, result);
    __syncwarp();
    if (!request.is_value || lane_ != 0) return;
    RowNumbers& n = row_numbers(memory_, request.buffer);
    float value = total;
    if constexpr (Base::kFar)
      if (n.turn == Turn::far) {
        auto& far = Base::far_of(n);
        far.set_weight(result.v[0], result.v[1]);
        value = far.value(n.forward_kl, n.reverse_kl);
        if (!far.trusts({0, 0, 0}, value)) n.turn = Turn::everywhere;  // and another value comes
        far.scale(n.kd, fmaf(-n.kd, far.slope_sum(n.forward_kl, n.reverse_kl), n.folded_ce));
      }
    Base::report(n, value);
  }

  SelectTotals<T, true> select_;
};

template <class T>
class AdaptiveSweep : public SplitSweep<T, Split::top_p, RowSweep<T, AdaptiveKL>> {
  using Base = SplitSweep<T, Split::top_p, RowSweep<T, AdaptiveKL>>;
  using Math = FloatMath;
  using Base::columns_;
  using Base::exchange_;
  using Base::G;
  using Base::hard_factor_;
  using Base::kd_;
  using Base::label_;
  using Base::low_;
  using Base::p_;
  using Base::problem_;
  using Base::rank_;
  using Base::ring_;
  using typename Base::InFlight;
  static constexpr bool kFar = AdaptiveTotals<T>::kFar;

 public:
  using Totals = AdaptiveTotals<T>;
  using Base::Base;

  __device__ void consume(uint32_t first_row, uint32_t row_step) {
    Base::consume(*this, first_row, row_step, Base::kBegin | Base::kMiddle << 4 | Base::kStart << 8 | Base::kFinish << 12);
  }

 private:
  friend Base;

  __device__ __forceinline__ void middle(InFlight& at) {
    if constexpr (kFar)
      if (this->enter(at).scale != 0 && short_forms<T>(problem_)) at.sums = far_sums(at);
  }

  __device__ __forceinline__ int start(InFlight& at, uint32_t row) {
    this->settle(at);
    const RowHeader& header = this->enter(at);
    if (header.scale == 0) return 0;
    const Request request{Wanted::statistics, at.buffer(), false, at.slot(), row};
    const bool hard = problem_.with_ce && header.temperature != 1;
    return hard ? this->template statistics<true>(request) : this->template statistics<false>(request);
  }

  __device__ __forceinline__ void finish(const InFlight& at, uint32_t row) {
    const RowHeader& header = this->enter(at);
    const GradientRow<T> gradient = gradient_row<T>(p_, header.gradient);
    const int chunks = header.chunks;
    if (header.scale == 0) {
      if (rank_ == 0 && threadIdx.x == 0) Totals::write_report(p_, row, 0, 0, 0, 0, 0);
      if (gradient) this->fill(gradient, 0, int(p_.student.width), 0.0f);
      this->release(1);
      return;
    }
    exchange_.wait(at.exchange);
    if (at.sums > at.exchange) exchange_.wait(at.sums);  // which may have changed the turn
    const RowNumbers& n = row_numbers(exchange_.memory, at.buffer());
    const Turn turn = n.turn;
    if (turn == Turn::nan) {
      if (gradient) this->fill(gradient, 0, int(p_.student.width), __builtin_nanf(""));
      this->release(chunks);
      return;
    }
    this->set_split(at, 0);
    label_ = problem_.with_ce ? header.label + low_ : -1;
    bool released = false;
    if constexpr (kFar) {
      if (turn == Turn::far) {
        if (gradient) this->far_gradient(n, gradient), released = columns_ > 0;
      }
    }
    if (!kFar || turn != Turn::far) {
      const typename Base::Apart apart = everywhere_apart(*this, at, header.temperature, gradient);
      exchange_.count = apart.exchanges, released = apart.released;
    }
    if (gradient && p_.student.width > p_.vocab_size)
      this->fill(gradient, int(p_.vocab_size), int(p_.student.width), 0.0f);
    if (!released) this->release(chunks);
  }

  static __device__ __noinline__ typename Base::Apart everywhere_apart(AdaptiveSweep self, InFlight at, float temperature,
                                                                       GradientRow<T> gradient) {
    const bool released = self.run_everywhere(at, temperature, gradient);
    return {self.exchange_.count, released};
  }

  // What the models differ by over the head and over the tail. The exchange that brings it; 0: not for far models' forms.
  __device__ __forceinline__ int far_sums(const InFlight& at) {
    exchange_.wait(at.exchange);
    const RowNumbers& n = row_numbers(exchange_.memory, at.buffer());
    if (n.turn != Turn::far) return 0;
    this->enter(at);
    this->set_split(at, 0);
    const auto far = this->far_of(n);
    const FarRow<Math> row = this->far_row(n);
    float head = 0, tail = 0;
    this->template sweep<false, false>([&]<bool Special>(uint4 s, uint4 t, int column) {
      float x[G], y[G];
      this->template load<Special>(s, t, column, kPadding, x, y);
#pragma unroll
      for (int i = 0; i < G; i++) {
        const float apart = far.apart(FarColumn<Math>(x[i], y[i], row));
        if (this->template strong<Special>(y[i], column, {}, i))
          head += apart;
        else
          tail += apart;
      }
    });
    float v[4] = {head, tail, 0, 0};
    const Request request{Wanted::sums, at.buffer(), true, 0, 0};
    return exchange_.template post_sums<4>(warp_sums(v, exchange_.lane), request);
  }

  // Whether it released the row's slots. See RowSweep::run_everywhere.
  __device__ __forceinline__ bool run_everywhere(const InFlight& at, float temperature, GradientRow<T> gradient) {
    const RowNumbers& n = row_numbers(exchange_.memory, at.buffer());
    const float folded_ce = n.folded_ce;
    kd_ = n.kd, this->ce_ = n.ce, hard_factor_ = n.hard_factor, this->hard_reference_ = n.student_reference;
    const float inv_temperature = reciprocal(temperature), max_gap = n.teacher_reference - n.student_reference;
    RowConstants<Math> row;
    row.student_max = n.student_reference, row.teacher_max = n.teacher_reference;
    row.shift = truncf(max_gap / 4) * 4;
    row.inv_temperature = inv_temperature, row.log2e_over_temperature = this->scale_;
    row.inv_student_sum = n.inv_student_sum, row.inv_teacher_sum = n.inv_teacher_sum;
    row.log_student_sum = n.student_log, row.log_teacher_sum = n.teacher_log;
    row.gap = n.gap_of_logs, row.gap_rest = (max_gap - row.shift) * inv_temperature;
    Base::normalise_gap(row);
    if (gradient && !(n.forward_kl > Base::kRefineBelow)) {
      row.gap_rest -= this->sums(row, ForwardKL<Math>(p_.parameters, row), 0, false, at.buffer());
      Base::normalise_gap(row);
    }
    const ForwardKL<Math> forward(p_.parameters, row);
    const ReverseKL<Math> reverse(p_.parameters, row);
    float pivot = reverse.derivative(this->top_column(row));
    if (!isfinite(pivot)) pivot = 0;
    float v[4] = {0, 0, 0, 0}, apart[4] = {0, 0, 0, 0};
    this->template sweep<false, false>([&]<bool Special>(uint4 s, uint4 t, int column) {
      float x[G], y[G];
      this->template load<Special>(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
      for (int i = 0; i < G; i++) {
        const auto c = Column<Math>::make(x[i], y[i], row);
        v[0] += forward.value(c), v[1] += reverse.value(c), v[2] += reverse.slope(c, pivot);
        const float difference = fabsf(c.student_minus_teacher());
        if (this->template strong<Special>(y[i], column, {}, i))
          apart[0] += difference;
        else
          apart[1] += difference;
      }
    });
    exchange_.sums(apart, false, at.buffer());
    const float gap = apart[0] + apart[1], of_reverse = gap > 0 ? apart[1] / gap : 0, of_forward = gap > 0 ? apart[0] / gap : 1;
    const auto weighted = [&](float x, float y) { return (of_forward != 0 ? of_forward * x : 0) + (of_reverse != 0 ? of_reverse * y : 0); };
    float value[4] = {weighted(v[0], v[1]), v[2], 0, 0};
    exchange_.sums(value, true, at.buffer());
    if (!gradient) return false;
    const float by_q = fmaf(-kd_ * of_reverse, value[1], folded_ce);
    const GradientRow<T> out = gradient - low_;
    this->template sweep<false, true>(
        [&]<bool Special>(uint4 s, uint4 t, int column) {
          float x[G], y[G], g[G];
          this->template load<Special>(s, t, column, -__builtin_inff(), x, y);
#pragma unroll
          for (int i = 0; i < G; i++) {
            const auto c = Column<Math>::make(x[i], y[i], row);
            g[i] = kd_ * weighted(c.student_minus_teacher(), reverse.slope(c, pivot));
            if (by_q != 0) g[i] = fmaf(by_q, c.student(), g[i]);
          }
          this->template write<Special>(out, column, x, g);
        },
        kd_ == 0 || hard_factor_ != 0, label_);
    return columns_ > 0;
  }
};

}  // namespace kdkernels::cuda
