// One translation unit per dtype and sweep defines one of these (split_kernel.cu); rows.cu chooses.
#pragma once
#include "kernel.h"

namespace kdkernels::cuda {

// At 128 registers a thread: docs/performance.md.
constexpr int kMaxSplitConsumers = 384, kSplitHelpers = 128;

enum class SplitSweepId { decoupled_label, decoupled_top_k, decoupled_top_p, decoupled_given, adaptive_kl };

// The kernel's address, for the launch functions of the runtime.
template <class T, SplitSweepId Id>
const void* split_kernel();

}  // namespace kdkernels::cuda
