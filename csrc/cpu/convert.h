// Blocks of a row between memory and the sweep's own number type: the one place that knows of dtypes, transforms and
// tails. Plain loops, which the compiler vectorises for each instruction set.
#pragma once
#include "../rows.h"
#include "vector.h"

namespace kdkernels {
namespace {

constexpr int kBlock = 1024;  // columns; two rows, the gradient and a derivative of them stay in L1

KD_INLINE float half_to_float(uint16_t h) {
  // Shifts the exponent into place and rescales, so that subnormal halves come out right; then inf and NaN.
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &rest, 4);
  x *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits |= (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  bits |= sign;
  std::memcpy(&x, &bits, 4);
  return x;
}

KD_INLINE uint16_t float_to_half(float x) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  // Subnormal halves: adding 0.5 aligns the last kept bit with the end of the fraction, and rounds on the way.
  float y;
  std::memcpy(&y, &magnitude, 4);
  y += 0.5f;
  uint32_t small;
  std::memcpy(&small, &y, 4);
  small -= 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(sign | half);
}

KD_INLINE uint16_t float_to_bfloat16(float x) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0u : rounded);
}

KD_INLINE float bfloat16_to_float(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class Real>
void widen(const void* data, DType dtype, int64_t at, int n, Real* out) {
  switch (dtype) {
    case DType::float32: {
      const float* in = static_cast<const float*>(data) + at;
      for (int i = 0; i < n; i++) out[i] = Real(in[i]);
      break;
    }
    case DType::float64: {
      const double* in = static_cast<const double*>(data) + at;
      for (int i = 0; i < n; i++) out[i] = Real(in[i]);
      break;
    }
    case DType::bfloat16: {
      const uint16_t* in = static_cast<const uint16_t*>(data) + at;
      for (int i = 0; i < n; i++) out[i] = Real(bfloat16_to_float(in[i]));
      break;
    }
    case DType::float16: {
      const uint16_t* in = static_cast<const uint16_t*>(data) + at;
      int i = 0;
#if defined(__F16C__) || defined(__AVX512F__)
      if constexpr (sizeof(Real) == 4)
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
      for (; i < n; i++) out[i] = Real(half_to_float(in[i]));
      break;
    }
  }
}

template <class Real>
void narrow(const Real* in, int n, void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::float32: {
      float* out = static_cast<float*>(data) + at;
      for (int i = 0; i < n; i++) out[i] = float(in[i]);
      break;
    }
    case DType::float64: {
      double* out = static_cast<double*>(data) + at;
      for (int i = 0; i < n; i++) out[i] = double(in[i]);
      break;
    }
    case DType::bfloat16: {
      uint16_t* out = static_cast<uint16_t*>(data) + at;
      for (int i = 0; i < n; i++) out[i] = float_to_bfloat16(float(in[i]));
      break;
    }
    case DType::float16: {
      uint16_t* out = static_cast<uint16_t*>(data) + at;
      int i = 0;
#if defined(__F16C__) || defined(__AVX512F__)
      if constexpr (sizeof(Real) == 4)
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
      for (; i < n; i++) out[i] = float_to_half(float(in[i]));
      break;
    }
  }
}

inline void fill(void* data, DType dtype, int64_t at, int64_t n, bool with_nan) {
  const int64_t bytes = bytes_per_element(dtype);
  char* begin = static_cast<char*>(data) + at * bytes;
  if (!with_nan) {
    std::memset(begin, 0, size_t(n * bytes));
    return;
  }
  const double nan = __builtin_nan("");
  for (int64_t i = 0; i < n; i++) narrow(&nan, 1, data, dtype, at + i);
}

// x = softcap·tanh(scale·z / softcap) in place over whole registers, and dx/dz where `derivative` is not null.
template <class Math>
void transform_block(const Transform& t, int n, typename Math::Real* x, typename Math::Real* derivative) {
  using V = typename Math::V;
  const V scale = Math::set(t.logit_scale), one = Math::set(1);
  const bool capped = t.softcap > 0;
  const V cap = Math::set(capped ? t.softcap : 1), ratio = Math::set(capped ? t.logit_scale / t.softcap : 1);
  for (int i = 0; i < n; i += Math::lanes) {
    const V z = Math::load(x + i);
    if (!capped) {
      Math::store(x + i, scale * z);
      if (derivative) Math::store(derivative + i, scale);
      continue;
    }
    const V u = ratio * z;  // tanh|u| = (1 - e)/(1 + e), e = e^(-2|u|)
    const auto e = Math::exponential(Math::set(-2) * Math::abs(u));
    const V reciprocal = one / (one + e.e), magnitude = -e.em * reciprocal;
    Math::store(x + i, cap * Math::select(Math::greater(Math::set(0), u), -magnitude, magnitude));
    if (derivative) Math::store(derivative + i, scale * Math::set(4) * e.e * reciprocal * reciprocal);
  }
}

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Columns [column, column + n) of a row as numbers the sweep computes with, padded with -inf to whole registers: a
// pointer into the row itself where it can be, else into `scratch`.
template <class Math>
const typename Math::Real* read_block(const Logits& logits, int64_t row_offset, int64_t column, int n,
                                      typename Math::Real* scratch, typename Math::Real* derivative = nullptr) {
  using Real = typename Math::Real;
  const bool same_type = logits.dtype == (sizeof(Real) == 4 ? DType::float32 : DType::float64);
  if (same_type && n % Math::lanes == 0 && logits.transform.identity())
    return static_cast<const Real*>(logits.data) + row_offset + column;
  widen(logits.data, logits.dtype, row_offset + column, n, scratch);
  const int padded = round_up(n, Math::lanes);
  if (!logits.transform.identity()) {
    for (int i = n; i < padded; i++) scratch[i] = 0;
    transform_block<Math>(logits.transform, padded, scratch, derivative);
  }
  for (int i = n; i < padded; i++) scratch[i] = -__builtin_inf();
  return scratch;
}

}  // namespace
}  // namespace kdkernels
