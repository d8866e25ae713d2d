// The sweep over the rows of a sparse teacher, for one dtype: KD_TYPE names it.
#include "sparse.cuh"

#include "kernel.h"

namespace kdkernels::cuda {

// The last five warps of a block copy, prepare the ids, take their columns out, write their gradient, and add up totals.
template <class T, bool Resident>
__global__ void __launch_bounds__(kMaxSparseConsumers + kSparseHelpers, 1) sparse_cluster(const __grid_constant__ ClusterProblem problem) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) uint64_t full[kMaxSlots], empty[kMaxSlots];
  __shared__ RowHeader headers[kMaxSlots];
  __shared__ ExchangeMemory exchange_memory;
  __shared__ SparseMemory sparse_memory;
  const int blocks = int(cluster_size()), rank = int(cluster_rank());
  const int warps = int(blockDim.x - kSparseHelpers) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const uint32_t first_row = blockIdx.x / blocks, row_step = gridDim.x / blocks;

  SparseRing<T> ring;
  const int k = int(problem.rows.sparse.k);
  const SparseWorkspace workspace = Resident ? resident_workspace(shared, &sparse_memory, k) : problem.sparse;
  ring.slots = kept(shared_address(shared + (Resident ? resident_bytes(k) : 0)));
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
  if (warp < warps) {
    const Exchange exchange{&exchange_memory, warps, warp, lane};
    SparseSweep<T, Resident>(problem, ring, &sparse_memory, exchange, blocks, rank).consume(first_row, row_step);
  } else if (warp == warps) {
    if (lane == 0) ring.template produce<false>(problem, first_row, row_step, rank * problem.share);
    __syncwarp();
  } else if (warp == warps + 1) {
    if constexpr (Resident)
      prepare<T>(problem, ring, &sparse_memory, workspace, reinterpret_cast<int*>(shared), first_row, row_step, lane);
  } else if (warp == warps + 2) {
    take_out<T>(problem, ring, &sparse_memory, first_row, row_step, rank * problem.share, lane);
  } else if (warp == warps + 3) {
    patch<T, Resident>(problem, &sparse_memory, workspace, first_row, row_step, rank * problem.share, lane);
  } else {
    SparseTotals<T, Resident>(problem, headers, &exchange_memory, &sparse_memory, workspace, blocks, rank, warps, lane)
        .serve(first_row, row_step);
  }
  cluster_sync();  // no block leaves while another may still store into it
}

template <class T>
const void* sparse_kernel(bool resident) {
  return resident ? reinterpret_cast<const void*>(&sparse_cluster<T, true>) : reinterpret_cast<const void*>(&sparse_cluster<T, false>);
}

template const void* sparse_kernel<KD_TYPE>(bool resident);

}  // namespace kdkernels::cuda
