// Products of matrices that lie in a core's caches, in blocks held in registers (Goto and van de Geijn 2008):
// what larger operations on the CPU are made of. One of them runs on one thread.
#pragma once

#include <algorithm>
#include <utility>

#include "common/lanes.h"

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
// beyond n (see `pack_rows`). k is best a few hundred at most: a panel of b then stays in the first cache.
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
    V even[rows], odd[rows];  // unrolled, so that they are in registers
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) even[r] = odd[r] = V{};
    for (int64_t i = k; i > 0; --i, from += column, panel += 2 * lanes) {
      const V first = load<V>(panel), second = load<V>(panel + lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const T left = from[r * row];
        even[r] += left * first;
        odd[r] += left * second;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r, to += c_row) {
      store(to, add ? load<V>(to) + even[r] : even[r]);
      store(to + lanes, add ? load<V>(to + lanes) + odd[r] : odd[r]);
    }
  }
};

// Columns of x: (rows, columns) that a matrix needs whose panels are whole.
template <class T, int bytes>
NNFAST_INLINE int64_t whole_panels(int64_t columns) {
  constexpr int panel = GemmShape<T, bytes>::panel;
  return (columns + panel - 1) / panel * panel;
}

// V or T from memory, and what is added to column j on, if anything.
template <class V, class T>
NNFAST_INLINE V load_sum(const T* x, const T* added, int64_t j) {
  return added ? load<V>(x) + load<V>(added + j) : load<V>(x);
}

// x: (rows, columns), with a row `added` to each if that is not null, times a factor, as `Gemm` takes its b.
template <int bytes, class T>
NNFAST_INLINE void pack_rows(const T* x, int64_t row, int64_t column, int64_t rows, int64_t columns, T factor,
                             T* to, const T* added = nullptr) {
  using V = typename VectorOf<T, bytes>::type;
  constexpr int panel = GemmShape<T, bytes>::panel, lanes = panel / 2;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += panel) {
      const T* from = x + i * row + j * column;
      T* const here = to + j * rows + i * panel;
      if (column == 1 && j + panel <= columns) {
        store(here, load_sum<V>(from, added, j) * factor);
        store(here + lanes, load_sum<V>(from + lanes, added, j + lanes) * factor);
      } else {
        for (int64_t l = 0; l < panel; ++l)
          here[l] = j + l < columns ? load_sum<T>(from + l * column, added, j + l) * factor : T{};
      }
    }
}

// The transpose of x: (rows, columns), likewise.
template <int bytes, class T>
NNFAST_INLINE void pack_columns(const T* x, int64_t row, int64_t column, int64_t rows, int64_t columns,
                                T factor, T* to, const T* added = nullptr) {
  using V = typename VectorOf<T, bytes>::type;
  constexpr int panel = GemmShape<T, bytes>::panel, lanes = panel / 2;
  for (int64_t i = 0; i < whole_panels<T, bytes>(rows); i += lanes) {
    T* panel_of = to + i / panel * panel * columns + i % panel;
    const int64_t there = std::max<int64_t>(std::min<int64_t>(rows - i, lanes), 0);
    int64_t j = 0;
    if (column == 1 && there == lanes)
      for (; j + lanes <= columns; j += lanes) {
        V square[lanes];
        for (int l = 0; l < lanes; ++l) square[l] = load_sum<V>(x + (i + l) * row + j, added, j) * factor;
        transpose<lanes / 2>(square);
        for (int l = 0; l < lanes; ++l) store(panel_of + (j + l) * panel, square[l]);
      }
    for (; j < columns; ++j)
      for (int64_t l = 0; l < lanes; ++l)
        panel_of[j * panel + l] =
            l < there ? load_sum<T>(x + (i + l) * row + j * column, added, j) * factor : T{};
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
