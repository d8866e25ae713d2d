// What a sweep over a split vocabulary adds to a row sweep: which columns are strong. The set is the label's column, a
// threshold on the teacher's logits (select.cuh), or a mask, which comes through the ring with the logits.
#pragma once
#include "select.cuh"

namespace kdkernels::cuda {

enum class Split { label, top_k, top_p, given };
constexpr bool is_threshold(Split kind) { return kind == Split::top_k || kind == Split::top_p; }

// Shared memory of a split kernel beside the ring's and the exchange's.
template <class T>
struct SplitMemory {
  // What blocks send each other of their statistics: of each of both warps of totals, in two buffers.
  float of_blocks[2][2][9][ExchangeMemory::kMaxBlocks];
  float strong_of_warps[2][3][ExchangeMemory::kMaxWarps];  // of the rows in flight
  SelectMemory<T> select;
  uint64_t sent[2][2];
  // A select's first windows, which a warp of its own prepares ahead of the consumers.
  uint64_t prepared[kScouted], used[kScouted];

  __device__ void init(int warps) {
    for (auto& barriers : sent)
      for (uint64_t& barrier : barriers) barrier_init(shared_address(&barrier), 1);
    for (uint64_t& barrier : prepared) barrier_init(shared_address(&barrier), 1);
    for (uint64_t& barrier : used) barrier_init(shared_address(&barrier), warps);
    select.init();
  }
};

// Dynamic shared memory ahead of the ring: the counts of a select.
constexpr int split_bytes(StrongSetId strong, int blocks) {
  return strong == StrongSetId::top_k || strong == StrongSetId::top_p ? select_bytes(blocks) : 0;
}

// Two warps add up totals, each what is its own: of a threshold's rows, the second takes the statistics, so that a row's
// select does not wait for another row's; of others, the rows take turns.
__device__ __forceinline__ bool is_own(const Request& request, Split kind, bool second) {
  if (request.what != Wanted::statistics) return !second;
  return is_threshold(kind) ? second : second == (request.buffer == 1);
}

template <class T, Split Kind_, class Base>
class SplitSweep : public Base {
 protected:
  using Math = FloatMath;
  static constexpr int G = kGroup<T>;
  using Base::columns_;
  using Base::exchange_;
  using Base::limit_;
  using Base::low_;
  using Base::mine_;
  using Base::p_;
  using Base::parity_;
  using Base::problem_;
  using Base::rank_;
  using Base::ring_;
  using Base::scale_;
  using Base::slot_;
  using Base::step_;

  // A row between its first sweep and its last, in few registers: two are kept.
  struct InFlight {
    int place = 0;         // twice the slot it begins in, plus the parity
    int ordinal = 0;       // of the row, among those of this cluster
    int exchange = 0;      // the one to wait for: of the select, then of the statistics
    int sums = 0;          // … of the sums between; 0: none
    float threshold = 0;
    __device__ __forceinline__ int slot() const { return place >> 1; }
    __device__ __forceinline__ uint32_t parity() const { return place & 1; }
    __device__ __forceinline__ int buffer() const { return ordinal & 1; }
  };
  __device__ __forceinline__ const RowHeader& enter(const InFlight& at) {
    typename Base::InFlight base;
    base.slot = at.slot(), base.parity = at.parity();
    return Base::enter(base);
  }

 public:
  static constexpr Split Kind = Kind_;

  __device__ SplitSweep(const ClusterProblem& problem, const Ring<T>& ring, const Exchange& exchange, int blocks, int rank,
                        SplitMemory<T>* memory)
      : Base(problem, ring, exchange, blocks, rank), memory_(memory) {}

 protected:
  // All rows of this cluster, through the steps
  //     begin: enter a row, and post what a select is to know       start: wait for the select; post the statistics
  //     middle: another sweep, if a divergence has one              finish: wait for the statistics; the gradient
  // Where the ring holds two rows, steps of one and of the next take turns, and the exchange that a step waits for hides
  // behind the other's. A step stands here once and is chosen by number, so that the code of a row stays in the
  // instruction cache.
  enum Step : uint32_t { kBegin = 1, kMiddle = 2, kStart = 3, kFinish = 4 };
  template <class Self>
  static __device__ __forceinline__ void consume(Self& self, uint32_t first_row, uint32_t row_step, uint32_t steps_ahead) {
    const uint32_t rows = uint32_t(self.p_.rows);
    const uint32_t steps = self.problem_.ahead ? steps_ahead : kMiddle | kFinish << 4 | kBegin << 8 | kStart << 12;
    InFlight now, next;
    bool have = false;
    int place = 0, ordinal = 0;
    for (uint32_t row = first_row; have || row < rows; row += row_step) {
#pragma unroll 1
      for (uint32_t left = steps; left; left >>= 4) {
        switch (left & 15) {
          case kBegin:
            if (row < rows) next = self.begin(place, ordinal++), place = self.place_after(next);
            break;
          case kMiddle:
            if (have) self.middle(now);
            break;
          case kStart:
            if (row < rows) next.exchange = self.start(next, row);
            break;
          default:
            if (have) self.finish(now, row - row_step);
        }
      }
      have = row < rows;
      now = next;
    }
    self.exchange_.post({Wanted::nothing_more, 0, false, 0, 0});
  }

  // Where the row after this one begins, while this one's header is there.
  __device__ __forceinline__ int place_after(const InFlight& at) const {
    const int slot = at.slot() + ring_.headers[at.slot()].chunks;
    return slot >= ring_.count ? (slot - ring_.count) * 2 + !at.parity() : slot * 2 + at.parity();
  }

  __device__ __forceinline__ InFlight begin(int place, int ordinal) {
    InFlight at;
    at.place = place, at.ordinal = ordinal;
    barrier_wait(ring_.full_barrier(at.slot()), at.parity());
    const RowHeader& header = enter(at);
    if constexpr (is_threshold(Kind)) {
      wait_prepared(at);
      if (header.scale != 0 && !everything())
        at.exchange = sweep_window(at, memory_->select.scouted[at.ordinal % kScouted], true);
    }
    return at;
  }

  // Before the first sweep that asks for strong columns.
  __device__ __forceinline__ void settle(InFlight& at) {
    if constexpr (is_threshold(Kind)) {
      at.threshold = -__builtin_inff();
      if (enter(at).scale != 0 && !everything()) {
        exchange_.wait(at.exchange);
        at.threshold = memory_->select.threshold[at.buffer()];
        if (at.threshold != at.threshold) {
          const Found found = search_on(*this, at);
          exchange_.count = found.exchanges, at.threshold = found.threshold;
        }
      }
      done_with_prepared(at);
    }
  }

  // Before every sweep that asks for strong columns.
  __device__ __forceinline__ void set_split(const InFlight& at, int label) {
    if constexpr (is_threshold(Kind)) threshold_ = at.threshold;
    if constexpr (Kind == Split::label) strong_label_ = label + low_;
  }
  // The column that a sweep must take in its special form; -1: none.
  __device__ __forceinline__ int split_column() const { return Kind == Split::label ? strong_label_ : -1; }

  // The mask's bytes of G columns, loaded once for all.
  struct Bytes {
    uint32_t words[G / 4] = {};
  };
  __device__ __forceinline__ Bytes mask_bytes(int column) const {
    Bytes bytes;
    if constexpr (Kind == Split::given) {
      const uint32_t at = this->mask_ + uint32_t(column);
      if constexpr (G == 8)
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(bytes.words[0]), "=r"(bytes.words[1]) : "r"(at));
      else
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bytes.words[0]) : "r"(at));
    }
    return bytes;
  }
  template <bool Special>
  __device__ __forceinline__ bool strong(float y, int column, const Bytes& bytes, int i) const {
    if constexpr (is_threshold(Kind)) return y >= threshold_;
    if constexpr (Kind == Split::given) return bytes.words[i / 4] >> (i % 4 * 8) & 1;
    return Special && column + i == strong_label_;
  }

 private:
  __device__ __forceinline__ bool everything() const { return Kind == Split::top_p && problem_.strong_amount >= 1; }
  __device__ __forceinline__ void wait_prepared(const InFlight& at) const {
    barrier_wait(shared_address(&memory_->prepared[at.ordinal % kScouted]), at.ordinal / kScouted & 1);
  }
  __device__ __forceinline__ void done_with_prepared(const InFlight& at) const {
    __syncwarp();
    if (exchange_.lane == 0) barrier_arrive(shared_address(&memory_->used[at.ordinal % kScouted]));
  }

  // What few rows take is a function of its own: more rounds.
  struct Found {
    int exchanges;
    float threshold;
  };
  static __device__ __noinline__ Found search_on(SplitSweep self, InFlight at) {
    float threshold = __builtin_nanf("");
    while (threshold != threshold) {
      self.exchange_.wait(self.sweep_window(at, self.memory_->select.searches[at.buffer()].window, false));
      threshold = self.memory_->select.threshold[at.buffer()];
    }
    return {self.exchange_.count, threshold};
  }

  // A round of a select; the exchange that brings its outcome.
  __device__ __forceinline__ int sweep_window(const InFlight& at, Window<T> window, bool first) {
    enter(at);
    constexpr bool kMass = Kind == Split::top_p;
    if (kMass && window.reference != window.reference) {
      const Found found = maximum(*this, at);
      exchange_.count = found.exchanges, window.reference = found.threshold;
    }
    return exchange_.template post_sums<4>(count_window<kMass>(window), {Wanted::select, at.buffer(), first, at.slot(), uint32_t(at.ordinal)});
  }

  // The teacher's largest logit.
  static __device__ __noinline__ Found maximum(SplitSweep self, InFlight at) {
    self.enter(at);
    float largest = -__builtin_inff(), nothing = 0;
    self.sweep_teacher([&]<bool Special>(uint4 t, int column) {
      float y[G];
      widen(t, y, T{});
#pragma unroll
      for (int i = 0; i < G; i++)
        if (!Special || (column + i >= self.low_ && column + i < self.limit_)) largest = fmaxf(largest, y[i]);
    });
    self.exchange_.top(largest, nothing);
    return {self.exchange_.count, largest};
  }

  // Counts columns by the window. Returns what lies above its exact part, columns or mass, and the mass of all.
  template <bool Mass>
  __device__ __forceinline__ float count_window(const Window<T>& window) {
    const float low = value_at<T>(window.low), middle = window.middle(), coarse = window.coarse, k = scale_;
    const float constant = window.reference * k, inv_width = window.inv_width;
    const uint32_t bins = shared_address(memory_->select.bins), first = window.low;
    float above = 0, all = 0;
    sweep_teacher([&]<bool Special>(uint4 t, int column) {
      float y[G];
      widen(t, y, T{});
      bool inside[G];
#pragma unroll
      for (int i = 0; i < G; i++) inside[i] = !Special || (column + i >= low_ && column + i < limit_);
      float e[G];  // a column's mass, or 1
#pragma unroll
      for (int i = 0; i < G; i++) e[i] = !Mass ? 1 : inside[i] ? Math::exp2(fmaf(y[i], k, -constant)) : 0;
      if constexpr (Mass) all += Base::pairwise(e);
      float largest = y[0];
#pragma unroll
      for (int i = 1; i < G; i++) largest = fmaxf(largest, y[i]);
      if (!(largest >= low)) return;
#pragma unroll
      for (int i = 0; i < G; i++) {
        const bool exact = !(y[i] >= middle), counts = inside[i] && y[i] >= low;
        if (counts && !exact) above += e[i];
        uint32_t bin = (image_of(y[i]) - first) >> kSpareBits<T>;
        if (!exact && y[i] >= coarse) bin = kExact<T> + Window<T>::interval(y[i], coarse, inv_width);
        count_in(bins + bin * 4, counts && (exact || y[i] >= coarse));
      }
    });
    float v[4] = {above, all, 0, 0};
    return warp_sums(v, exchange_.lane);
  }
  static __device__ __forceinline__ void count_in(uint32_t bin, bool counts) {
    asm volatile(
        "{\n"
        ".reg .pred counts;\n"
        "setp.ne.u32 counts, %1, 0;\n"
        "@counts red.shared::cta.add.u32 [%0], 1;\n"
        "}" ::"r"(bin), "r"(uint32_t(counts))
        : "memory");
  }

  // f<Special>(teacher, column) over this block's share, as RowSweep::sweep.
  template <class F>
  __device__ __forceinline__ void sweep_teacher(F f) {
    int slot = slot_;
    uint32_t parity = parity_;
    const int begin = rank_ * problem_.share, end = begin + columns_;
    for (int first = begin; first < end; first += ring_.slot_columns) {
      barrier_wait(ring_.full_barrier(slot), parity);
      limit_ = min(first + ring_.slot_columns, end);
      if (first < low_ || (limit_ - first) % (32 * G) != 0)
        sweep_teacher_slot<true>(f, first, ring_.teacher(slot));
      else
        sweep_teacher_slot<false>(f, first, ring_.teacher(slot));
      if (++slot == ring_.count) slot = 0, parity ^= 1;
    }
  }
  template <bool Special, class F>
  __device__ __forceinline__ void sweep_teacher_slot(F f, int first, uint32_t slot) {
    const int last = limit_ + exchange_.lane * G;  // whole warps take each turn
    uint32_t address = slot + mine_ * uint32_t(sizeof(T));
    int column = first + int(mine_);
    if (column >= last) return;
    uint4 y = load_shared(address);
    while (true) {
      const int next = column + int(step_);
      const uint4 this_y = y;
      const bool more = next < last;
      address += step_ * uint32_t(sizeof(T));
      if (more) y = load_shared(address);
      f.template operator()<Special>(this_y, column);
      if (!more) return;
      column = next;
    }
  }

 protected:
  SplitMemory<T>* memory_;

 private:
  float threshold_ = 0;
  int strong_label_ = -1;
};

}  // namespace kdkernels::cuda
