// The sweep over a row of the student's logits whose teacher names a few ids: as in sweep.cuh, a cluster holds the row in
// shared memory, sweeps it for its statistics and once more for the gradient. Before the first sweep a warp of its own
// takes the ids' columns out (-inf), so that the sums are of the other columns alone: nothing is subtracted.
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

// Shared memory beside the ring's and the exchange's, and who waits for whom: a row's ids are prepared, its totals made of
// them and the consumers' sums, its gradient written and then patched; its place is free when it is.
struct SparseMemory {
  static constexpr int kRows = 4;  // prepared and not patched
  IdsRow rows[kRows];
  SparseNumbers numbers[kRows];
  uint64_t taken[kMaxSlots];  // the ids' columns are out of a slot
  uint64_t prepared[kRows], written[kRows], patched[kRows];

  __device__ void init(int slots, int warps) {
    for (int i = 0; i < slots; i++) barrier_init(shared_address(&taken[i]), 1);
    for (int i = 0; i < kRows; i++) {
      barrier_init(shared_address(&prepared[i]), 1), barrier_init(shared_address(&patched[i]), 1);
      barrier_init(shared_address(&written[i]), warps);
    }
  }
  __device__ uint32_t taken_barrier(int slot) { return shared_address(&taken[slot]); }
  // Of the cluster's n-th row.
  static __device__ void arrive(uint64_t* barriers, int n) { barrier_arrive(shared_address(&barriers[n % kRows])); }
  static __device__ void wait(uint64_t* barriers, int n) { barrier_wait(shared_address(&barriers[n % kRows]), n / kRows & 1); }
};

// Dynamic shared memory ahead of the ring: the table of a row's ids, and of the rows prepared here ids, logits, gaps and
// shares.
constexpr int resident_table_bytes(int64_t k) { return int(2 * sizeof(int)) << table_bits(k); }
constexpr int resident_bytes(int64_t k) {
  return (resident_table_bytes(k) + SparseMemory::kRows * int((k + 3) / 4 * 4) * 16 + 127) / 128 * 128;
}
__device__ inline SparseWorkspace resident_workspace(unsigned char* shared, SparseMemory* memory, int k) {
  const int n = SparseMemory::kRows * ((k + 3) / 4 * 4);
  auto* words = reinterpret_cast<float*>(shared + resident_table_bytes(k));
  return {reinterpret_cast<int*>(words), words + n, words + 2 * n, words + 3 * n, memory->rows};
}

// Where a row's ids are found: at its own place in the workspace, or, prepared here, at that of the few in flight.
template <bool Resident>
__device__ __forceinline__ int64_t place_of(uint32_t row, int ordinal) {
  return Resident ? ordinal % SparseMemory::kRows : int64_t(row);
}

// The warp that prepares rows, as soon as they are there: the logits it picks are in the cache then.
template <class T>
__device__ void prepare(const ClusterProblem& problem, const SparseRing<T>& ring, SparseMemory* memory, const SparseWorkspace& workspace,
                        int* table, uint32_t first_row, uint32_t row_step, int lane) {
  const RowProblem& p = problem.rows;
  const Team<32> team{nullptr, lane};
  const int bits = table_bits(p.sparse.k);
  const Places places{table, table + (1 << bits), bits};
  int slot = 0, ordinal = 0;
  uint32_t parity = 0;
  for (uint32_t row = first_row; row < uint32_t(p.rows); row += row_step, ordinal++) {
    if (ordinal >= SparseMemory::kRows) SparseMemory::wait(memory->patched, ordinal - SparseMemory::kRows);
    prepare_row<T, kMostResident / 32>(p, row, team, places, workspace, place_of<true>(row, ordinal), [&] {
      barrier_wait(ring.full_barrier(slot), parity);
    });
    barrier_wait(ring.full_barrier(slot), parity);
    const int chunks = ring.headers[slot].chunks;  // before consumers may give the slot away
    __syncwarp();
    if (lane == 0) SparseMemory::arrive(memory->prepared, ordinal);
    slot += chunks;
    if (slot >= ring.count) slot -= ring.count, parity ^= 1;
  }
}

// The warp that takes the ids' columns out of a row, as soon as it is there: all ids, whether they count or not.
template <class T>
__device__ void take_out(const ClusterProblem& problem, const SparseRing<T>& ring, SparseMemory* memory, uint32_t first_row,
                         uint32_t row_step, int begin, int lane) {
  const RowProblem& p = problem.rows;
  const int k = int(p.sparse.k);
  const T nothing = narrow<T>(-__builtin_inff());
  constexpr int kEarly = kMostResident / 32;  // a lane's ids that are on their way while the row is
  int slot = 0;
  uint32_t parity = 0;
  for (uint32_t row = first_row; row < uint32_t(p.rows); row += row_step) {
    auto id_of = [&](int j) {
      const int64_t id = j < k ? id_at(p.sparse, row, j) : -1;
      return id < p.vocab_size ? int(id) : -1;
    };
    int early[kEarly];
#pragma unroll
    for (int i = 0; i < kEarly; i++) early[i] = id_of(i * 32 + lane);
    barrier_wait(ring.full_barrier(slot), parity);
    const RowHeader header = ring.headers[slot];
    const int end = begin + header.columns;
    for (int chunk = 0; chunk < header.chunks; chunk++) {
      if (chunk) barrier_wait(ring.full_barrier(slot), parity);
      const int first = begin + chunk * ring.slot_columns, columns = min(ring.slot_columns, end - first);
      const uint32_t address = ring.student(slot);
      auto take = [&](int id) {
        const int at = id + header.phase - first;
        if (id >= 0 && at >= 0 && at < columns)
          *reinterpret_cast<T*>(__cvta_shared_to_generic(address + at * uint32_t(sizeof(T)))) = nothing;
      };
#pragma unroll
      for (int i = 0; i < kEarly; i++) take(early[i]);
#pragma unroll 4
      for (int j = 32 * kEarly + lane; j < k; j += 32) take(id_of(j));
      async_proxy_fence();  // a later copy overwrites them
      __syncwarp();
      if (lane == 0) barrier_arrive(memory->taken_barrier(slot));
      if (++slot == ring.count) slot = 0, parity ^= 1;
    }
  }
}

// The warp that writes a row's gradient at the ids, over what the consumers have written there, and at the label.
template <class T, bool Resident>
__device__ void patch(const ClusterProblem& problem, SparseMemory* memory, const SparseWorkspace& workspace, uint32_t first_row,
                      uint32_t row_step, int begin, int lane) {
  const RowProblem& p = problem.rows;
  const int k = int(p.sparse.k);
  int ordinal = 0;
  for (uint32_t row = first_row; row < uint32_t(p.rows); row += row_step, ordinal++) {
    const GradientRow<T> gradient = gradient_row<T>(p, row_offset(p.gradient_rows, row));
    // This block's columns.
    const int phase = phase_of(row_begin<T>(p.student, row));
    const int low = max(0, begin - phase), high = min(int(p.vocab_size), begin + problem.share - phase);
    const float scale = kLog2Ef / (p.temperatures ? static_cast<const float*>(p.temperatures)[row] : problem.temperature);
    const int64_t place = place_of<Resident>(row, ordinal), first = place * k;
    SparseMemory::wait(memory->written, ordinal);
    const SparseNumbers n = memory->numbers[ordinal % SparseMemory::kRows];
    const IdsRow& found = workspace.rows[place];
    if (gradient && !(found.flags & kSkipped) && n.good) {
      auto hard = [&](float logit) { return n.by_hard != 0 ? n.by_hard * FloatMath::exp2((logit - n.hard_reference) * kLog2Ef) : 0.0f; };
      const int label = found.label;
#pragma unroll 2
      for (int j = lane; j < k; j += 32) {
        const int id = workspace.ids[first + j];
        if (id < low || id >= high) continue;
        float g = fmaf(n.by_gap, workspace.gaps[first + j], n.by_share * workspace.shares[first + j]);
        if (n.by_hard != 0) g += hard(workspace.logits[first + j]);
        if (id == label) g -= n.at_label;
        store_one(gradient, id, g);
      }
      if (lane == 0 && label >= low && label < high && !(found.flags & kLabelInside)) {
        const float of_rest = n.by_rest != 0 ? n.by_rest * FloatMath::exp2((found.label_logit - n.reference) * scale) : 0;
        store_one(gradient, label, of_rest + hard(found.label_logit) - n.at_label);
      }
    }
    __syncwarp();
    if (lane == 0) SparseMemory::arrive(memory->patched, ordinal);
  }
}

template <class T, bool Resident>
class SparseSweep {
  using Math = FloatMath;
  static constexpr int G = kGroup<T>;

 public:
  __device__ SparseSweep(const ClusterProblem& problem, const SparseRing<T>& ring, SparseMemory* memory, const Exchange& exchange,
                         int blocks, int rank)
      : problem_(problem), p_(problem.rows), ring_(ring), memory_(memory), exchange_(exchange), blocks_(blocks), rank_(rank),
        mine_(kept(threadIdx.x * G)), step_(kept(exchange.warps * 32 * G)) {}

  __device__ void consume(uint32_t first_row, uint32_t row_step) {
    const uint32_t rows = uint32_t(p_.rows);
    InFlight now, next;
    int ordinal = 0;
    if (first_row < rows) now = begin(first_row, 0, 0);
    for (uint32_t row = first_row; row < rows; row += row_step, ordinal++) {
      int after = now.slot + now.chunks;
      uint32_t parity = now.parity;
      if (after >= ring_.count) after -= ring_.count, parity ^= 1;
      const bool more = row + row_step < rows;
      if (more && problem_.ahead) next = begin(row + row_step, after, parity);
      finish(row, now, ordinal);
      hand_over(ordinal);
      if (more && !problem_.ahead) next = begin(row + row_step, after, parity);
      now = next;
    }
    exchange_.post({Wanted::nothing_more, 0, false, 0, 0});
  }

 private:
  // A row between its two sweeps.
  struct InFlight {
    int slot = 0, chunks = 1;
    uint32_t parity = 0;
    int statistics = 0;  // the exchange to wait for
    bool counts = false;
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
      at.statistics = problem_.with_ce && header.temperature != 1 ? statistics<true>(request) : statistics<false>(request);
    }
    return at;
  }

  __device__ __forceinline__ void finish(uint32_t row, const InFlight& at, int ordinal) {
    const RowHeader& header = enter(at);
    const GradientRow<T> gradient = gradient_row<T>(p_, header.gradient);
    const int width = int(p_.student.width), vocab_size = int(p_.vocab_size);
    if (!at.counts) {
      if constexpr (Resident) SparseMemory::wait(memory_->prepared, ordinal);  // who prepares is no further behind
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

// The warp that makes a row's numbers of all sums, and reports it.
template <class T, bool Resident>
class SparseTotals : Totals<T, ForwardKL> {
  using Base = Totals<T, ForwardKL>;
  using Math = FloatMath;
  using Base::across;
  using Base::blocks_;
  using Base::headers_;
  using Base::lane_;
  using Base::memory_;
  using Base::p_;
  using Base::problem_;
  using Base::rank_;
  using Base::warps_;

 public:
  __device__ SparseTotals(const ClusterProblem& problem, const RowHeader* headers, ExchangeMemory* memory, SparseMemory* sparse,
                          const SparseWorkspace& workspace, int blocks, int rank, int warps, int lane)
      : Base(problem, headers, memory, blocks, rank, warps, lane), sparse_(sparse), workspace_(workspace) {}

  __device__ void serve(uint32_t first_row, uint32_t row_step) {
    // Prepared before: a row is on its way while the one before it is at work.
    uint32_t row = first_row;
    IdsRow early = Resident ? IdsRow{} : prepared(row);
    for (int n = 0;; n++) {
      const int b = n % ExchangeMemory::kInFlight;
      barrier_wait(shared_address(&memory_->posted[b]), n / ExchangeMemory::kInFlight & 1);
      const Request request = memory_->request[b];
      if (request.what == Wanted::nothing_more) return;
      Parcel part;
      if (lane_ < warps_) part = memory_->of_warps[b][lane_];
      const int ordinal = int((request.row - first_row) / row_step);
      if constexpr (Resident) {
        SparseMemory::wait(sparse_->prepared, ordinal);
        statistics(part, request, sparse_->rows[ordinal % SparseMemory::kRows], ordinal);
      } else {
        if (request.row != row) early = prepared(request.row);
        statistics(part, request, early, ordinal);
      }
      __syncwarp();
      if (lane_ == 0) barrier_arrive(shared_address(&memory_->ready[b]));
      if constexpr (!Resident) row = request.row + row_step, early = prepared(row);
    }
  }

 private:
  __device__ IdsRow prepared(uint32_t row) const { return row < uint32_t(p_.rows) ? workspace_.rows[row] : IdsRow{}; }

  struct All {
    float sum, hard, reference, largest;
  };
  // Parts of a row, one a lane, to the sums of them all.
  __device__ All add_up(const Parcel& part, float k, bool counts) const {
    const float a = counts ? part.v[2] : kPadding;
    All all;
    all.reference = warp_max(a);
    float v[2] = {a > kPadding ? part.v[0] * Math::exp2((a - all.reference) * k) : (counts ? part.v[0] : 0),
                  a > kPadding ? part.v[1] * Math::exp2((a - all.reference) * kLog2Ef) : 0};
    const float total = warp_sums(v, lane_);
    all.sum = __shfl_sync(kAllLanes, total, 0), all.hard = __shfl_sync(kAllLanes, total, 16);
    all.largest = warp_max(counts ? part.v[3] : -__builtin_inff());
    return all;
  }

  __device__ void statistics(Parcel part, const Request& request, const IdsRow& found, int ordinal) {
    const RowHeader row = headers_[request.slot];
    const float k = row.log2e_over_temperature;
    All rest = add_up(part, k, lane_ < warps_);
    if (blocks_ > 1) {
      const float which = lane_ < 8 ? rest.sum : lane_ < 16 ? rest.hard : lane_ < 24 ? rest.reference : rest.largest;
      part = across<4>(which);
      rest = add_up(part, k, lane_ < blocks_);
    }
    if (lane_ == 0) finish(request, row, found, rest, sparse_->numbers[ordinal % SparseMemory::kRows]);
  }

  // One thread's work: a few dozen numbers, none of which waits for another's memory.
  __device__ void finish(const Request& request, const RowHeader& row, const IdsRow& found, const All& rest,
                         SparseNumbers& out) {
    const float temperature = row.temperature, inv_temperature = reciprocal(temperature), k = row.log2e_over_temperature;
    const bool hard = problem_.with_ce && temperature != 1;
    const float reference = fmaxf(found.student_reference, rest.reference);
    // Of all columns, to the larger reference.
    const float of_ids = found.student_sum > 0 ? found.student_sum * exp2f((found.student_reference - reference) * k) : 0;
    const float of_rest = rest.sum > 0 ? rest.sum * exp2f((rest.reference - reference) * k) : rest.sum;
    const float total = of_ids + of_rest;
    float hard_total = total;
    if (hard)
      hard_total = (found.student_sum > 0 ? found.hard_sum * exp2f((found.student_reference - reference) * kLog2Ef) : 0) +
                   (rest.sum > 0 ? rest.hard * exp2f((rest.reference - reference) * kLog2Ef) : 0);
    const bool good = !(found.flags & kInvalid) && is_positive_finite(total) && is_positive_finite(hard_total) && rest.sum >= 0 &&
                      is_positive_finite(temperature);
    const Logarithm of_inside = Logarithm::of(found.student_sum), of_outside = Logarithm::of(rest.sum);
    float student_odds = __builtin_inff();
    if (!(found.student_sum > 0))
      student_odds = -__builtin_inff();
    else if (rest.sum > 0)
      student_odds = fmaf(found.student_reference - rest.reference, inv_temperature, log_ratio(of_inside, of_outside));
    const auto terms = SparseRow<float>::make(p_.sparse.tail, found.log_mass, student_odds, found.ids, p_.vocab_size);
    const float lse = fmaf(reference, inv_temperature, logf(total));
    const float cross_entropy = problem_.with_ce ? (reference - found.label_logit) + logf(hard_total) : 0;

    const float by_scale = problem_.scale_gradient ? row.scale : 1.0f;
    const float kd = problem_.kd_weight * (problem_.scale_by_temperature ? temperature : inv_temperature) * by_scale;
    const float ce = problem_.with_ce ? problem_.ce_weight * by_scale : 0, folded = hard ? 0 : ce;
    SparseNumbers n{good, 0, rest.reference, 0, reference, kd * terms.within, fmaf(kd, terms.moved, folded * terms.student_strong), ce};
    if (rest.sum > 0) n.by_rest = fmaf(-kd, terms.moved, folded * terms.student_weak) / rest.sum;
    if (hard) n.by_hard = ce / hard_total;
    out = n;
    if (rank_ != 0) return;
    const float agrees = found.top_logit > -__builtin_inff() && found.top_logit >= fmaxf(rest.largest, found.student_reference);
    report_sparse(p_, request.row, good, row.scale, temperature,
                  {terms.loss(found.within), cross_entropy, lse, found.teacher_lse, found.teacher_mass, terms.student_strong, agrees});
  }

  SparseMemory* sparse_;
  const SparseWorkspace workspace_;
};

}  // namespace kdkernels::cuda
