// The GPU's row sweeps: validated problems in, kernel and launch chosen here. Everything runs on the stream given, on the
// current device; nothing waits for it.
#pragma once
#include <string>
#include <vector>

#include "../rows.h"

namespace kdkernels::cuda {

// How a problem is laid over the chip.
struct Plan {
  int cluster = 0;        // thread blocks that share a row
  int consumers = 0;      // threads of a block that compute; 64 more copy and add up, 128 where the vocabulary is split
  int slot_columns = 0;   // columns of both rows in a ring slot
  int blocks_per_sm = 1;  // that share a multiprocessor's shared memory
  int ahead = 0;          // 1: the next row's first sweep comes before this row's gradient; two rows must fit the ring
};

// Why the device (its number) cannot run the kernels; empty where it can.
std::string why_not(int device);

// Why row_loss cannot serve this problem; empty where it can.
std::string why_not_rows(const RowProblem& problem);

// The plan for a problem on the current device.
Plan plan(const RowProblem& problem);

void row_loss(const RowProblem& problem, const Plan& plan, void* stream);

// The same of a sparse teacher, with memory of so many bytes, at a multiple of 16, to work in.
int64_t sparse_bytes(const RowProblem& problem);
void sparse_row_loss(const RowProblem& problem, const Plan& plan, void* memory, void* stream);

// Multiplies row i of a (rows, width) matrix by factors[i·factor_stride] (floats); rows whose factor is 1 are copied, or
// left alone where out is in.
void scale_rows(const void* in, void* out, DType dtype, const RowLayout& layout, int64_t rows, int64_t width,
                const float* factors, int64_t factor_stride, void* stream);

}  // namespace kdkernels::cuda
