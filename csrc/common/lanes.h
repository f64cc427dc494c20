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

// Swaps rows and columns of a square of as many vectors as a vector has lanes; distance: half of that.
template <int distance, class V>
NNFAST_INLINE void transpose(V* rows) {
  constexpr int n = sizeof(V) / sizeof(typename Lanes<V>::Element);
  if constexpr (distance > 0) {
    using Bits = typename Lanes<V>::Bits;
    const Bits lane = iota<Bits>();
    const Bits upper = lane & distance;
    for (int i = 0; i < n; ++i) {
      if (i & distance) continue;
      const V a = rows[i], b = rows[i + distance];
      rows[i] = __builtin_shuffle(a, b, upper == 0 ? lane : lane - distance + n);
      rows[i + distance] = __builtin_shuffle(a, b, upper == 0 ? lane + distance : lane + n);
    }
    transpose<distance / 2>(rows);
  }
}

}  // namespace nnfast::cpu
