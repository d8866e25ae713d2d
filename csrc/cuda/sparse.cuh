// The sweep over a row of the student's logits whose teacher names a few ids: as in sweep.cuh, a cluster holds the row in
// shared memory, sweeps it for its statistics and once more for the gradient. Before the first sweep a warp of its own
// takes the ids' columns out (-inf), so that the sums are of the other columns alone: nothing is subtracted.
#pragma once
#include "sparse_totals.cuh"

namespace kdkernels::cuda {

template <class T>
class SparseSweep {
  using Math = FloatMath;
  static constexpr int G = kGroup<T>;

 public:
  __device__ SparseSweep(const ClusterProblem& problem, const SparseRing<T>& ring, SparseMemory* memory, const Exchange& exchange,
                         int blocks, int rank)
      : problem_(problem), p_(problem.rows), ring_(ring), memory_(memory), exchange_(exchange), blocks_(blocks), rank_(rank),
        mine_(kept(threadIdx.x * G)), step_(kept(exchange.warps * 32 * G)) {}

  // Rows are begun so many ahead of the one that is finished: totals take longer than a sweep does. Both steps stand here
  // once, so that their code stays in the instruction cache.
  __device__ void consume(uint32_t first_row, uint32_t row_step) {
    const uint32_t rows = uint32_t(p_.rows);
    const int count = first_row < rows ? int((rows - first_row + row_step - 1) / row_step) : 0, ahead = problem_.ahead;
    uint32_t first = 0, second = 0, third = 0;  // rows between their two sweeps
    int begun = 0, slot = 0;
    uint32_t parity = 0;
    for (int done = 0; done < count;) {
      const int open = begun - done;
      if (begun < count && open <= ahead) {
        const InFlight at = begin(first_row + uint32_t(begun++) * row_step, slot, parity);
        slot += at.chunks;
        if (slot >= ring_.count) slot -= ring_.count, parity ^= 1;
        (open == 0 ? first : open == 1 ? second : third) = at.packed();
      } else {
        finish(first_row + uint32_t(done) * row_step, InFlight::unpacked(first), done);
        hand_over(done++);
        first = second, second = third;
      }
    }
    exchange_.post({Wanted::nothing_more, 0, false, 0, 0});
  }

 private:
  // A row between its two sweeps.
  struct InFlight {
    int slot = 0, chunks = 1;
    uint32_t parity = 0;
    int statistics = 0;  // the exchange to wait for, of the few in flight
    bool counts = false;

    __device__ __forceinline__ uint32_t packed() const {
      static_assert(kMaxSlots <= 32);
      return uint32_t(slot) | parity << 5 | uint32_t(counts) << 6 | uint32_t(statistics) << 7 | uint32_t(chunks) << 16;
    }
    static __device__ __forceinline__ InFlight unpacked(uint32_t x) {
      return {int(x & 31), int(x >> 16), x >> 5 & 1, int(x >> 7 & 511), bool(x >> 6 & 1)};
    }
  };

  __device__ __forceinline__ const RowHeader& enter(const InFlight& at) {
    const RowHeader& header = ring_.headers[at.slot];
    slot_ = at.slot, parity_ = at.parity;
    low_ = header.phase, columns_ = header.columns, scale_ = header.log2e_over_temperature;
    return header;
  }

  __device__ __forceinline__ void wait_for(int slot, uint32_t parity) const {
    barrier_wait(memory_->taken_barrier(slot), parity);
    barrier_wait(ring_.full_barrier(slot), parity);  // which it is: what the copy brought is visible here too
  }

  __device__ __forceinline__ InFlight begin(uint32_t row, int slot, uint32_t parity) {
    InFlight at;
    at.slot = slot, at.parity = parity;
    wait_for(slot, parity);
    const RowHeader& header = enter(at);
    at.counts = header.scale != 0, at.chunks = header.chunks;
    if (at.counts) {
      const Request request{Wanted::statistics, 0, false, slot, row};
      const int number = problem_.with_ce && header.temperature != 1 ? statistics<true>(request) : statistics<false>(request);
      at.statistics = number % (2 * ExchangeMemory::kInFlight);
    }
    return at;
  }

  __device__ __forceinline__ void finish(uint32_t row, const InFlight& at, int ordinal) {
    const RowHeader& header = enter(at);
    const GradientRow<T> gradient = gradient_row<T>(p_, header.gradient);
    const int width = int(p_.student.width), vocab_size = int(p_.vocab_size);
    if (!at.counts) {
      if (rank_ == 0 && threadIdx.x == 0) report_sparse(p_, row, true, 0, 1, {});
      if (gradient) fill(gradient, 0, width, 0.0f);
      release(1);
      return;
    }
    exchange_.wait(at.statistics);
    const SparseNumbers& n = memory_->numbers[ordinal % SparseMemory::kRows];
    if (!gradient || !n.good) {
      if (gradient) fill(gradient, 0, width, __builtin_nanf(""));
      release(at.chunks);
      return;
    }
    if (n.by_hard != 0)
      write<true>(n, gradient);
    else
      write<false>(n, gradient);
    if (columns_ == 0) release(at.chunks);
    if (width > vocab_size) fill(gradient, vocab_size, width, 0.0f);
  }

  // The row to the warp that patches it, which is two rows behind at most.
  __device__ __forceinline__ void hand_over(int ordinal) const {
    if (ordinal >= 2) SparseMemory::wait(memory_->patched, ordinal - 2);
    __syncwarp();
    if (exchange_.lane == 0) SparseMemory::arrive(memory_->written, ordinal);
  }

  // ---- Sweeps over this block's share: f<Special>(columns' bits, column), G columns a call, this thread's own every time.
  // Special: the slot holds columns outside the row. After each slot, again(first, address) may ask for it once more.
  static constexpr auto never = [](int, uint32_t) { return false; };
  template <bool Wait, bool Release, class F, class Again = decltype(never)>
  __device__ __forceinline__ void sweep(F f, Again again = never) {
    int slot = slot_;
    uint32_t parity = parity_;
    const int begin = rank_ * problem_.share, end = begin + columns_;
    for (int first = begin; first < end; first += ring_.slot_columns) {
      if constexpr (Wait) wait_for(slot, parity);
      limit_ = min(first + ring_.slot_columns, end);
      const uint32_t address = ring_.student(slot) + mine_ * uint32_t(sizeof(T));
      do {
        if (first < low_ || (limit_ - first) % (32 * G) != 0)
          sweep_slot<true>(f, first, address);
        else
          sweep_slot<false>(f, first, address);
      } while (again(first, address));
      if constexpr (Release) {
        __syncwarp();
        if (exchange_.lane == 0) barrier_arrive(ring_.empty_barrier(slot));
      }
      if (++slot == ring_.count) slot = 0, parity ^= 1;
    }
  }
  template <bool Special, class F>
  __device__ __forceinline__ void sweep_slot(F f, int first, uint32_t address) {
    const uint32_t step_bytes = step_ * uint32_t(sizeof(T));
    int column = first + int(mine_);
    const int last = limit_ + exchange_.lane * G;  // whole warps take each turn
    if (column >= last) return;
    uint4 x = load_shared(address);
    while (true) {
      const int next = column + int(step_);
      const uint4 this_x = x;
      const bool more = next < last;
      address += step_bytes;
      if (more) x = load_shared(address);
      f.template operator()<Special>(this_x, column);
      if (!more) return;
      column = next;
    }
  }

  // Columns as floats; those outside the row become -inf.
  template <bool Special>
  __device__ __forceinline__ void load(uint4 bits, int column, float (&x)[G]) const {
    widen(bits, x, T{});
    if constexpr (Special)
      if (edge(column)) {
#pragma unroll
        for (int i = 0; i < G; i++)
          if (column + i < low_ || column + i >= limit_) x[i] = -__builtin_inff();
      }
  }
  __device__ __forceinline__ bool edge(int column) const { return column < low_ || column + G > limit_; }

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

  // ---- Statistics: a warp's reference is guessed from the first columns it sees, as in sweep.cuh.
  struct Sums {
    float sum = 0, hard = 0;
  };
  template <bool Hard>
  __device__ __forceinline__ int statistics(const Request& request) {
    limit_ = rank_ * problem_.share + min(ring_.slot_columns, columns_);
    Reference to;
    if (rank_ * problem_.share + int(mine_) - exchange_.lane * G < limit_)
      to.see(*this, load_shared(ring_.student(slot_) + mine_ * uint32_t(sizeof(T))), rank_ * problem_.share + int(mine_));
    to.settle();
    const float k = scale_;
    Sums now, before;
    float largest = -__builtin_inff();
    sweep<true, false>(
        [&]<bool Special>(uint4 bits, int column) {
          float x[G], e[G];
          load<Special>(bits, column, x);
          largest = fmaxf(largest, largest_of(x));
#pragma unroll
          for (int i = 0; i < G; i++) e[i] = Math::exp2((x[i] - to.a) * k);
          now.sum += pairwise(e);
          if constexpr (Hard) {
#pragma unroll
            for (int i = 0; i < G; i++) e[i] = Math::exp2((x[i] - to.a) * kLog2Ef);
            now.hard += pairwise(e);
          }
        },
        [&](int first, uint32_t address) {
          if (__any_sync(kAllLanes, now.sum - before.sum > 4096) || !to.known) {
            Reference higher = to;
            sweep_slot<true>([&]<bool>(uint4 bits, int column) { higher.see(*this, bits, column); }, first, address);
            higher.settle();
            if (higher.a != to.a) {
              // What is not known has summed nothing, and may be moved by any factor.
              const float by = to.known ? Math::exp2((to.a - higher.a) * k) : 0;
              const float by_hard = to.known ? Math::exp2((to.a - higher.a) * kLog2Ef) : 0;
              now = before = {before.sum * by, before.hard * by_hard};
              to = higher;
              return true;
            }
          }
          before = now;
          return false;
        });
    float v[2] = {now.sum, now.hard};
    const float of_warp = warp_sums(v, exchange_.lane);
    largest = warp_max(largest);
    if (exchange_.lane == 0) {
      Parcel& parcel = exchange_.mine();
      parcel.v[2] = to.known ? to.a : kPadding, parcel.v[3] = largest;
    }
    return exchange_.template post_sums<2>(of_warp, request);
  }

  static __device__ __forceinline__ float pairwise(const float (&v)[G]) {
    if constexpr (G == 8)
      return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    else
      return (v[0] + v[1]) + (v[2] + v[3]);
  }
  static __device__ __forceinline__ float largest_of(const float (&v)[G]) {
    float m = fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
    if constexpr (G == 8) m = fmaxf(m, fmaxf(fmaxf(v[4], v[5]), fmaxf(v[6], v[7])));
    return m;
  }

  // A warp's reference: a whole number near the largest logit seen.
  struct Reference {
    float a = 0;
    bool known = false;  // false: nothing but -inf so far

    __device__ __forceinline__ void see(const SparseSweep& sweep, uint4 bits, int column) {
      float x[G];
      sweep.load<true>(bits, column, x);
      a = fmaxf(known ? a : kPadding, largest_of(x));
      known = true;
    }
    __device__ __forceinline__ void settle() {
      a = rintf(warp_max(known ? a : kPadding));
      known = a > kPadding;
      if (!known) a = 0;
    }
  };

  // ---- The gradient; at the ids, which are -inf here, it becomes 0 until the row is patched.
  template <bool Hard>
  __device__ __forceinline__ void write(const SparseNumbers& n, GradientRow<T> gradient) {
    const GradientRow<T> out = gradient - low_;
    const float k = scale_;
    sweep<false, true>([&]<bool Special>(uint4 bits, int column) {
      float x[G], g[G];
      load<Special>(bits, column, x);
#pragma unroll
      for (int i = 0; i < G; i++) {
        g[i] = n.by_rest * Math::exp2((x[i] - n.reference) * k);
        if constexpr (Hard) g[i] = fmaf(n.by_hard, Math::exp2((x[i] - n.hard_reference) * kLog2Ef), g[i]);
      }
      if (!Special || !edge(column)) {
        store(out, column, g);
      } else {
#pragma unroll
        for (int i = 0; i < G; i++)
          if (column + i >= low_ && column + i < limit_) store_one(out, column + i, g[i]);
      }
    });
  }

  const ClusterProblem& problem_;
  const RowProblem& p_;
  SparseRing<T> ring_;
  SparseMemory* memory_;
  Exchange exchange_;
  const int blocks_, rank_;
  const uint32_t mine_, step_;  // this thread's first column in a slot, and from there to the next
  int slot_ = 0;
  uint32_t parity_ = 0;
  int columns_ = 0, low_ = 0, limit_ = 0;  // see RowSweep
  float scale_ = kLog2Ef;
};

}  // namespace kdkernels::cuda
