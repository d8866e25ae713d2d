// One translation unit per dtype and divergence defines one of these (kernel.cu); rows.cu chooses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../divergence/pointwise.h"

namespace kdkernels::cuda {

// At 96 registers a thread. More threads with fewer are slower: docs/performance.md.
constexpr int kMaxConsumers = 512;

// The kernel's address, for the launch functions of the runtime.
template <class T, template <class> class Divergence>
const void* row_kernel();

}  // namespace kdkernels::cuda
