// exp for host and device. `Precise` is good to about one unit in the last place of T; `Fast` to the
// precision of a half type. On the host T is float, double or a vector of them, and exp is straight-line
// code: Cody-Waite reduction and a minimax polynomial, e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2)
// / 2.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/macros.h"

namespace nnfast {

// Element and bit pattern of a scalar or of a vector (GCC's vector_size) of them.
template <class T>
struct Lanes {
  using Element = T;
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
};

template <class T>
  requires(sizeof(T) > 8)
struct Lanes<T> {
  using Element = std::remove_cvref_t<decltype(std::declval<T&>()[0])>;
  typedef typename Lanes<Element>::Bits Bits __attribute__((vector_size(sizeof(T))));
};

// NaN in b stays, NaN in a does not.
template <class T>
NNFAST_INLINE T min(T a, T b) {
  return a < b ? a : b;
}

template <class T>
NNFAST_INLINE T max(T a, T b) {
  return a > b ? a : b;
}

namespace host {

template <class T>
struct ExpConstants;

// Clamping x keeps n plus the exponent bias within the exponent's bits: 2^n is 0 below the normal range and
// infinity above it, within one binade of where e^x itself gets there. round_magic is 1.5 * 2^(mantissa
// bits): a sum with it holds round(x) in its low bits.
template <>
struct ExpConstants<float> {
  static constexpr float lowest = -88.0f, highest = 88.7f, round_magic = 12582912.0f, log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int bias = 127, mantissa_bits = 23;
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -709.0, highest = 709.7, round_magic = 6755399441055744.0;
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr int bias = 1023, mantissa_bits = 52;
};

// e^r = 1 + r + r^2 polynomial(r), highest power first.
inline constexpr float exp_polynomial[] = {1.381460212e-3f, 8.368715201e-3f, 4.166838788e-2f, 0.1666652065f,
                                           0.4999999345f};
inline constexpr float fast_exp_polynomial[] = {4.12776903e-2f, 0.1675352713f, 0.5000511756f};  // error 6e-6
inline constexpr double exp_polynomial_double[] = {
    2.50000641467544935e-8, 2.7630244936930766e-7,  2.75575863482709659e-6, 2.48014931077818596e-5,
    1.98412695066265242e-4, 1.38888889436223955e-3, 8.33333333349443103e-3, 4.16666666665301842e-2,
    0.166666666666664126,   0.500000000000001062};

template <class T, class Element, int terms>
NNFAST_INLINE T exp(T x, const Element (&polynomial)[terms]) {
  using Constants = ExpConstants<Element>;
  using Bits = typename Lanes<T>::Bits;
  x = max(T{} + Constants::lowest, min(T{} + Constants::highest, x));
  const T shifted = x * Constants::log2_e + Constants::round_magic;
  const T n = shifted - Constants::round_magic;
  const T scale = __builtin_bit_cast(T, (__builtin_bit_cast(Bits, shifted) + Constants::bias)
                                            << Constants::mantissa_bits);
  const T r = (x - n * Constants::ln2_high) - n * Constants::ln2_low;
  T p = T{} + polynomial[0];
  for (int i = 1; i < terms; ++i) p = p * r + polynomial[i];
  return (p * r * r + r + 1) * scale;
}

}  // namespace host

struct Precise {
  template <class T>
  static NNFAST_INLINE T exp(T x) {
#if defined(__CUDA_ARCH__)
    return ::exp(x);
#else
    if constexpr (std::is_same_v<typename Lanes<T>::Element, double>)
      return host::exp(x, host::exp_polynomial_double);
    else
      return host::exp(x, host::exp_polynomial);
#endif
  }

  template <class T>
  static NNFAST_INLINE T divide(T a, T b) {
    return a / b;
  }
};

struct Fast {
  template <class T>
  static NNFAST_INLINE T exp(T x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return host::exp(x, host::fast_exp_polynomial);
#endif
  }

  // On the device 0 where b is above 2^126.
  template <class T>
  static NNFAST_INLINE T divide(T a, T b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a, b);
#else
    return a / b;
#endif
  }
};

}  // namespace nnfast
