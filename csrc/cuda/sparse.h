// Sparse teachers on a GPU. Of each row, a warp cleans the ids and computes all that they decide alone (sparse_ids.cuh),
// while the sweep (sparse.cuh) reads the rest of the row; then the row is reported and its gradient written. Rows of many
// ids are prepared by a launch of its own before, as are those of which nothing but the ids matters; then a workspace
// stands between the launches.
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

// The most ids a row that the sweep prepares itself may have.
constexpr int kMostResident = 256;
inline bool is_resident(const SparseTeacher& t) { return t.whole && t.k <= kMostResident; }

// Of a table that finds repeated ids.
constexpr int table_bits(int64_t k) {
  int bits = 5;
  while (int64_t(1) << bits < 2 * k) bits++;
  return bits;
}

constexpr int64_t sparse_workspace_bytes(int64_t rows, int64_t k) {
  return (rows * k + 3) / 4 * 4 * 16 + rows * int64_t(sizeof(IdsRow));
}
inline SparseWorkspace sparse_workspace(void* memory, int64_t rows, int64_t k) {
  const int64_t n = (rows * k + 3) / 4 * 4;
  auto* words = static_cast<float*>(memory);
  return {reinterpret_cast<int*>(words), words + n, words + 2 * n, words + 3 * n, reinterpret_cast<IdsRow*>(words + 4 * n)};
}

// The sweep's address, for the launch functions of the runtime; one translation unit per dtype (sparse_kernel.cu).
// 20 warps in all, five on each quarter of a multiprocessor: one more would leave each of them 16 registers less.
constexpr int kMaxSparseConsumers = 480, kSparseHelpers = 160;
template <class T>
const void* sparse_kernel(bool resident);

void sparse_prepare(const RowProblem& problem, const SparseWorkspace& workspace, cudaStream_t stream);
void write_gaps(const RowProblem& problem, const SparseWorkspace& workspace, cudaStream_t stream);

}  // namespace kdkernels::cuda
