// The number types a sweep computes with: a SIMD register of floats as wide as this translation unit's instruction
// set allows, and a double for fp64 input. Everything sits in an unnamed namespace: this header is compiled once per
// instruction set, and the linker must never pick another set's copy of a function.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../divergence/inline.h"

namespace kdkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

typedef float FloatVector __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVector __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedFloats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// e^r = 1 + r + r²·Q(r) on |r| <= ln(2)/2: minimax of relative error 3e-9, so that e^r - 1 - r keeps its digits.
constexpr float kExp[] = {0.5000000013f, 0.1666666653f, 0.04166646513f, 0.00833336077f, 0.001393364232f, 0.000198578155f};
// log(1 + f) = f - f²·P(f) on sqrt(1/2) <= 1 + f <= sqrt(2): minimax of relative error 8e-9.
constexpr float kLog[] = {0.4999999998f, -0.3333332264f, 0.2500000007f, -0.2000145393f, 0.1666811746f,
                          -0.1423261208f, 0.1241071166f, -0.1179989349f, 0.1161315757f, -0.06864442857f};
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n·kLn2High is exact for |n| < 2^9

struct SimdMath {
  using Real = float;
  using V = FloatVector;
  static constexpr int lanes = kLanes;

  static KD_INLINE V set(double x) { return V{} + float(x); }
  static KD_INLINE V load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
  static KD_INLINE void store(float* p, V x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }

#if defined(__AVX512F__)
  struct Mask {
    __mmask16 bits;
  };
  static KD_INLINE V select(Mask m, V a, V b) { return V(_mm512_mask_blend_ps(m.bits, __m512(b), __m512(a))); }
  static KD_INLINE Mask greater(V a, V b) { return {_mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_GT_OQ)}; }
  static KD_INLINE Mask equal(V a, V b) { return {_mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_EQ_OQ)}; }
  static KD_INLINE Mask is_nan(V a) { return {_mm512_cmp_ps_mask(__m512(a), __m512(a), _CMP_UNORD_Q)}; }
  static KD_INLINE V max(V a, V b) { return V(_mm512_max_ps(__m512(a), __m512(b))); }
  static KD_INLINE V round(V x) { return V(_mm512_roundscale_ps(__m512(x), 8)); }
  static KD_INLINE V power_of_two(V n) { return V(_mm512_scalef_ps(_mm512_set1_ps(1), __m512(n))); }
  static KD_INLINE V abs(V x) { return V(_mm512_abs_ps(__m512(x))); }
#else
  struct Mask {
    IntVector bits;
  };
  static KD_INLINE V select(Mask m, V a, V b) { return V((IntVector(a) & m.bits) | (IntVector(b) & ~m.bits)); }
  static KD_INLINE Mask greater(V a, V b) { return {a > b}; }
  static KD_INLINE Mask equal(V a, V b) { return {a == b}; }
  static KD_INLINE Mask is_nan(V a) { return {a != a}; }
  static KD_INLINE V max(V a, V b) { return select(greater(a, b), a, b); }  // b where either is NaN
  static KD_INLINE V round(V x) {  // |x| < 2^22
    const V magic = set(12582912);
    return (x + magic) - magic;
  }
  static KD_INLINE V power_of_two(V n) {  // -126 <= n <= 128
    return V((__builtin_convertvector(n, IntVector) + 127) << 23);
  }
  static KD_INLINE V abs(V x) { return V(IntVector(x) & 0x7fffffff); }
#endif
  static KD_INLINE Mask is_infinite(V x) { return equal(x, set(__builtin_inf())); }
  static KD_INLINE V min(V a, V b) { return select(greater(b, a), a, b); }

  struct Reduced {  // e^x = 2^n·(1 + r + phi)
    V n, r, phi;
  };
  static KD_INLINE Reduced reduce(V x) {
    Reduced e;
    e.n = round(x * kLog2e);
    e.r = (x - e.n * kLn2High) - e.n * kLn2Low;
    V q = set(kExp[5]);
    for (int i = 4; i >= 0; i--) q = q * e.r + kExp[i];
    e.phi = e.r * e.r * q;
    return e;
  }
  // e^x; 0 below the smallest normal number, at most 2^127. NaN stays NaN.
  static KD_INLINE V exp(V x) {
    const Reduced e = reduce(max(set(-87), min(set(88), x)));
    const V scale = power_of_two(e.n);
    return select(greater(set(-87), x), set(0), scale + scale * (e.r + e.phi));
  }
  // e^x - 1 and e^x - 1 - x, each accurate relative to itself.
  static KD_INLINE void expm1_and_phi(V x, V& em, V& phi) {
    const Reduced e = reduce(max(set(-87), min(set(88), x)));
    const V scale = power_of_two(e.n);
    em = scale * (e.r + e.phi) + (scale - 1);
    phi = select(equal(e.n, set(0)), e.phi, em - x);
  }
  // log(1 + w) and w - log(1 + w) for -1 <= w <= 0, each accurate relative to itself.
  static KD_INLINE void log1p_and_chi(V w, V& log1p, V& chi) {
    const V y = w + 1;
    // y = 2^n·m with sqrt(1/2) <= m < sqrt(2); at n = 0, f = w loses nothing to the addition.
    const IntVector bits = IntVector(y);
    const IntVector exponent = (bits - 0x3f3504f3) >> 23;
    const V n = __builtin_convertvector(exponent, V);
    const V m = V(bits - (exponent << 23));
    const Mask near = equal(n, set(0));
    const V f = select(near, w, m - 1);
    V p = set(kLog[9]);
    for (int i = 8; i >= 0; i--) p = p * f + kLog[i];
    const V f2p = f * f * p;
    const V far = select(greater(y, set(0)), n * kLn2High + (n * kLn2Low + (f - f2p)), set(-__builtin_inf()));
    log1p = select(near, w - f2p, far);
    chi = select(near, f2p, w - log1p);
  }
  static KD_INLINE double sum(V x) {
    double total = 0;
    for (int i = 0; i < lanes; i++) total += double(x[i]);
    return total;
  }
  static KD_INLINE float largest(V x) {
    float m = x[0];
    for (int i = 1; i < lanes; i++) m = x[i] > m ? x[i] : m;
    return m;
  }
};

struct DoubleMath {
  using Real = double;
  using V = double;
  using Mask = bool;
  static constexpr int lanes = 1;
  static V set(double x) { return x; }
  static V load(const double* p) { return *p; }
  static void store(double* p, V x) { *p = x; }
  static V select(Mask m, V a, V b) { return m ? a : b; }
  static Mask greater(V a, V b) { return a > b; }
  static Mask is_nan(V a) { return a != a; }
  static Mask is_infinite(V a) { return a == __builtin_inf(); }
  static V max(V a, V b) { return a > b ? a : b; }
  static V abs(V x) { return std::fabs(x); }
  static V exp(V x) { return std::exp(x); }
  static void expm1_and_phi(V x, V& em, V& phi) {
    em = std::expm1(x);
    // em - x cancels near 0: the series instead, to 1e-17 of the first term at |x| = 1/8
    if (std::fabs(x) < 0.125) {
      V term = x * x / 2;
      phi = term;
      for (int i = 3; i < 14; i++) phi += term *= x / i;
    } else {
      phi = em - x;
    }
  }
  static void log1p_and_chi(V w, V& log1p, V& chi) {
    log1p = std::log1p(w);
    if (std::fabs(w) < 0.125) {
      V power = w * w;
      chi = power / 2;
      for (int i = 3; i < 20; i++) chi += (power *= -w) / i;
    } else {
      chi = w - log1p;
    }
  }
  static double sum(V x) { return x; }
  static double largest(V x) { return x; }
};

}  // namespace
}  // namespace kdkernels
