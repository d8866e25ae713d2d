// The row kernel for one dtype and one divergence: KD_TYPE and KD_DIVERGENCE name them.
#include "kernel.h"

#include "sweep.cuh"

namespace kdkernels::cuda {

// consumers + 64 threads: the last warp but one copies, the last adds up totals.
template <class T, template <class> class Divergence>
__global__ void __launch_bounds__(kMaxConsumers + 64, 1) row_cluster(const __grid_constant__ ClusterProblem problem) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) uint64_t full[kMaxSlots], empty[kMaxSlots];
  __shared__ RowHeader headers[kMaxSlots];
  __shared__ ExchangeMemory exchange_memory;
  const int blocks = int(cluster_size()), rank = int(cluster_rank());
  const int warps = int(blockDim.x) / 32 - 2, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const uint32_t first_row = blockIdx.x / blocks, row_step = gridDim.x / blocks;

  Ring<T> ring;
  ring.slots = kept(shared_address(shared));
  ring.headers = headers;
  ring.full = kept(shared_address(full)), ring.empty = kept(shared_address(empty));
  ring.slot_columns = problem.slot_columns, ring.count = problem.slots;

  if (threadIdx.x == 0) {
    for (int i = 0; i < ring.count; i++) barrier_init(ring.full_barrier(i), 1), barrier_init(ring.empty_barrier(i), warps);
    exchange_memory.init(warps);
    barrier_init_fence();
  }
  __syncthreads();
  cluster_sync();
  if (warp < warps) {
    const Exchange exchange{&exchange_memory, warps, warp, lane};
    RowSweep<T, Divergence>(problem, ring, exchange, blocks, rank).consume(first_row, row_step);
  } else if (warp == warps) {
    if (lane == 0) ring.template produce<false>(problem, first_row, row_step, rank * problem.share);
    __syncwarp();
  } else {
    Totals<T, Divergence>(problem, headers, &exchange_memory, blocks, rank, warps, lane).serve();
  }
  cluster_sync();  // no block leaves while another may still store into it
}

template <class T, template <class> class Divergence>
const void* row_kernel() {
  return reinterpret_cast<const void*>(&row_cluster<T, Divergence>);
}

template const void* row_kernel<KD_TYPE, KD_DIVERGENCE>();

}  // namespace kdkernels::cuda
