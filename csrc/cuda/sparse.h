// Sparse teachers on a GPU: two launches. `prepare` cleans a row's ids, gathers the student's logits there and computes all
// that the given ids decide alone; the sweep (sparse.cuh) reads the rest of the row, reports the row and writes the
// gradient. Where nothing but the ids matters, `write_gaps` does that instead. Between them stands a workspace.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../rows.h"

namespace kdkernels::cuda {

// What `prepare` finds out about a row.
struct alignas(16) IdsRow {
  // Within S: the largest logit, and the sums of e^((z - it)/T) and of e^(z - it). -1e30 and 0: no mass.
  float student_reference, student_sum, hard_sum;
  float within;     // the divergence within S
  double log_mass;  // log(P_S), as given; -inf: none
  float teacher_lse, teacher_mass;
  float top_logit;  // the student's at the teacher's most likely token; -inf: it names none
  float label_logit;
  int label;        // -1: none to read
  int ids;          // in S
  int flags;
  float by_gap;     // where nothing but the ids matters: their gradient is by_gap·gap
};
enum IdsFlag : int {
  kSkipped = 1,      // not read: everything is 0
  kInvalid = 2,      // NaN
  kLabelInside = 4,  // the label is one of the ids
};

// One (rows, k) of each, then an IdsRow a row.
struct SparseWorkspace {
  int* ids = nullptr;      // -1: no token, or one that stands before
  float* logits = nullptr; // the student's
  float* gaps = nullptr;   // the divergence's gradient within S: of forward KL, q~ - p~
  float* shares = nullptr; // q~
  IdsRow* rows = nullptr;
};

constexpr int64_t sparse_workspace_bytes(int64_t rows, int64_t k) {
  return (rows * k + 3) / 4 * 4 * 16 + rows * int64_t(sizeof(IdsRow));
}
inline SparseWorkspace sparse_workspace(void* memory, int64_t rows, int64_t k) {
  const int64_t n = (rows * k + 3) / 4 * 4;
  auto* words = static_cast<float*>(memory);
  return {reinterpret_cast<int*>(words), words + n, words + 2 * n, words + 3 * n, reinterpret_cast<IdsRow*>(words + 4 * n)};
}

// The sweep's address, for the launch functions of the runtime; one translation unit per dtype (sparse_kernel.cu).
constexpr int kSparseHelpers = 128;
template <class T>
const void* sparse_kernel();

void sparse_prepare(const RowProblem& problem, const SparseWorkspace& workspace, cudaStream_t stream);
void write_gaps(const RowProblem& problem, const SparseWorkspace& workspace, cudaStream_t stream);

}  // namespace kdkernels::cuda
