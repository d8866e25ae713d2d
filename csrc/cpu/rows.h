// The CPU's row sweeps: validated problems in, threads and instruction set chosen here.
#pragma once
#include <string>
#include <vector>

#include "../rows.h"

namespace kdkernels::cpu {

// Instruction sets this build has and this processor runs, best last.
std::vector<std::string> capabilities();

// The one in use: the best, or what the environment variable KDKERNELS_CPU_CAPABILITY names. Throws std::runtime_error
// where that is unknown or does not run here.
std::string capability();

void row_loss(const RowProblem& problem, int threads);

// Multiplies row i of a contiguous (rows, width) matrix by factors[i]; rows whose factor is 1 are copied, or left
// alone where out is in. `factors` are doubles where dtype is float64, else floats.
void scale_rows(const void* in, void* out, DType dtype, const RowLayout& layout, int64_t rows, int64_t width,
                const void* factors, int threads);

// Puts huge pages behind a fresh allocation before its first touch: a mapping made anew each step spends as long in
// 4 KB page faults as in the sweep, and a page zeroed in the middle of a sweep empties the cache under it. A hint; does
// nothing where it cannot.
void back_with_huge_pages(void* data, int64_t bytes, int threads);

}  // namespace kdkernels::cpu
