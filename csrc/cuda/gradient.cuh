// Where a row's gradient goes: numbers of the logits' own type, but that those of fp32 logits may be of 16 bits. That is a
// switch at run time, the same way for all threads, at each store; a type of its own would be as many kernels again.
#pragma once
#include "../rows.h"
#include "group.cuh"

namespace kdkernels::cuda {

// Of fp32 logits: groups of 4 columns, stored 16 or 8 bytes at a time.
struct AnyGradientRow {
  char* begin = nullptr;
  DType dtype = DType::float32;  // or bfloat16, float16

  __device__ __forceinline__ explicit operator bool() const { return begin != nullptr; }
  __device__ __forceinline__ int bytes() const { return dtype == DType::float32 ? 4 : 2; }
  __device__ __forceinline__ AnyGradientRow operator+(int columns) const { return {begin + int64_t(columns) * bytes(), dtype}; }
  __device__ __forceinline__ AnyGradientRow operator-(int columns) const { return *this + -columns; }
};

template <class T>
struct GradientRowOf {
  using Type = T*;
};
template <>
struct GradientRowOf<float> {
  using Type = AnyGradientRow;
};
template <class T>
using GradientRow = typename GradientRowOf<T>::Type;

// The row that begins so many elements into the gradient; null where none is wanted.
template <class T>
__device__ __forceinline__ GradientRow<T> gradient_row(const RowProblem& p, int64_t offset) {
  if constexpr (sizeof(T) == 2) {
    return p.gradient ? static_cast<T*>(p.gradient) + offset : nullptr;
  } else {
    if (!p.gradient) return {};
    return {static_cast<char*>(p.gradient) + offset * (p.gradient_dtype == DType::float32 ? 4 : 2), p.gradient_dtype};
  }
}

__device__ __forceinline__ int phase_of(const AnyGradientRow& row) {
  return int(reinterpret_cast<uintptr_t>(row.begin) / uintptr_t(row.bytes())) & (kGroup<float> - 1);
}

// A group's columns, which lie at its boundary.
template <class T>
__device__ __forceinline__ void store(T* row, int column, const float (&g)[kGroup<T>]) {
  store(row + column, g);
}
__device__ __forceinline__ void store(const AnyGradientRow& row, int column, const float (&g)[4]) {
  if (row.dtype == DType::float32) {
    store(reinterpret_cast<float*>(row.begin) + column, g);
  } else {
    const uint2 bits = row.dtype == DType::bfloat16 ? pack(g, __nv_bfloat16{}) : pack(g, __half{});
    __stcs(reinterpret_cast<uint2*>(row.begin + int64_t(column) * 2), bits);
  }
}

// One column.
template <class T>
__device__ __forceinline__ void store_one(T* row, int column, float g) {
  row[column] = narrow<T>(g);
}
__device__ __forceinline__ void store_one(const AnyGradientRow& row, int column, float g) {
  if (row.dtype == DType::float32)
    reinterpret_cast<float*>(row.begin)[column] = g;
  else if (row.dtype == DType::bfloat16)
    reinterpret_cast<__nv_bfloat16*>(row.begin)[column] = narrow<__nv_bfloat16>(g);
  else
    reinterpret_cast<__half*>(row.begin)[column] = narrow<__half>(g);
}

// Columns [begin, end) of a row, by threads that start at their own group and go on by `step` columns.
template <class T>
__device__ __forceinline__ void fill_row(GradientRow<T> row, int begin, int end, float with, int first, int step) {
  if (begin >= end) return;
  constexpr int G = kGroup<T>;
  const int phase = phase_of(row + begin), n = end - begin + phase;
  const GradientRow<T> base = row + begin - phase;
  float g[G];
#pragma unroll
  for (int i = 0; i < G; i++) g[i] = with;
  for (int at = first; at < n; at += step) {
    if (at >= phase && at + G <= n) {
      store(base, at, g);
    } else {
      for (int i = 0; i < G; i++)
        if (at + i >= phase && at + i < n) store_one(base, at + i, with);
    }
  }
}

}  // namespace kdkernels::cuda
