// The number type of the CUDA sweeps: a float and its elementary functions, from the special function unit where that is
// accurate enough and from polynomials where it is not.
#pragma once
#include <cstdint>

#include "../divergence/polynomials.h"

namespace kdkernels::cuda {

struct FloatMath {
  using Real = float;
  using V = float;
  using Mask = bool;

  static KD_INLINE V set(double x) { return float(x); }
  static KD_INLINE V select(Mask m, V a, V b) { return m ? a : b; }
  static KD_INLINE Mask greater(V a, V b) { return a > b; }
  static KD_INLINE V greater_one(V a, V b) { return a > b ? 1.0f : 0.0f; }
  static KD_INLINE Mask is_nan(V a) { return a != a; }
  static KD_INLINE Mask is_infinite(V a) { return a == __builtin_inff(); }
  static KD_INLINE V max(V a, V b) { return fmaxf(a, b); }
  static KD_INLINE V abs(V a) { return fabsf(a); }
  static __device__ __forceinline__ V fma(V a, V b, V c) { return __fmaf_rn(a, b, c); }

  // Relative error 2^-22; results under 2^-126 are 0.
  static __device__ __forceinline__ V exp2(V x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // Absolute error 2^-22 within [1/2, 2], relative beyond.
  static __device__ __forceinline__ V log2(V x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ V reciprocal(V x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ V exp2_nonpositive(V x) { return exp2(x); }
  static __device__ __forceinline__ V exp(V x) { return exp2(fminf(x * kLog2e, 127.0f)); }

  struct Exponential {
    V e, em, phi;  // e^x, e^x - 1, e^x - 1 - x
  };
  // Each accurate relative to itself, for x <= 0; of any sign (to e^88) if AnySign.
  template <bool AnySign = false>
  static __device__ __forceinline__ Exponential exponential(V x) {
    constexpr float c0 = kExp[0], c1 = kExp[1], c2 = kExp[2], c3 = kExp[3], c4 = kExp[4], c5 = kExp[5];
    const V q = fma(fma(fma(fma(fma(c5, x, c4), x, c3), x, c2), x, c1), x, c0);
    const V near_phi = x * x * q;
    Exponential out;
    out.e = exp2((AnySign ? fminf(x, 88.0f) : x) * kLog2e);
    const bool near = fabsf(x) < kExpRange;
    const V far_em = out.e - 1;
    out.em = near ? x + near_phi : far_em;
    out.phi = near ? near_phi : far_em - x;
    return out;
  }
  // log(1 + w) and w - log(1 + w) for -1 <= w <= 0, each accurate relative to itself.
  static __device__ __forceinline__ void log1p_and_chi(V w, V& log1p, V& chi) {
    constexpr float c0 = kLog[0], c1 = kLog[1], c2 = kLog[2], c3 = kLog[3], c4 = kLog[4], c5 = kLog[5], c6 = kLog[6],
                    c7 = kLog[7], c8 = kLog[8];
    const V high = fma(fma(fma(fma(c8, w, c7), w, c6), w, c5), w, c4);
    const V p = fma(fma(fma(fma(high, w, c3), w, c2), w, c1), w, c0);
    const V near_chi = w * w * p, far_log = log2(1 + w) * kLn2;
    const bool near = w > kLogRange;
    log1p = near ? w - near_chi : far_log;
    chi = near ? near_chi : w - far_log;
  }

 private:
  static constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
  static constexpr float kExpRange = 0.34657359f;  // ln(2)/2
  static constexpr float kLogRange = -0.29289322f;  // sqrt(1/2) - 1
};

}  // namespace kdkernels::cuda
