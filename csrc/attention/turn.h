// Rotary embedding of a row on the CPU (Su et al. 2021, arXiv:2104.09864): a pair (a, b) of features becomes
// (a cos - b sin, b cos + a sin).
#pragma once

#include <algorithm>

#include "common/lanes.h"
#include "common/tensor.h"

namespace nnfast::cpu {

// As many elements as a vector of their arithmetic's type has lanes, in their order.
template <class T, int bytes>
struct InOrder {
  using V = typename VectorOf<typename Scalar<T>::Compute, bytes>::type;
  using Bits = typename Lanes<V>::Bits;
  using Narrow = typename VectorOf<uint16_t, bytes / 2>::type;

  static NNFAST_INLINE V from(const T* x) {
    if constexpr (std::is_same_v<T, BFloat16>)
      return host::bfloat16_to_float<V>(__builtin_convertvector(load<Narrow>(x), Bits));
    else
      return Pack<T, bytes>::load(x).part[0];
  }

  static NNFAST_INLINE void to(T* y, V value) {
    if constexpr (std::is_same_v<T, BFloat16>)
      store(y, __builtin_convertvector(host::round_to_bfloat16<Bits>(value) >> 16, Narrow));
    else
      Pack<T, bytes>{{value}}.template store<false>(y);
  }
};

// Of a row of `head` features the first 2 * half turn in pairs, neighbours or with `half` between, and what
// is left is copied. Cosines and sines lie side by side. back: the other way
template <class T, bool back = false>
struct Turn {
  using Compute = typename Scalar<T>::Compute;
  int64_t head, half;
  bool interleaved;

  template <int bytes>
  NNFAST_INLINE void run(const T* from, int64_t from_step, const Compute* c, const Compute* s, T* to,
                         int64_t to_step) const {
    constexpr int lanes = bytes / sizeof(Compute);
    const bool dense = from_step == 1 && to_step == 1;
    int64_t i = 0;
    if (dense)
      for (; i + lanes <= half; i += lanes)
        interleaved ? neighbours<bytes>(from + 2 * i, c + i, s + i, to + 2 * i)
                    : halves<bytes>(from + i, c + i, s + i, to + i);
    for (; i < half; ++i) {
      const int64_t first = interleaved ? 2 * i : i, second = interleaved ? first + 1 : i + half;
      const Compute a = Scalar<T>::load(from[first * from_step]),
                    b = Scalar<T>::load(from[second * from_step]);
      const Compute by_sin = back ? -s[i] : s[i];
      to[first * to_step] = Scalar<T>::store(a * c[i] - b * by_sin);
      to[second * to_step] = Scalar<T>::store(b * c[i] + a * by_sin);
    }
    if (dense)
      std::copy(from + 2 * half, from + head, to + 2 * half);
    else
      for (i = 2 * half; i < head; ++i) to[i * to_step] = from[i * from_step];
  }

 private:
  template <class V>
  static NNFAST_INLINE V sines(const Compute* s) {
    return back ? -load<V>(s) : load<V>(s);
  }

  template <int bytes>
  NNFAST_INLINE void halves(const T* from, const Compute* c, const Compute* s, T* to) const {
    using Some = InOrder<T, bytes>;
    using V = typename Some::V;
    const V a = Some::from(from), b = Some::from(from + half), by_cos = load<V>(c), by_sin = sines<V>(s);
    Some::to(to, a * by_cos - b * by_sin);
    Some::to(to + half, b * by_cos + a * by_sin);
  }

  template <int bytes>
  NNFAST_INLINE void neighbours(const T* from, const Compute* c, const Compute* s, T* to) const {
    using Some = InOrder<T, bytes>;
    using V = typename Some::V;
    using Bits = typename Some::Bits;
    constexpr int lanes = bytes / sizeof(Compute);
    const Bits lane = iota<Bits>(), of_second = (lane & 1) * lanes;
    const V low = Some::from(from), high = Some::from(from + lanes);
    const V a = __builtin_shuffle(low, high, lane * 2), b = __builtin_shuffle(low, high, lane * 2 + 1);
    const V by_cos = load<V>(c), by_sin = sines<V>(s);
    const V first = a * by_cos - b * by_sin, second = b * by_cos + a * by_sin;
    Some::to(to, __builtin_shuffle(first, second, (lane >> 1) + of_second));
    Some::to(to + lanes, __builtin_shuffle(first, second, (lane >> 1) + lanes / 2 + of_second));
  }
};

// Cosines or sines of an operation on x: (N, H, L, D), checked and as `Turn` takes them.
inline Tensor angles(const char* op, const char* name, const Tensor& x, const Tensor& given, int64_t places) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(given.scalar_type() == dtype, op, ": ", name, " has dtype ", describe(given.scalar_type()),
        "; it needs ", describe(dtype));
  const int64_t sizes[] = {x.size(0), x.size(1), places};
  bool fits = given.dim() == 4 && 2 * given.size(3) <= x.size(3);
  for (int i = 0; fits && i < 3; ++i) fits = given.size(i) == 1 || given.size(i) == sizes[i];
  check(fits, op, ": ", name, " has shape ", describe(given.sizes()), "; it needs (", sizes[0], ", ",
        sizes[1], ", ", places, ", up to ", x.size(3) / 2, "), or 1 in place of the first three");
  return given.size(3) < 2 || given.stride(3) == 1 ? given : torch::stable::contiguous(given);
}

}  // namespace nnfast::cpu
