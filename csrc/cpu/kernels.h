// One translation unit per instruction set defines one of these (kernels.cpp); rows.cpp chooses.
#pragma once
#include "../rows.h"

namespace kdkernels {

using SweepFunction = void (*)(const RowProblem&, int64_t begin, int64_t end);
using ScaleFunction = void (*)(const void* in, void* out, DType dtype, int64_t n, double factor);

struct CpuKernels {
  SweepFunction sweep;  // rows [begin, end)
  ScaleFunction scale;  // out = factor·in, n elements; in may be out
};

CpuKernels baseline_kernels();
#if defined(__x86_64__)
CpuKernels avx2_kernels();
CpuKernels avx512_kernels();
#endif

}  // namespace kdkernels
