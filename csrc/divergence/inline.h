// KD_INLINE: a function of the inner loop, for the host compiler and for nvcc.
#pragma once
#ifdef __CUDACC__
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif
