// What the ids of a sparse teacher decide alone (sparse.h): a warp or a block a row, a thread an id or several.
#include "check.h"
#include "sparse_ids.cuh"

namespace kdkernels::cuda {
namespace {

constexpr int kThreads = 256;  // of a block

template <class T, int Each, int Threads>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ RowProblem p, SparseWorkspace workspace, int bits) {
  extern __shared__ int tables[];
  __shared__ double of_warps[kThreads / 32];
  constexpr int rows = kThreads / Threads;  // of a block
  const int64_t row = int64_t(blockIdx.x) * rows + threadIdx.x / Threads;
  if (row >= p.rows) return;  // no other row's threads wait for these: a block has several where warps have one each
  const Team<Threads> team{of_warps, int(threadIdx.x) % Threads};
  int* const table = tables + (threadIdx.x / Threads << (bits + 1));
  prepare_row<T, Each>(p, uint32_t(row), team, Places{table, table + (1 << bits), bits}, workspace, row, [] {});
}

// A gradient of 0 (which it may be already) but for the ids, by a block a row.
template <class T>
__global__ void __launch_bounds__(kThreads) gaps_kernel(const __grid_constant__ RowProblem p, SparseWorkspace workspace, bool is_zero) {
  const uint32_t row = blockIdx.x;
  const int k = int(p.sparse.k);
  const IdsRow r = workspace.rows[row];
  const GradientRow<T> gradient = gradient_row<T>(p, row_offset(p.gradient_rows, row));
  const float with = r.flags & kInvalid ? __builtin_nanf("") : 0.0f;
  if (with != 0 || !is_zero)
    fill_row<T>(gradient, 0, int(p.student.width), with, int(threadIdx.x) * kGroup<T>, kThreads * kGroup<T>);
  __syncthreads();
  if (r.flags & (kSkipped | kInvalid)) return;
  for (int j = threadIdx.x; j < k; j += kThreads) {
    const int64_t at = int64_t(row) * k + j;
    if (workspace.ids[at] >= 0) store_one(gradient, workspace.ids[at], r.by_gap * workspace.gaps[at]);
  }
}

template <class T, int Each, int Threads>
void prepare_in(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  constexpr int rows = kThreads / Threads;
  const int bits = table_bits(p.sparse.k);
  const int shared = int(2 * sizeof(int) * rows) << bits;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&prepare_kernel<T, Each, Threads>), cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 16),
        "kdkernels: shared memory");
  prepare_kernel<T, Each, Threads><<<unsigned((p.rows + rows - 1) / rows), kThreads, shared, stream>>>(p, workspace, bits);
  check(cudaGetLastError(), "kdkernels: launching the ids' kernel");
}

// Few ids are a warp's, which waits for nobody; many a block's.
template <class T>
void prepare_as(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  if (p.sparse.k <= kMostResident) return prepare_in<T, kMostResident / 32, 32>(p, workspace, stream);
  return prepare_in<T, 16, kThreads>(p, workspace, stream);
}

template <class T>
void write_gaps_as(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  // One run of memory is filled faster by the runtime.
  const RowLayout& rows = p.gradient_rows;
  const bool one_run = rows.dims == 0 || (rows.dims == 1 && rows.stride[0] == p.student.width);
  if (one_run)
    check(cudaMemsetAsync(p.gradient, 0, size_t(p.rows * p.student.width * bytes_per_element(p.gradient_dtype)), stream),
          "kdkernels: clearing the gradient");
  gaps_kernel<T><<<unsigned(p.rows), kThreads, 0, stream>>>(p, workspace, one_run);
  check(cudaGetLastError(), "kdkernels: launching the ids' gradient");
}

}  // namespace

void sparse_prepare(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  switch (p.student.dtype) {
    case DType::bfloat16: return prepare_as<__nv_bfloat16>(p, workspace, stream);
    case DType::float16: return prepare_as<__half>(p, workspace, stream);
    default: return prepare_as<float>(p, workspace, stream);
  }
}

void write_gaps(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  switch (p.student.dtype) {
    case DType::bfloat16: return write_gaps_as<__nv_bfloat16>(p, workspace, stream);
    case DType::float16: return write_gaps_as<__half>(p, workspace, stream);
    default: return write_gaps_as<float>(p, workspace, stream);
  }
}

}  // namespace kdkernels::cuda
