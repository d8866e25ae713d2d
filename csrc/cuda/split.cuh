// What a sweep over a split vocabulary adds to a row sweep: which columns are strong. The set is the label's column, a
// threshold on the teacher's logits (select.cuh), or a mask, of which a bit a column is kept in shared memory.
#pragma once
#include "select.cuh"

namespace kdkernels::cuda {

enum class Split { label, threshold, given };

// Shared memory of a split kernel beside the ring's and the exchange's.
struct SplitMemory {
  float of_blocks[2][16][ExchangeMemory::kMaxBlocks];  // what blocks send each other of their statistics
  uint64_t sent[2];
  SelectMemory select;

  __device__ void init(int warps) {
    for (uint64_t& barrier : sent) barrier_init(shared_address(&barrier), 1);
    select.init(warps);
  }
};

// Dynamic shared memory ahead of the ring: the counts of a select, or two rows' bits of a mask.
constexpr int split_bytes(StrongSetId strong, int blocks, int share) {
  switch (strong) {
    case StrongSetId::top_k:
    case StrongSetId::top_p: return select_bytes(blocks);
    case StrongSetId::given: return (2 * (share / 8) + 127) / 128 * 128;
    default: return 0;
  }
}

template <class T, Split Kind, class Base>
class SplitSweep : public Base {
 protected:
  using Math = FloatMath;
  static constexpr int G = kGroup<T>;
  using Base::blocks_;
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

  struct InFlight : Base::InFlight {
    float threshold = 0;
  };

 public:
  __device__ SplitSweep(const ClusterProblem& problem, const Ring<T>& ring, const Exchange& exchange, int blocks, int rank,
                        SplitMemory* memory, uint8_t* dynamic)
      : Base(problem, ring, exchange, blocks, rank), memory_(memory), bits_(dynamic) {}

 protected:
  // Before the first sweep over a row: finds its strong set. The row's slots need not have arrived.
  __device__ __forceinline__ void split(InFlight& at, uint32_t row) {
    if constexpr (Kind == Split::threshold) {
      const int b = rows_ & 1;
      barrier_wait(shared_address(&memory_->select.scout_full[b]), rows_ >> 1 & 1);
      if (at.counts) at.threshold = p_.strong.id == StrongSetId::top_p && problem_.strong_amount >= 1 ? -__builtin_inff() : select(at, b);
      __syncwarp();
      if (exchange_.lane == 0) barrier_arrive(shared_address(&memory_->select.scout_empty[b]));
      rows_++;
    } else if constexpr (Kind == Split::given) {
      if (at.counts) keep_mask(row, at.buffer);
      consumers_sync(exchange_.warps * 32);
    }
  }
  // Before every sweep that asks for strong columns.
  __device__ __forceinline__ void set_split(const InFlight& at, int label) {
    if constexpr (Kind == Split::threshold) threshold_ = at.threshold;
    if constexpr (Kind == Split::label) strong_label_ = label + low_;
    if constexpr (Kind == Split::given) row_bits_ = bits_ + at.buffer * (problem_.share / 8) - rank_ * problem_.share / 8;
  }
  // The column that a sweep must take in its special form; -1: none.
  __device__ __forceinline__ int split_column() const { return Kind == Split::label ? strong_label_ : -1; }

  // Of G columns; asked for once each.
  __device__ __forceinline__ uint32_t mask_bits(int column) const {
    if constexpr (Kind == Split::given) return uint32_t(row_bits_[column / 8]) >> (column % 8);
    return 0;
  }
  template <bool Special>
  __device__ __forceinline__ bool strong(float y, int column, uint32_t bits, int i) const {
    if constexpr (Kind == Split::threshold) return y >= threshold_;
    if constexpr (Kind == Split::given) return bits >> i & 1;
    return Special && column + i == strong_label_;
  }

 private:
  __device__ float select(const InFlight& at, int buffer) {
    this->enter(at);
    const bool mass = by_mass(p_);
    const SelectMemory& memory = memory_->select;
    Window window = memory.scouted[buffer];
    for (bool first = true;; first = false) {
      const float of_warp = mass ? sweep_window<true>(window) : sweep_window<false>(window);
      exchange_.wait(exchange_.template post_sums<4>(of_warp, {Wanted::select, buffer, first, at.slot, 0}));
      const float threshold = memory.threshold;
      if (threshold == threshold) return threshold;
      window = memory.window;
    }
  }

  // Counts columns by the window's intervals. What lies above it: the mass or the number of columns; and the mass of all.
  template <bool Mass>
  __device__ __forceinline__ float sweep_window(const Window& window) {
    const float low = value_at<T>(window.low), k = scale_, constant = window.reference * k;
    const float end = window.end() < kBeyondImages ? value_at<T>(window.end()) : __builtin_nanf("");
    const uint32_t bins = shared_address(memory_->select.bins);
    float above = 0, all = 0;
    sweep_teacher([&]<bool Special>(uint4 t, int column) {
      float y[G];
      widen(t, y, T{});
      bool outside[G] = {};
      if constexpr (Special)
#pragma unroll
        for (int i = 0; i < G; i++) outside[i] = column + i < low_ || column + i >= limit_;
      float e[G];  // a column's mass, or 1
      bool any = false;
#pragma unroll
      for (int i = 0; i < G; i++) {
        e[i] = !Mass ? 1 : outside[i] ? 0 : Math::exp2(fmaf(y[i], k, -constant));
        const bool over = !outside[i] && y[i] >= end;
        if (over) above += e[i];
        any |= y[i] >= low && !over;
      }
      if constexpr (Mass) all += Base::pairwise(e);
      if (any) {
#pragma unroll
        for (int i = 0; i < G; i++)
          if (y[i] >= low && !(y[i] >= end) && !outside[i]) count_in(bins + ((image_of(y[i]) - window.low) >> window.shift) * 4);
      }
    });
    float v[4] = {above, all, 0, 0};
    return warp_sums(v, exchange_.lane);
  }
  static __device__ __forceinline__ void count_in(uint32_t bin) {
    asm volatile("red.shared::cta.add.u32 [%0], 1;" ::"r"(bin) : "memory");
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

  // The mask's bits of this block's columns. Two rows' take turns: nobody is at the row before the last any more when the
  // last one's have been waited for.
  __device__ void keep_mask(uint32_t row, int buffer) {
    const uint8_t* mask = p_.strong.mask + row_offset(p_.strong.mask_rows, row);
    const int begin = rank_ * problem_.share, low = low_;
    uint16_t* bits = reinterpret_cast<uint16_t*>(bits_ + buffer * (problem_.share / 8));
    const int threads = exchange_.warps * 32, vocab = int(p_.vocab_size);
#pragma unroll 4
    for (int at = int(threadIdx.x) * 16; at < columns_; at += threads * 16) {
      const int from = begin + at - low;
      uint32_t packed = 0;
      if (from >= 0 && from + 16 <= vocab && reinterpret_cast<uintptr_t>(mask + from) % 16 == 0) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(mask + from));
        packed = four_bits(v.x) | four_bits(v.y) << 4 | four_bits(v.z) << 8 | four_bits(v.w) << 12;
      } else {
        for (int i = 0; i < 16; i++)
          if (from + i >= 0 && from + i < vocab && mask[from + i]) packed |= 1u << i;
      }
      bits[at / 16] = uint16_t(packed);
    }
  }
  // Of four bytes that are 0 or 1.
  static __device__ __forceinline__ uint32_t four_bits(uint32_t bytes) { return bytes * 0x10204080u >> 28; }

 protected:
  SplitMemory* memory_;

 private:
  uint8_t* bits_;
  const uint8_t* row_bits_ = nullptr;
  float threshold_ = 0;
  int strong_label_ = -1, rows_ = 0;
};

}  // namespace kdkernels::cuda
