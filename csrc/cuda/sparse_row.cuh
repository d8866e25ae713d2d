// A sparse teacher's row: where its loss and statistics go.
#pragma once
#include "../divergence/sparse.h"
#include "sparse.h"
#include "totals.cuh"

namespace kdkernels::cuda {

constexpr int kSparseStats = 7;

// Of a row: its loss, and the statistics in their order but for the first three.
struct SparseReport {
  float value, cross_entropy, student_lse, teacher_lse, teacher_mass, student_mass, agrees;
};
__device__ inline void report_sparse(const RowProblem& p, uint32_t row, bool good, float scale, float temperature,
                                     const SparseReport& r) {
  const float kd = float(p.kd_weight) * (p.scale_by_temperature ? temperature * temperature : 1.0f), nan = __builtin_nanf("");
  const float loss = (kd != 0 ? kd * r.value : 0.0f) + (p.with_ce() ? float(p.ce_weight) * r.cross_entropy : 0.0f);
  const float stats[kSparseStats] = {r.student_lse, r.teacher_lse, r.value, r.cross_entropy, r.teacher_mass, r.student_mass, r.agrees};
  static_cast<float*>(p.loss)[row] = scale == 0 ? 0.0f : good ? scale * loss : nan;
  float* to = static_cast<float*>(p.stats) + row;
#pragma unroll
  for (int i = 0; i < kSparseStats; i++) to[i * p.rows] = good ? stats[i] : nan;
}

}  // namespace kdkernels::cuda
