// Products of matrices that lie in a core's caches, in blocks held in registers (Goto and van de Geijn 2008):
// what larger operations on the CPU are made of. One of them runs on one thread.
#pragma once

#include <utility>

#include "common/cpu.h"

namespace nnfast::cpu {

// How wide a panel of b is, and how many rows of c are made at once: all of c's block, two vectors of b and
// one of a in registers.
template <class T, int bytes>
struct GemmShape {
  static constexpr int lanes = bytes / sizeof(T), panel = 2 * lanes;
  static constexpr int rows = bytes == 64 ? 14 : 6;
};

// c (+)= a b, for a of (m, k) at any strides and c of (m, n) at row stride c_row with n rounded up to whole
// panels (what lies beyond n is written too). b of (k, n) is packed: panel after panel of (k, panel), zeros
// beyond n (see `pack`). k is best a few hundred at most: a panel of b then stays in the first cache.
template <class T>
struct Gemm {
  int64_t m, n, k;
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  T* c;
  int64_t c_row;
  bool add;             // to what is in c
  int64_t b_panel = 0;  // from a panel to the next, if they do not follow each other

  template <int bytes>
  NNFAST_INLINE void run(int64_t, int64_t) const {
    using S = GemmShape<T, bytes>;
    const int64_t step = b_panel ? b_panel : k * S::panel;
    for (int64_t j = 0; j * S::panel < n; ++j) {
      const T* from = a;
      T* to = c + j * S::panel;
      int64_t left = m;
      for (; left >= S::rows; left -= S::rows, from += S::rows * a_row, to += S::rows * c_row)
        block<bytes, S::rows>(from, b + j * step, to);
      rest<bytes>(left, from, b + j * step, to, std::make_integer_sequence<int, S::rows - 1>());
    }
  }

 private:
  template <int bytes, int... i>
  NNFAST_INLINE void rest(int64_t left, const T* from, const T* panel, T* to,
                          std::integer_sequence<int, i...>) const {
    (void)((left == i + 1 ? (block<bytes, i + 1>(from, panel, to), true) : false) || ...);
  }

  template <int bytes, int rows>
  NNFAST_INLINE void block(const T* from, const T* panel, T* to) const {
    if (a_column == 1)
      block<bytes, rows>(from, a_row, 1, panel, to);
    else if (a_row == 1)
      block<bytes, rows>(from, 1, a_column, panel, to);
    else
      block<bytes, rows>(from, a_row, a_column, panel, to);
  }

  template <int bytes, int rows>
  NNFAST_INLINE void block(const T* from, int64_t row, int64_t column, const T* panel, T* to) const {
    using V = typename VectorOf<T, bytes>::type;
    constexpr int lanes = GemmShape<T, bytes>::lanes;
    const auto load = [](const T* at) {
      V vector;
      std::memcpy(&vector, at, sizeof(V));
      return vector;
    };
    V even[rows], odd[rows];  // unrolled, so that they are in registers
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) even[r] = odd[r] = V{};
    for (int64_t i = k; i > 0; --i, from += column, panel += 2 * lanes) {
      const V first = load(panel), second = load(panel + lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const T left = from[r * row];
        even[r] += left * first;
        odd[r] += left * second;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r, to += c_row) {
      const V first = add ? load(to) + even[r] : even[r], second = add ? load(to + lanes) + odd[r] : odd[r];
      std::memcpy(to, &first, sizeof(V));
      std::memcpy(to + lanes, &second, sizeof(V));
    }
  }
};

// b of (k, n), at any strides, as `Gemm` takes it: `to` has room for whole panels.
template <class T, int bytes>
NNFAST_INLINE void pack(const T* b, int64_t k, int64_t n, int64_t row, int64_t column, T* to) {
  constexpr int panel = GemmShape<T, bytes>::panel;
  for (int64_t j = 0; j < n; j += panel, to += k * panel) {
    const int64_t there = n - j < panel ? n - j : panel;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t l = 0; l < panel; ++l) to[i * panel + l] = l < there ? b[i * row + (j + l) * column] : T{};
  }
}

// Runs a loop's body where code of this vector width is running already, without inlining it there.
template <int bytes, class Loop>
NNFAST_INLINE void within(const Loop& loop, int64_t begin = 0, int64_t end = 0) {
#if defined(__x86_64__)
  if constexpr (bytes == 64) return run_avx512(loop, begin, end);
  if constexpr (bytes == 32) return run_avx2(loop, begin, end);
#endif
  if constexpr (bytes == 16) loop.template run<bytes>(begin, end);
}

}  // namespace nnfast::cpu
