// The number types a sweep computes with: a SIMD register of floats as wide as this translation unit's instruction
// set allows, and a double for fp64 input. Everything sits in an unnamed namespace: this header is compiled once per
// instruction set, and the linker must never pick another set's copy of a function.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../divergence/inline.h"
#include "../divergence/polynomials.h"

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

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n·kLn2High is exact for |n| < 2^9

#if defined(__AVX512F__)
// Of 2^(i/16) the bits less those that adding i to the exponent puts beneath it.
struct SixteenthBits {
  alignas(64) int32_t of[16];
  constexpr SixteenthBits() : of{} {
    for (int i = 0; i < 16; i++) of[i] = std::bit_cast<int32_t>(kSixteenths[i]) - (i << 19);
  }
};
constexpr SixteenthBits kSixteenthBits;
#endif

struct SimdMath {
  using Real = float;
  using V = FloatVector;
  static constexpr int lanes = kLanes;

  static KD_INLINE V set(double x) { return V{} + float(x); }
  static KD_INLINE V load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
  static KD_INLINE void store(float* p, V x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }
  // Past the caches, p aligned to a register.
  static KD_INLINE void stream(float* p, V x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, __m512(x));
#elif defined(__AVX2__)
    _mm256_stream_ps(p, __m256(x));
#else
    store(p, x);
#endif
  }
  static KD_INLINE void fence() {  // orders streamed stores before whatever tells other threads of them
#if defined(__AVX2__)
    _mm_sfence();
#endif
  }

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
  static KD_INLINE bool any(Mask m) {
#if defined(__AVX512F__)
    return m.bits != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(__m256(m.bits)) != 0;
#else
    int32_t all = 0;
    for (int i = 0; i < lanes; i++) all |= m.bits[i];
    return all != 0;
#endif
  }
  static KD_INLINE Mask is_infinite(V x) { return equal(x, set(__builtin_inf())); }
  static KD_INLINE V min(V a, V b) { return select(greater(b, a), a, b); }

  struct Exponential {
    V e, em, phi;  // e^x, e^x - 1, e^x - 1 - x
  };
  // 2^x for x <= 0; 0 below the smallest normal number. NaN stays NaN.
  static KD_INLINE V exp2_nonpositive(V x) {
#if defined(__AVX512F__)
    const V clamped = max(set(-126), x);  // a result that underflows would cost some 100 cycles
    const V n = round(clamped);
    const __mmask16 zero = _mm512_cmp_ps_mask(__m512(x), __m512(set(-126)), _CMP_LT_OQ);
    return V(_mm512_maskz_scalef_ps(__mmask16(~zero), __m512(exp2_fraction(clamped - n)), __m512(n)));
#else
    const V clamped = max(set(-126), x);
    const V n = round(clamped);
    return select(greater(set(-126), x), set(0), exp2_fraction(clamped - n) * power_of_two(n));
#endif
  }
  static KD_INLINE V exp2_fraction(V f) {
    V p = set(kExp2[5]);
    for (int i = 4; i >= 0; i--) p = p * f + kExp2[i];
    return p * f + 1;
  }
  // 2^((x - max)·scale) for many x, none of them above max: exp2_nonpositive in fewer instructions. 0 below 2^-100,
  // so that a factor can still be multiplied in.
  struct PowersBelow {
    V max, scale, least;
    KD_INLINE PowersBelow(double max, double scale) : max(set(max)), scale(set(scale)), least(set(-100 / scale)) {}
#if defined(__AVX512F__)
    // 2^(n/16)·2^f
    KD_INLINE V operator()(V x) const {
      const V below = x - max, clamped = SimdMath::max(least, below);
      const V shifted = clamped * scale + 786432.0f;  // 1.5·2^19: sixteenths in the low bits
      const V f = clamped * scale - (shifted - 786432.0f);
      const IntVector n = IntVector(shifted);
      const __m512i entry = _mm512_permutexvar_epi32(__m512i(n), _mm512_load_si512(kSixteenthBits.of));
      const V power = V(IntVector(entry) + (n << 19));
      const V p = (f * kExp2Short[2] + kExp2Short[1]) * f + kExp2Short[0];
      const __mmask16 counts = _mm512_cmp_ps_mask(__m512(below), __m512(least), _CMP_NLT_UQ);
      return V(_mm512_maskz_fmadd_ps(counts, __m512(power * f), __m512(p), __m512(power)));
    }
#else
    KD_INLINE V operator()(V x) const {
      const V below = x - max, n = round(SimdMath::max(least, below) * scale);
      const V f = SimdMath::max(least, below) * scale - n;
      return select(greater(least, below), set(0), exp2_fraction(f) * power_of_two(n));
    }
#endif
  };
  // e^x for any x; at most 2^127.
  static KD_INLINE V exp(V x) {
    const V y = x * kLog2e;
    const V clamped = max(set(-126), min(set(127), y));
    const V n = round(clamped);
    return select(greater(set(-126), y), set(0), exp2_fraction(clamped - n) * power_of_two(n));
  }
  // e^x, e^x - 1 and e^x - 1 - x, each accurate relative to itself, for x <= 0; of any sign (to e^88) if AnySign.
  template <bool AnySign = false>
  static KD_INLINE Exponential exponential(V x) {
    Exponential out;
#if defined(__AVX512F__)
    V clamped = max(set(-140), x);  // e^-140 rounds to 0
#else
    V clamped = max(set(-87), x);
#endif
    if constexpr (AnySign) clamped = min(set(88), clamped);
    const V n = round(clamped * kLog2e);
#if defined(__FMA__)
    const V r = clamped - n * 0.693147182f;  // the product is exact inside the FMA; n·2e-9 is left of ln 2 itself
#else
    const V r = (clamped - n * kLn2High) - n * kLn2Low;
#endif
    V q = set(kExp[5]);
    for (int i = 4; i >= 0; i--) q = q * r + kExp[i];
    const V phi_r = r * r * q, t = r + phi_r, scale = power_of_two(n);
    out.e = scale * t + scale;
#if !defined(__AVX512F__)
    out.e = select(greater(set(-87), x), set(0), out.e);
#endif
    out.em = scale * t + (scale - 1);
    out.phi = select(equal(n, set(0)), phi_r, out.em - x);
    return out;
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
    V p = set(kLog[8]);
    for (int i = 7; i >= 0; i--) p = p * f + kLog[i];
    const V f2p = f * f * p;
    const V far = select(greater(y, set(0)), n * kLn2High + (n * kLn2Low + (f - f2p)), set(-__builtin_inf()));
    log1p = select(near, w - f2p, far);
    chi = select(near, f2p, w - log1p);
  }
  static KD_INLINE double sum(V x) {
#if defined(__AVX512F__)
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(__m512(x)));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(__m512(x), 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
#endif
    double total = 0;
    for (int i = 0; i < lanes; i++) total += double(x[i]);
    return total;
  }
  static KD_INLINE float largest(V x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(__m512(x));
#endif
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
  static void stream(double* p, V x) { *p = x; }
  static void fence() {}
  static V select(Mask m, V a, V b) { return m ? a : b; }
  static Mask greater(V a, V b) { return a > b; }
  static Mask is_nan(V a) { return a != a; }
  static bool any(Mask m) { return m; }
  static Mask is_infinite(V a) { return a == __builtin_inf(); }
  static V max(V a, V b) { return a > b ? a : b; }
  static V abs(V x) { return std::fabs(x); }
  static V exp2_nonpositive(V x) { return std::exp2(x); }
  struct PowersBelow {
    double max, scale;
    double operator()(double x) const { return std::exp2((x - max) * scale); }
  };
  static V exp(V x) { return std::exp(x); }
  struct Exponential {
    V e, em, phi;
  };
  template <bool AnySign = false>
  static Exponential exponential(V x) {
    Exponential out{std::exp(x), std::expm1(x), 0};
    if (std::fabs(x) < 0.125) {  // e^x - 1 - x cancels: the series, to 1e-17 of its first term
      V term = x * x / 2;
      out.phi = term;
      for (int i = 3; i < 14; i++) out.phi += term *= x / i;
    } else {
      out.phi = out.em - x;
    }
    return out;
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
