// exp, log and log1p for host and device. `Precise` is good to about one unit in the last place of T; `Fast`
// to the precision of a half type. On the host T is float, double or a vector of them, and all is
// straight-line code: Cody-Waite reduction and a minimax polynomial. e^x = 2^n e^r with n = round(x / ln 2),
// |r| <= ln(2) / 2; log(2^n (1 + f)) = n ln 2 + 2 atanh(f / (2 + f)) with 1 + f between sqrt(1/2) and sqrt(2)
// (fdlibm).
#pragma once

#include <cstdint>
#include <limits>
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

// AVX-512 multiplies by a power of two in one instruction, denormals and infinity included.
template <class T>
constexpr bool has_scale =
#if defined(__x86_64__) && !defined(__CUDACC__)
    sizeof(T) == 64;
#else
    false;
#endif

// p * 2^n. By hand: its intrinsic would tie this template to one instruction set.
template <class T>
NNFAST_INLINE T scale(T p, T n) {
  T result = p;
#if defined(__x86_64__) && !defined(__CUDACC__)
  if constexpr (sizeof(typename Lanes<T>::Element) == 8)
    asm("vscalefpd %2, %1, %0" : "=v"(result) : "v"(p), "v"(n));
  else
    asm("vscalefps %2, %1, %0" : "=v"(result) : "v"(p), "v"(n));
#endif
  return result;
}

template <class T>
struct ExpConstants;

// Clamping x keeps n plus the exponent bias within the exponent's bits: 2^n is 0 below the normal range and
// infinity above it, within one binade of where e^x itself gets there. round_magic is 1.5 * 2^(mantissa
// bits): a sum with it holds round(x) in its low bits.
template <>
struct ExpConstants<float> {
  static constexpr float lowest = -88.0f, highest = 88.7f, round_magic = 12582912.0f, log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest_with_denormals = -110.0f, beyond_highest = 89.0f;
  static constexpr int bias = 127, mantissa_bits = 23;
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -709.0, highest = 709.7, round_magic = 6755399441055744.0;
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest_with_denormals = -750.0, beyond_highest = 710.0;
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

// e^x = p 2^n, p = 1 + over_one; the low bits of shifted are n.
template <class T>
struct Power {
  T p, over_one, n, shifted;

  // 2^n, where that is a normal number.
  NNFAST_INLINE T two_to_n() const {
    using Constants = ExpConstants<typename Lanes<T>::Element>;
    using Bits = typename Lanes<T>::Bits;
    return __builtin_bit_cast(T, (__builtin_bit_cast(Bits, shifted) + Constants::bias)
                                     << Constants::mantissa_bits);
  }

  // p 2^n, where that is a normal number: n is added to the exponent.
  NNFAST_INLINE T raised() const {
    using Constants = ExpConstants<typename Lanes<T>::Element>;
    using Bits = typename Lanes<T>::Bits;
    return __builtin_bit_cast(
        T, __builtin_bit_cast(Bits, p) + (__builtin_bit_cast(Bits, shifted) << Constants::mantissa_bits));
  }
};

// Of vectors side by side, a step of all before the next: each waits for the one before it, and processors
// do not look far enough ahead for those of other vectors.
template <int count, class T, class Element, int terms>
NNFAST_INLINE void power(const T (&x)[count], const Element (&polynomial)[terms], Power<T> (&to)[count]) {
  using Constants = ExpConstants<Element>;
  T r[count], p[count];
  for (int i = 0; i < count; ++i) to[i].shifted = x[i] * Constants::log2_e + Constants::round_magic;
  for (int i = 0; i < count; ++i) to[i].n = to[i].shifted - Constants::round_magic;
  for (int i = 0; i < count; ++i) r[i] = x[i] - to[i].n * Constants::ln2_high;
  for (int i = 0; i < count; ++i) r[i] = r[i] - to[i].n * Constants::ln2_low;
  for (int i = 0; i < count; ++i) p[i] = T{} + polynomial[0];
  for (int term = 1; term < terms; ++term)
    for (int i = 0; i < count; ++i) p[i] = p[i] * r[i] + polynomial[term];
  for (int i = 0; i < count; ++i) p[i] = p[i] * r[i] + 1;
  for (int i = 0; i < count; ++i) to[i].p = p[i] * r[i] + 1, to[i].over_one = p[i] * r[i];
}

template <class T, class Element, int terms>
NNFAST_INLINE Power<T> power(T x, const Element (&polynomial)[terms]) {
  const T one[1] = {x};
  Power<T> to[1];
  power(one, polynomial, to);
  return to[0];
}

// With `bounded`, x is no more than `highest`.
template <bool bounded, class T, class Element, int terms>
NNFAST_INLINE T exp(T x, const Element (&polynomial)[terms]) {
  using Constants = ExpConstants<Element>;
  constexpr bool scales = has_scale<T>;
  if constexpr (!bounded) x = min(T{} + (scales ? Constants::beyond_highest : Constants::highest), x);
  x = max(T{} + (scales ? Constants::lowest_with_denormals : Constants::lowest), x);
  const Power<T> power = host::power(x, polynomial);
  if constexpr (scales)
    return scale(power.p, power.n);
  else
    return power.p * power.two_to_n();
}

template <class T>
struct LogConstants;

// sqrt_half: the bits of sqrt(1/2). integer_bits, or-ed to an integer below 2^mantissa_bits, makes a float of
// integer + 2^mantissa_bits.
template <>
struct LogConstants<float> {
  static constexpr uint32_t one = 0x3f800000, sqrt_half = 0x3f3504f3, integer_bits = 0x4b000000;
  static constexpr float ln2_high = 6.9313812256e-1f, ln2_low = 9.0580006145e-6f;
  static constexpr float least_normal = 0x1p-126f, upscale = 0x1p25f, upscale_bits = 25;
  static constexpr int mantissa_bits = 23;
  static constexpr float zero_exponent = 0x1p23f + 127;
};

template <>
struct LogConstants<double> {
  static constexpr uint64_t one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr uint64_t integer_bits = 0x4330000000000000;
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double least_normal = 0x1p-1022, upscale = 0x1p54, upscale_bits = 54;
  static constexpr int mantissa_bits = 52;
  static constexpr double zero_exponent = 0x1p52 + 1023;
};

// 2 atanh(s) = 2 s + s z polynomial(z), z = s^2, highest power first.
inline constexpr float log_polynomial[] = {0.24279078841f, 0.28498786688f, 0.40000972152f, 0.66666662693f};
inline constexpr double log_polynomial_double[] = {
    1.479819860511658591e-1, 1.531383769920937332e-1, 1.818357216161805012e-1, 2.222219843214978396e-1,
    2.857142874366239149e-1, 3.999999999940941908e-1, 6.666666666666735130e-1};

template <class T, class Element, int terms>
NNFAST_INLINE T log(T x, const Element (&polynomial)[terms]) {
  using Constants = LogConstants<Element>;
  using Bits = typename Lanes<T>::Bits;
  const T normal = x < Constants::least_normal ? x * Constants::upscale : x;
  const Bits bits = __builtin_bit_cast(Bits, normal) + (Constants::one - Constants::sqrt_half);
  const Bits exponent = bits >> Constants::mantissa_bits;
  const T n = __builtin_bit_cast(T, exponent | Constants::integer_bits) - Constants::zero_exponent -
              (x < Constants::least_normal ? T{} + Constants::upscale_bits : T{});
  const T f = __builtin_bit_cast(T, bits - (exponent << Constants::mantissa_bits) + Constants::sqrt_half) - 1;
  const T s = f / (2 + f), z = s * s, half_square = Element(0.5) * f * f;
  T p = T{} + polynomial[0];
  for (int i = 1; i < terms; ++i) p = p * z + polynomial[i];
  const T result =
      s * (half_square + p * z) + n * Constants::ln2_low - half_square + f + n * Constants::ln2_high;
  constexpr Element infinity = std::numeric_limits<Element>::infinity();
  const T at_most_zero = x == Element(0) ? T{} - infinity : T{} + std::numeric_limits<Element>::quiet_NaN();
  return x > Element(0) ? (x < infinity ? result : x) : at_most_zero;
}

template <class T>
NNFAST_INLINE T log(T x) {
  if constexpr (std::is_same_v<typename Lanes<T>::Element, double>)
    return log(x, log_polynomial_double);
  else
    return log(x, log_polynomial);
}

// For x in [0, 1] s = x / (2 + x) is at most 1/3, and 2 s = x - s x.
inline constexpr float log1p_polynomial[] = {0.2802446485f, 0.2799913883f, 0.4002169967f, 0.6666641235f};

template <class T>
NNFAST_INLINE T log1p_unit(T x) {
  const T s = x / (2 + x), z = s * s;
  T p = T{} + log1p_polynomial[0];
  for (int i = 1; i < 4; ++i) p = p * z + log1p_polynomial[i];
  return x - s * (x - p * z);
}

// For finite x > -1/2: what rounding 1 + x lost comes back through the derivative.
template <class T>
NNFAST_INLINE T log1p(T x) {
  const T sum = 1 + x;
  return log(sum) + (x - (sum - 1)) / sum;
}

// log(1 + b / a) where a > b >= 0, else log(a + b), which must be normal: one quotient s for both, of which
// the logarithm is n ln 2 + 2 atanh(s).
template <class T>
NNFAST_INLINE T log_of_sum(T a, T b) {
  using Constants = LogConstants<float>;
  using Bits = typename Lanes<T>::Bits;
  const T sum = a + b;
  const Bits bits = __builtin_bit_cast(Bits, sum) + (Constants::one - Constants::sqrt_half);
  const Bits exponent = bits >> Constants::mantissa_bits;
  const T f = __builtin_bit_cast(T, bits - (exponent << Constants::mantissa_bits) + Constants::sqrt_half) - 1;
  T n = __builtin_bit_cast(T, exponent | Constants::integer_bits) - Constants::zero_exponent;
  n = a > b ? T{} : n;
  const T s = (a > b ? b : f) / (a > b ? sum + a : 2 + f), z = s * s;
  T p = T{} + log1p_polynomial[0];
  for (int i = 1; i < 4; ++i) p = p * z + log1p_polynomial[i];
  const T result = n * Constants::ln2_low + s * (2 + z * p) + n * Constants::ln2_high;
  return sum < std::numeric_limits<float>::infinity() ? result : sum;
}

}  // namespace host

// With `bounded`, exp takes an x that is at most 88 (or NaN).
struct Precise {
  template <bool bounded = false, class T>
  static NNFAST_INLINE T exp(T x) {
#if defined(__CUDA_ARCH__)
    return ::exp(x);
#else
    if constexpr (std::is_same_v<typename Lanes<T>::Element, double>)
      return host::exp<bounded>(x, host::exp_polynomial_double);
    else
      return host::exp<bounded>(x, host::exp_polynomial);
#endif
  }

#if !defined(__CUDA_ARCH__)
  template <class T>
  static NNFAST_INLINE host::Power<T> power(T x) {
    return host::power(x, polynomial<T>());
  }

  template <int count, class T>
  static NNFAST_INLINE void power(const T (&x)[count], host::Power<T> (&to)[count]) {
    host::power(x, polynomial<T>(), to);
  }

  template <class T>
  static constexpr const auto& polynomial() {
    if constexpr (std::is_same_v<typename Lanes<T>::Element, double>)
      return host::exp_polynomial_double;
    else
      return host::exp_polynomial;
  }
#endif

  template <class T>
  static NNFAST_INLINE T log(T x) {
#if defined(__CUDA_ARCH__)
    return ::log(x);
#else
    return host::log(x);
#endif
  }

  template <class T>
  static NNFAST_INLINE T log1p(T x) {
#if defined(__CUDA_ARCH__)
    return ::log1p(x);
#else
    return host::log1p(x);
#endif
  }

  // For x in [0, 1].
  template <class T>
  static NNFAST_INLINE T log1p_unit(T x) {
#if defined(__CUDA_ARCH__)
    return ::log1p(x);
#else
    if constexpr (std::is_same_v<typename Lanes<T>::Element, double>)
      return host::log1p(x);
    else
      return host::log1p_unit(x);
#endif
  }

  // log(1 + b / a) where a > b >= 0, else log(a + b).
  template <class T>
  static NNFAST_INLINE T log_of_sum(T a, T b) {
#if !defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<typename Lanes<T>::Element, float>) return host::log_of_sum(a, b);
#endif
    return log1p(a > b ? b / a : a + b - 1);
  }

  template <class T>
  static NNFAST_INLINE T divide(T a, T b) {
    return a / b;
  }
};

struct Fast {
  template <bool bounded = false, class T>
  static NNFAST_INLINE T exp(T x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return host::exp<bounded>(x, host::fast_exp_polynomial);
#endif
  }

  template <class T>
  static NNFAST_INLINE T log(T x) {
#if defined(__CUDA_ARCH__)
    return __logf(x);
#else
    return host::log(x);
#endif
  }

  // __logf is good to 4e-7 near 1, absolutely, so the series serves where the result is small.
  template <class T>
  static NNFAST_INLINE T log1p(T x) {
#if defined(__CUDA_ARCH__)
    return fabsf(x) < 0x1p-8f ? x * (1 - x * (0.5f - x * 0.333333343f)) : __logf(1 + x);
#else
    return host::log1p(x);
#endif
  }

  template <class T>
  static NNFAST_INLINE T log1p_unit(T x) {
#if defined(__CUDA_ARCH__)
    return log1p(x);
#else
    return host::log1p_unit(x);
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
