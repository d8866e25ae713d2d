// The row kernel of a divergence that splits the vocabulary, for one dtype: KD_TYPE and KD_SWEEP name them.
#include "split_kernel.h"

#include "adaptive.cuh"
#include "decoupled.cuh"

namespace kdkernels::cuda {

template <class T>
using DecoupledLabel = DecoupledSweep<T, Split::label>;
template <class T>
using DecoupledTopK = DecoupledSweep<T, Split::top_k>;
template <class T>
using DecoupledTopP = DecoupledSweep<T, Split::top_p>;
template <class T>
using DecoupledGiven = DecoupledSweep<T, Split::given>;

// The last four warps of a block copy, look ahead for the windows of selects, and, two of them, add up totals.
template <class T, template <class> class Sweep>
__global__ void __launch_bounds__(kMaxSplitConsumers + kSplitHelpers, 1) split_cluster(const __grid_constant__ ClusterProblem problem) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) uint64_t full[kMaxSlots], empty[kMaxSlots];
  __shared__ RowHeader headers[kMaxSlots];
  __shared__ ExchangeMemory exchange_memory;
  __shared__ SplitMemory<T> split_memory;
  const int blocks = int(cluster_size()), rank = int(cluster_rank());
  const int warps = int(blockDim.x - kSplitHelpers) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const uint32_t first_row = blockIdx.x / blocks, row_step = gridDim.x / blocks;

  Ring<T> ring;
  ring.slots = kept(shared_address(shared + split_bytes(problem.rows.strong.id, blocks)));
  ring.headers = headers;
  ring.full = kept(shared_address(full)), ring.empty = kept(shared_address(empty));
  ring.slot_columns = problem.slot_columns, ring.count = problem.slots;

  if (threadIdx.x == 0) {
    for (int i = 0; i < ring.count; i++) barrier_init(ring.full_barrier(i), 1), barrier_init(ring.empty_barrier(i), warps);
    exchange_memory.init(warps);
    split_memory.init(warps);
    barrier_init_fence();
  }
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) split_memory.select.bins[i] = 0;
  __syncthreads();
  cluster_sync();
  if (warp < warps) {
    const Exchange exchange{&exchange_memory, warps, warp, lane};
    Sweep<T>(problem, ring, exchange, blocks, rank, &split_memory).consume(first_row, row_step);
  } else if (warp == warps) {
    if (lane == 0) ring.template produce<Sweep<T>::Kind == Split::given>(problem, first_row, row_step, rank * problem.share);
    __syncwarp();
  } else if (warp == warps + 1) {
    if constexpr (is_threshold(Sweep<T>::Kind))
      Scout<T>(problem, &split_memory.select, lane).serve(split_memory.prepared, split_memory.used, first_row, row_step);
  } else {
    typename Sweep<T>::Totals(problem, ring, &exchange_memory, blocks, rank, warps, lane, &split_memory,
                              reinterpret_cast<uint32_t*>(shared))
        .serve(warp == warps + 3);
  }
  cluster_sync();  // no block leaves while another may still store into it
}

template <class T, SplitSweepId Id>
const void* split_kernel() {
  if constexpr (Id == SplitSweepId::decoupled_label) return reinterpret_cast<const void*>(&split_cluster<T, DecoupledLabel>);
  if constexpr (Id == SplitSweepId::decoupled_top_k) return reinterpret_cast<const void*>(&split_cluster<T, DecoupledTopK>);
  if constexpr (Id == SplitSweepId::decoupled_top_p) return reinterpret_cast<const void*>(&split_cluster<T, DecoupledTopP>);
  if constexpr (Id == SplitSweepId::decoupled_given) return reinterpret_cast<const void*>(&split_cluster<T, DecoupledGiven>);
  if constexpr (Id == SplitSweepId::adaptive_kl) return reinterpret_cast<const void*>(&split_cluster<T, AdaptiveSweep>);
}

template const void* split_kernel<KD_TYPE, SplitSweepId::KD_SWEEP>();

}  // namespace kdkernels::cuda
