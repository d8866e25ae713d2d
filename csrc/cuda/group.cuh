// Sixteen bytes of a row at a time: G columns, as floats.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kdkernels::cuda {

template <class T>
constexpr int kGroup = 16 / sizeof(T);

// Columns between the boundary of a group and the row.
template <class T>
__device__ __forceinline__ int phase_of(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (kGroup<T> - 1);
}

__device__ __forceinline__ void widen(uint4 v, float (&x)[4], float) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ void widen(uint4 v, float (&x)[8], __nv_bfloat16) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void widen(uint4 v, float (&x)[8], __half) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

// From a 32-bit shared-memory address.
__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }

// Streaming stores: nothing here reads the gradient again.
__device__ __forceinline__ void store(float* p, const float (&g)[4]) {
  __stcs(reinterpret_cast<float4*>(p), make_float4(g[0], g[1], g[2], g[3]));
}
__device__ __forceinline__ void store(__nv_bfloat16* p, const float (&g)[8]) {
  __nv_bfloat162 h[4];
#pragma unroll
  for (int i = 0; i < 4; i++) h[i] = __floats2bfloat162_rn(g[2 * i], g[2 * i + 1]);
  __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(h));
}
__device__ __forceinline__ void store(__half* p, const float (&g)[8]) {
  __half2 h[4];
#pragma unroll
  for (int i = 0; i < 4; i++) h[i] = __floats2half2_rn(g[2 * i], g[2 * i + 1]);
  __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(h));
}

// Four columns as 16-bit numbers.
__device__ __forceinline__ uint2 pack(const float (&g)[4], __nv_bfloat16) {
  const __nv_bfloat162 h[2] = {__floats2bfloat162_rn(g[0], g[1]), __floats2bfloat162_rn(g[2], g[3])};
  return *reinterpret_cast<const uint2*>(h);
}
__device__ __forceinline__ uint2 pack(const float (&g)[4], __half) {
  const __half2 h[2] = {__floats2half2_rn(g[0], g[1]), __floats2half2_rn(g[2], g[3])};
  return *reinterpret_cast<const uint2*>(h);
}

}  // namespace kdkernels::cuda
