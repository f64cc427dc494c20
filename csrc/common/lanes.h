// What is done with a vector's lanes: loads and stores, folds across, transposition.
#pragma once

#include <cstring>

#include "common/cpu.h"

namespace nnfast::cpu {

template <class V, class Element>
NNFAST_INLINE V load(const Element* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class Element>
NNFAST_INLINE void store(Element* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// `fold` over the lanes of a vector.
template <class V, class Fold>
NNFAST_INLINE auto across(V value, const Fold& fold) {
  using Element = typename Lanes<V>::Element;
  if constexpr (sizeof(V) > 16) {
    typename VectorOf<Element, sizeof(V) / 2>::type halves[2];
    std::memcpy(halves, &value, sizeof(V));
    return across(fold(halves[0], halves[1]), fold);
  } else {
    Element result = value[0];
    for (size_t lane = 1; lane < sizeof(V) / sizeof(Element); ++lane) result = fold(result, value[lane]);
    return result;
  }
}

// 0, 1, 2, ... as a vector.
template <class Bits>
NNFAST_INLINE Bits iota() {
  Bits result = {};
  for (size_t lane = 0; lane < sizeof(Bits) / sizeof(typename Lanes<Bits>::Element); ++lane)
    result[lane] = lane;
  return result;
}

// Swaps rows and columns of squares of 2 * distance lanes and as many vectors, side by side in them.
template <int distance, int count = 2 * distance, class V>
NNFAST_INLINE void transpose(V* rows) {
  constexpr int n = sizeof(V) / sizeof(typename Lanes<V>::Element);
  if constexpr (distance > 0) {
    using Bits = typename Lanes<V>::Bits;
    const Bits lane = iota<Bits>();
    const Bits upper = lane & distance;
    for (int i = 0; i < count; ++i) {
      if (i & distance) continue;
      const V a = rows[i], b = rows[i + distance];
      rows[i] = __builtin_shuffle(a, b, upper == 0 ? lane : lane - distance + n);
      rows[i + distance] = __builtin_shuffle(a, b, upper == 0 ? lane + distance : lane + n);
    }
    transpose<distance / 2, count>(rows);
  }
}

#if defined(__x86_64__)
// Four floats from each of four places, `step` apart. By hand: its intrinsics would tie a template to one
// instruction set.
template <class V>
NNFAST_INLINE V gathered_quarters(const float* from, int64_t step) {
  using Quarter = const float[4];
  V result;
  asm("vmovups %1, %x0\n\tvinsertf32x4 $1, %2, %0, %0\n\t"
      "vinsertf32x4 $2, %3, %0, %0\n\tvinsertf32x4 $3, %4, %0, %0"
      : "=&v"(result)
      : "m"(*reinterpret_cast<Quarter*>(from)), "m"(*reinterpret_cast<Quarter*>(from + step)),
        "m"(*reinterpret_cast<Quarter*>(from + 2 * step)), "m"(*reinterpret_cast<Quarter*>(from + 3 * step)));
  return result;
}
#endif

}  // namespace nnfast::cpu
