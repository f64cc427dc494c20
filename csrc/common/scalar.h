// The four element types and how each is computed with: `Scalar<T>::Compute` is the type of the arithmetic,
// `Scalar<T>::Math` its elementary functions, `load` and `store` convert. Half and BFloat16 are plain 16-bit
// patterns here, so that host loops over them vectorise and one name serves host and device.
#pragma once

#include <cstdint>

#include "common/elementary.h"
#include "common/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace nnfast {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

namespace host {

// From and to 16-bit patterns held in 32-bit lanes. Bits is uint32_t or a vector of it, Float the float of
// that shape.
template <class Float, class Bits>
NNFAST_INLINE Float half_to_float(Bits half) {
  const Bits sign = (half & 0x8000u) << 16;
  const Bits magnitude = (half & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127, denormals included; infinity and NaN need their exponent
  // filled.
  const Bits scaled = __builtin_bit_cast(Bits, __builtin_bit_cast(Float, magnitude) * 0x1p112f);
  return __builtin_bit_cast(Float, (magnitude >= 0x0f800000u ? scaled | 0x7f800000u : scaled) | sign);
}

template <class Bits, class Float>
NNFAST_INLINE Bits float_to_half(Float value) {
  const Bits bits = __builtin_bit_cast(Bits, value);
  const Bits sign = bits & 0x80000000u;
  const Bits magnitude = bits ^ sign;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 0.5 rounds to the spacing of half denormals.
  const Bits denormal = __builtin_bit_cast(Bits, __builtin_bit_cast(Float, magnitude) + 0.5f) - 0x3f000000u;
  Bits half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u ? Bits{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  return half | (sign >> 16);
}

template <class Float, class Bits>
NNFAST_INLINE Float bfloat16_to_float(Bits bfloat16) {
  return __builtin_bit_cast(Float, bfloat16 << 16);
}

// The bfloat16 is the upper half of the result.
template <class Bits, class Float>
NNFAST_INLINE Bits round_to_bfloat16(Float value) {
  const Bits bits = __builtin_bit_cast(Bits, value);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? Bits{} + 0x7fc00000u : rounded;
}

}  // namespace host

template <class T>
struct Scalar {
  using Compute = T;
  using Math = Precise;
  static NNFAST_INLINE T load(T value) { return value; }
  static NNFAST_INLINE T store(T value) { return value; }
};

template <>
struct Scalar<Half> {
  using Compute = float;
  using Math = Fast;
#if defined(__CUDA_ARCH__)
  static NNFAST_INLINE float load(Half value) { return __half2float(__ushort_as_half(value.bits)); }
  static NNFAST_INLINE Half store(float value) { return {__half_as_ushort(__float2half_rn(value))}; }
#else
  static NNFAST_INLINE float load(Half value) { return host::half_to_float<float>(uint32_t(value.bits)); }
  static NNFAST_INLINE Half store(float value) { return {uint16_t(host::float_to_half<uint32_t>(value))}; }
#endif
};

template <>
struct Scalar<BFloat16> {
  using Compute = float;
  using Math = Fast;
#if defined(__CUDA_ARCH__)
  static NNFAST_INLINE float load(BFloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
  static NNFAST_INLINE BFloat16 store(float value) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  }
#else
  static NNFAST_INLINE float load(BFloat16 value) {
    return host::bfloat16_to_float<float>(uint32_t(value.bits));
  }
  static NNFAST_INLINE BFloat16 store(float value) {
    return {uint16_t(host::round_to_bfloat16<uint32_t>(value) >> 16)};
  }
#endif
};

}  // namespace nnfast
