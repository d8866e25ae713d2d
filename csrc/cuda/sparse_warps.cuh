// The warps beside the sweep over a sparse teacher's rows (sparse.cuh): who prepares the ids, takes their columns out and
// writes their gradient; and what they share with it.
#pragma once
#include "sparse_ids.cuh"

namespace kdkernels::cuda {

template <class T>
using SparseRing = Ring<T, 1>;

// What a row's statistics come to: T·gradient is by_rest·e^((z - reference)/T), at an id by_gap·gap + by_share·share, to
// which cross-entropy adds by_hard·e^(z - hard_reference), and takes at_label from the label's.
struct SparseNumbers {
  bool good;
  float by_rest, reference, by_hard, hard_reference;
  float by_gap, by_share, at_label;
};

// Shared memory beside the ring's and the exchange's.
struct SparseMemory {
  static constexpr int kRows = 8;  // begun, and their gradient not finished
  SparseNumbers numbers[kRows];
  uint64_t taken[kMaxSlots];  // the ids' columns are out of a slot
  uint64_t written[kRows];    // a row's gradient is there but for the ids
  uint64_t patched[kRows];    // … and there

  __device__ void init(int slots, int warps) {
    for (int i = 0; i < slots; i++) barrier_init(shared_address(&taken[i]), 1);
    for (int i = 0; i < kRows; i++) {
      barrier_init(shared_address(&written[i]), warps), barrier_init(shared_address(&patched[i]), 1);
    }
  }
  __device__ uint32_t taken_barrier(int slot) { return shared_address(&taken[slot]); }
  // Of the cluster's n-th row.
  static __device__ void arrive(uint64_t* barriers, int n) { barrier_arrive(shared_address(&barriers[n % kRows])); }
  static __device__ void wait(uint64_t* barriers, int n) { barrier_wait(shared_address(&barriers[n % kRows]), n / kRows & 1); }
};

// A warp's part of the cluster's rows, before any of them is swept.
template <class T>
__device__ __forceinline__ void prepare(const ClusterProblem& problem, uint32_t first_row, uint32_t row_step, int warp, int warps, int lane) {
  const Team<32> team{nullptr, lane};
  for (int64_t row = first_row + int64_t(warp) * row_step; row < problem.rows.rows; row += int64_t(warps) * row_step)
    prepare_row<T, kFewIds / 32>(problem.rows, uint32_t(row), team, Places{}, problem.sparse);
  __syncwarp();
}

// The warp that takes the ids' columns out of a row, slot by slot as they come: all ids, whether they count or not.
template <class T>
class TakeOut {
 public:
  __device__ TakeOut(const ClusterProblem& problem, const SparseRing<T>& ring, SparseMemory* memory, int begin, int lane)
      : p_(problem.rows), ring_(ring), memory_(memory), k_(int(p_.sparse.k)), begin_(begin), lane_(lane) {}

  __device__ void serve(uint32_t first_row, uint32_t row_step) {
    const uint32_t rows = uint32_t(p_.rows);
    int next[kEarly];
    if (first_row < rows) read(first_row, next);
    for (uint32_t row = first_row; row < rows; row += row_step) {
      int ids[kEarly];
#pragma unroll
      for (int i = 0; i < kEarly; i++) ids[i] = next[i];
      if (row + row_step < rows) read(row + row_step, next);  // on their way while this row is
      barrier_wait(ring_.full_barrier(slot_), parity_);
      const RowHeader& header = ring_.headers[slot_];
      const int shift = header.phase - begin_, columns = header.columns, chunks = header.chunks;
      if (k_ <= 32 * kEarly)
        by_slot(ids, shift, columns, chunks);
      else
        by_row(row, shift, columns, chunks);
    }
  }

 private:
  static constexpr int kEarly = 8;  // ids a lane holds

  __device__ int id(uint32_t row, int j) const {
    const int64_t id = j < k_ ? id_at(p_.sparse, row, j) : -1;
    return id < p_.vocab_size ? int(id) : -1;
  }
  __device__ void read(uint32_t row, int (&ids)[kEarly]) const {
#pragma unroll
    for (int i = 0; i < kEarly; i++) ids[i] = id(row, 32 * i + lane_);
  }
  __device__ void clear(int slot, int column) const {
    *reinterpret_cast<T*>(__cvta_shared_to_generic(ring_.student(slot) + column * uint32_t(sizeof(T)))) = narrow<T>(-__builtin_inff());
  }
  __device__ void pass_on() {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(memory_->taken_barrier(slot_));
    if (++slot_ == ring_.count) slot_ = 0, parity_ ^= 1;
  }

  __device__ void by_slot(const int (&ids)[kEarly], int shift, int columns, int chunks) {
    for (int chunk = 0; chunk < chunks; chunk++) {
      if (chunk) barrier_wait(ring_.full_barrier(slot_), parity_);
      const int from = chunk * ring_.slot_columns - shift, n = min(ring_.slot_columns, columns - chunk * ring_.slot_columns);
#pragma unroll
      for (int i = 0; i < kEarly; i++) {
        if (32 * i >= k_) break;
        if (ids[i] >= 0 && unsigned(ids[i] - from) < unsigned(n)) clear(slot_, ids[i] - from);
      }
      pass_on();
    }
  }

  // Many ids are read once for all slots of the row.
  __device__ void by_row(uint32_t row, int shift, int columns, int chunks) {
    int slot = slot_;
    uint32_t parity = parity_;
    for (int chunk = 0; chunk < chunks; chunk++) {
      barrier_wait(ring_.full_barrier(slot), parity);
      if (++slot == ring_.count) slot = 0, parity ^= 1;
    }
#pragma unroll 8
    for (int j = lane_; j < k_; j += 32) {
      const int given = id(row, j), at = given + shift;
      if (given < 0 || at < 0 || at >= columns) continue;
      int there = slot_ + at / ring_.slot_columns;
      if (there >= ring_.count) there -= ring_.count;
      clear(there, at % ring_.slot_columns);
    }
    for (int chunk = 0; chunk < chunks; chunk++) pass_on();
  }

  const RowProblem& p_;
  const SparseRing<T> ring_;
  SparseMemory* memory_;
  const int k_, begin_, lane_;
  int slot_ = 0;
  uint32_t parity_ = 0;
};

// The warp that writes a row's gradient at the ids, over what the consumers have written there, and at the label. A row's
// ids are read a row ahead: memory that is kept busy answers late.
template <class T>
class Patch {
 public:
  __device__ Patch(const ClusterProblem& problem, SparseMemory* memory, int begin, int lane)
      : problem_(problem), p_(problem.rows), memory_(memory), k_(int(p_.sparse.k)), begin_(begin), lane_(lane) {}

  __device__ void serve(uint32_t first_row, uint32_t row_step) const {
    const uint32_t rows = uint32_t(p_.rows);
    wait_for_launch_before();
    Entries next;
    IdsRow next_found;
    if (first_row < rows) next = read(first_row, 0), next_found = problem_.sparse.rows[first_row];
    int ordinal = 0;
    for (uint32_t row = first_row; row < rows; row += row_step, ordinal++) {
      const Entries now = next;
      const IdsRow found = next_found;
      if (row + row_step < rows) next = read(row + row_step, 0), next_found = problem_.sparse.rows[row + row_step];
      SparseMemory::wait(memory_->written, ordinal);
      const SparseNumbers n = memory_->numbers[ordinal % SparseMemory::kRows];
      if (p_.gradient && !(found.flags & kSkipped) && n.good) patch(row, found, now, n);
      __syncwarp();
      if (lane_ == 0) SparseMemory::arrive(memory_->patched, ordinal);
    }
  }

 private:
  static constexpr int kEach = 4;  // of a lane, at a time
  struct Entries {
    int id[kEach];
    float gap[kEach], share[kEach];
  };

  __device__ __forceinline__ Entries read(uint32_t row, int from) const {
    const int64_t first = int64_t(row) * k_;
    Entries e;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int j = from + 32 * i + lane_;
      e.id[i] = j < k_ ? problem_.sparse.ids[first + j] : -1;
      e.gap[i] = j < k_ ? problem_.sparse.gaps[first + j] : 0, e.share[i] = j < k_ ? problem_.sparse.shares[first + j] : 0;
    }
    return e;
  }

  __device__ __forceinline__ void patch(uint32_t row, const IdsRow& found, Entries e, const SparseNumbers& n) const {
    const GradientRow<T> gradient = gradient_row<T>(p_, row_offset(p_.gradient_rows, row));
    // This block's columns.
    const int phase = phase_of(row_begin<T>(p_.student, row));
    const int low = max(0, begin_ - phase), high = min(int(p_.vocab_size), begin_ + problem_.share - phase);
    auto hard = [&](float logit) { return n.by_hard != 0 ? n.by_hard * FloatMath::exp2((logit - n.hard_reference) * kLog2Ef) : 0.0f; };
    for (int from = 0; from < k_; from += 32 * kEach) {
      if (from) e = read(row, from);
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        if (e.id[i] < low || e.id[i] >= high) continue;
        float g = fmaf(n.by_gap, e.gap[i], n.by_share * e.share[i]);
        if (n.by_hard != 0) g += hard(problem_.sparse.logits[int64_t(row) * k_ + from + 32 * i + lane_]);
        if (e.id[i] == found.label) g -= n.at_label;
        store_one(gradient, e.id[i], g);
      }
    }
    if (lane_ == 0 && found.label >= low && found.label < high && !(found.flags & kLabelInside)) {
      const float temperature = p_.temperatures ? static_cast<const float*>(p_.temperatures)[row] : problem_.temperature;
      const float of_rest = n.by_rest != 0 ? n.by_rest * FloatMath::exp2((found.label_logit - n.reference) * (kLog2Ef / temperature)) : 0;
      store_one(gradient, found.label, of_rest + hard(found.label_logit) - n.at_label);
    }
  }

  const ClusterProblem& problem_;
  const RowProblem& p_;
  SparseMemory* memory_;
  const int k_, begin_, lane_;
};

}  // namespace kdkernels::cuda
