// The sweep over the rows of a sparse teacher, for one dtype: KD_TYPE names it.
#include "sparse.cuh"

#include "kernel.h"

namespace kdkernels::cuda {

// The last four warps of a block copy, take the ids' columns out, write their gradient, and add up totals.
template <class T, bool Prepares>
__global__ void __launch_bounds__(kMaxConsumers + kSparseHelpers, 1) sparse_cluster(const __grid_constant__ ClusterProblem problem) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) uint64_t full[kMaxSlots], empty[kMaxSlots];
  __shared__ RowHeader headers[kMaxSlots];
  __shared__ ExchangeMemory exchange_memory;
  __shared__ SparseMemory sparse_memory;
  const int blocks = int(cluster_size()), rank = int(cluster_rank());
  const int warps = int(blockDim.x - kSparseHelpers) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const uint32_t first_row = blockIdx.x / blocks, row_step = gridDim.x / blocks;

  SparseRing<T> ring;
  ring.slots = kept(shared_address(shared));
  ring.headers = headers;
  ring.full = kept(shared_address(full)), ring.empty = kept(shared_address(empty));
  ring.slot_columns = problem.slot_columns, ring.count = problem.slots;

  if (threadIdx.x == 0) {
    for (int i = 0; i < ring.count; i++) barrier_init(ring.full_barrier(i), 1), barrier_init(ring.empty_barrier(i), warps);
    exchange_memory.init(warps);
    sparse_memory.init(ring.count, warps);
    barrier_init_fence();
  }
  __syncthreads();
  cluster_sync();
  // Who reads the workspace waits here until all of the cluster's rows are prepared, the others when all is done.
  const int begin = rank * problem.share;
  if (warp < warps) {
    if constexpr (Prepares) prepare<T>(problem, first_row, row_step, rank * warps + warp, blocks * warps, lane);
    cluster_arrive();
    const Exchange exchange{&exchange_memory, warps, warp, lane};
    SparseSweep<T>(problem, ring, &sparse_memory, exchange, blocks, rank).consume(first_row, row_step);
    __syncwarp();
    cluster_wait();
  } else if (warp == warps) {
    cluster_arrive();
    if (lane == 0) ring.template produce<false>(problem, first_row, row_step, begin);
    __syncwarp();
    cluster_wait();
  } else if (warp == warps + 1) {
    cluster_arrive();
    TakeOut<T>(problem, ring, &sparse_memory, begin, lane).serve(first_row, row_step);
    __syncwarp();
    cluster_wait();
  } else if (warp == warps + 2) {
    cluster_sync();
    Patch<T>(problem, &sparse_memory, begin, lane).serve(first_row, row_step);
    __syncwarp();
  } else {
    cluster_sync();
    SparseTotals<T>(problem, headers, &exchange_memory, &sparse_memory, blocks, rank, warps, lane).serve(first_row, row_step);
    __syncwarp();
  }
  cluster_sync();  // no block leaves while another may still store into it
}

template <class T>
const void* sparse_kernel(bool prepares) {
  return prepares ? reinterpret_cast<const void*>(&sparse_cluster<T, true>) : reinterpret_cast<const void*>(&sparse_cluster<T, false>);
}

template const void* sparse_kernel<KD_TYPE>(bool prepares);

}  // namespace kdkernels::cuda
