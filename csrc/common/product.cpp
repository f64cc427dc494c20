// Products of large matrices on the CPU: a packed, and in blocks of it that stay in a core's second cache
// times panels of b that stay in the first (Goto and van de Geijn 2008).
#include <optional>

#include "common/gemm.h"
#include "common/tensor.h"

namespace nnfast::cpu {

// Summed over at once: a panel of b of that depth fills half of a first cache.
constexpr int64_t depth = 256;

// Bytes of b packed at once, for the last cache and not new from the system at every call, and depths of it
// at least, so that c does not come and go for each.
constexpr int64_t most_packed = 2 << 20, least_depths = 4;

// A matrix at any strides.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row, column;

  NNFAST_INLINE const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }

  // Rows and columns from i and j on.
  Matrix part(int64_t i, int64_t j, int64_t some_rows, int64_t some_columns) const {
    return {at(i, j), std::min(some_rows, rows - i), std::min(some_columns, columns - j), row, column};
  }
};

// b as `Gemm` takes it, a depth of it after another. begin, end: its panels
template <class T>
struct PackPanels {
  Matrix<T> b;
  T* to;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int panel = GemmShape<T, bytes>::panel;
    const int64_t width = whole_panels<T, bytes>(b.columns);
    const int64_t j = begin * panel, columns = std::min(end * panel, b.columns) - j;
    for (int64_t k = 0; k < b.rows; k += depth) {
      const int64_t rows = std::min(depth, b.rows - k);
      T* const here = to + k * width + j * rows;
      if (b.column == 1)
        pack_rows<bytes>(b.at(k, j), b.row, 1, rows, columns, T(1), here);
      else
        pack_columns<bytes>(b.at(k, j), b.column, b.row, columns, rows, T(1), here);
    }
  }
};

// c (+)= a b, or with a bias (columns,) added to each row. begin, end: bands of rows of each of some parts of
// the columns
template <class T>
struct Product {
  Matrix<T> a;
  const T* packed;  // b
  const T* bias;    // or null
  T* c;
  int64_t columns, c_row;
  bool add;
  int64_t bands, parts;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    using S = GemmShape<T, bytes>;
    constexpr int64_t most_bands = 96 / S::rows;
    const int64_t panels = (columns + S::panel - 1) / S::panel;
    const Scratch<T> rows(a.column == 1 ? 0 : most_bands * S::rows * depth),
        edge(most_bands * S::rows * S::panel);
    for (int64_t some; begin < end; begin += some) {
      const int64_t part = begin / bands, band = begin % bands;
      const int64_t left = std::min(end, (part + 1) * bands) - begin;
      const int64_t blocks = (left + most_bands - 1) / most_bands;
      some = (left + blocks - 1) / blocks;
      const int64_t i = band * S::rows;
      block<bytes>(i, std::min(some * S::rows, a.rows - i), part * panels / parts * S::panel,
                   std::min((part + 1) * panels / parts * S::panel, columns), rows, edge);
    }
  }

 private:
  // Rows from i on, columns from j to j_end.
  template <int bytes>
  NNFAST_INLINE void block(int64_t i, int64_t rows, int64_t j, int64_t j_end, T* of_a, T* edge) const {
    constexpr int64_t panel = GemmShape<T, bytes>::panel;
    const int64_t width = whole_panels<T, bytes>(columns), whole = (j_end - j) / panel * panel;
    const int64_t beyond = j_end - j - whole;  // columns of a panel that c has not all of
    T* const to = c + i * c_row + j;
    if (bias)
      for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * c_row, bias + j, (j_end - j) * sizeof(T));
    for (int64_t k = 0; k == 0 || k < a.columns; k += depth) {
      const int64_t sums = std::min(depth, a.columns - k);
      const T* from = a.at(i, k);
      int64_t step = a.row;
      if (a.column != 1) {
        copy_transposed<bytes>(from, a.row, a.column, rows, sums, of_a);
        from = of_a, step = sums;
      }
      const T* const b = packed + k * width + j * sums;
      within<bytes>(Gemm<T>{rows, whole, sums, from, step, 1, b, to, c_row, add || bias || k > 0});
      if (!beyond) continue;
      within<bytes>(Gemm<T>{rows, panel, sums, from, step, 1, b + whole * sums, edge, panel, k > 0});
    }
    for (int64_t r = 0; beyond && r < rows; ++r)
      for (int64_t l = 0; l < beyond; ++l) {
        T& sum = to[r * c_row + whole + l];
        sum = add || bias ? sum + edge[r * panel + l] : edge[r * panel + l];
      }
  }

  // a: (rows, columns) without gaps
  template <int bytes>
  static NNFAST_INLINE void copy_transposed(const T* from, int64_t row, int64_t column, int64_t rows,
                                            int64_t columns, T* to) {
    using V = typename VectorOf<T, bytes>::type;
    constexpr int lanes = bytes / sizeof(T);
    int64_t j = 0;
    if (row == 1)
      for (; j + lanes <= columns; j += lanes) {
        int64_t i = 0;
        for (; i + lanes <= rows; i += lanes) {
          V square[lanes];
          for (int l = 0; l < lanes; ++l) square[l] = load<V>(from + i + (j + l) * column);
          transpose<lanes / 2>(square);
          for (int l = 0; l < lanes; ++l) store(to + (i + l) * columns + j, square[l]);
        }
        for (; i < rows; ++i)
          for (int l = 0; l < lanes; ++l) to[i * columns + j + l] = from[i + (j + l) * column];
      }
    for (; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) to[i * columns + j] = from[i * row + j * column];
  }
};

// a b of few elements, in shares of what is summed. begin, end: shares
template <class T>
struct Shares {
  Matrix<T> a, b;
  int64_t shares;
  T* sums;  // (shares, rows of a, columns of b)

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int64_t panel = GemmShape<T, bytes>::panel, rows = GemmShape<T, bytes>::rows;
    const int64_t panels = (b.columns + panel - 1) / panel, bands = (a.rows + rows - 1) / rows;
    const Scratch<T> packed(depth * panels * panel);
    for (; begin < end; ++begin) {
      const int64_t first = begin * b.rows / shares, last = (begin + 1) * b.rows / shares;
      for (int64_t k = first; k < last; k += depth) {
        const int64_t some = std::min(depth, last - k);
        within<bytes>(PackPanels<T>{b.part(k, 0, some, b.columns), packed}, 0, panels);
        within<bytes>(
            Product<T>{a.part(0, k, a.rows, some), packed, nullptr, sums + begin * a.rows * b.columns,
                       b.columns, b.columns, k > first, bands, 1},
            0, bands);
      }
    }
  }
};

// Most elements of c that are summed in shares: they stay in a core's caches. Shares are as large for any
// number of threads, so that results are the same.
constexpr int64_t most_shared = 128 * 128, least_share = 2048, most_shares = 64;

// c (+)= a b, or plus a bias, which may be null, in shares of what is summed.
template <class T>
void multiply_shares(const Matrix<T>& a, const Matrix<T>& b, const T* bias, T* c, int64_t c_row, bool add) {
  const int64_t shares = std::min(b.rows / least_share, most_shares), size = a.rows * b.columns;
  const Scratch<T> sums(shares * size);
  parallel(shares, 1, Shares<T>{a, b, shares, sums});
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < b.columns; ++j) {
      T sum = add ? c[i * c_row + j] : bias ? bias[j] : T{};
      for (int64_t share = 0; share < shares; ++share) sum += sums[share * size + i * b.columns + j];
      c[i * c_row + j] = sum;
    }
}

// c (+)= a b, or plus a bias, which may be null.
template <class T>
void multiply_matrices(const Matrix<T>& a, const Matrix<T>& b, const T* bias, T* c, int64_t c_row, bool add) {
  const int64_t bytes = isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16;
  const int64_t panel = 2 * bytes / sizeof(T), threads = torch::stable::get_num_threads();
  if (a.rows * b.columns <= most_shared && b.rows >= 2 * least_share)
    return multiply_shares(a, b, bias, c, c_row, add);
  const int64_t rows = bytes == 64 ? GemmShape<T, 64>::rows : GemmShape<T, 32>::rows;
  const int64_t bands = (a.rows + rows - 1) / rows;
  const int64_t width = std::max<int64_t>((b.columns + panel - 1) / panel * panel, panel);
  const int64_t all = most_packed / sizeof(T);  // elements
  const int64_t deep =
      std::min(std::max(all / width / depth, least_depths) * depth, std::max<int64_t>(b.rows, 1));
  const int64_t wide = std::min(all / deep / panel * panel, width);
  const Scratch<T> packed(deep * wide);
  for (int64_t j = 0; j < b.columns; j += wide)
    for (int64_t k = 0; k == 0 || k < b.rows; k += deep) {
      const Matrix<T> some = b.part(k, j, deep, wide);
      const int64_t panels = (some.columns + panel - 1) / panel;
      parallel(panels, 1, PackPanels<T>{some, packed});
      const int64_t parts = std::clamp<int64_t>(8 * threads / bands, 1, panels);  // or threads had few bands
      parallel(bands * parts, 1,
               Product<T>{a.part(0, k, a.rows, deep), packed, bias && k == 0 ? bias + j : nullptr, c + j,
                          some.columns, c_row, add || k > 0, bands, parts});
    }
}

using Optional = std::optional<Tensor>;
constexpr const char* name = "product_";

template <class T>
Matrix<T> matrix(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

void product_(const Tensor& out, const Tensor& a, const Tensor& b, const Optional& bias, bool add) {
  for (const auto& [argument, x] : {std::pair("a", &a), std::pair("b", &b), std::pair("out", &out)})
    if (x->dim() != 2)
      fail(name, ": ", argument, " has shape ", describe(x->sizes()), "; it needs two dimensions");
  if (a.size(1) != b.size(0) || out.size(0) != a.size(0) || out.size(1) != b.size(1))
    fail(name, ": a has shape ", describe(a.sizes()), ", b ", describe(b.sizes()), ", out ",
         describe(out.sizes()), "; they need (m, k), (k, n) and (m, n)");
  if (out.size(1) > 1 && out.stride(1) != 1) fail(name, ": out needs rows without gaps");
  const bool with_bias = bias.has_value();
  if (with_bias && add) fail(name, ": out is what is added to, or bias; it takes one of them");
  if (with_bias && !(bias->dim() == 1 && bias->size(0) == b.size(1)))
    fail(name, ": bias has shape ", describe(bias->sizes()), "; it needs (", b.size(1), ",)");
  for (const auto& [argument, x] :
       {std::pair("b", &b), std::pair("out", &out), std::pair("bias", with_bias ? &*bias : &b)})
    if (x->scalar_type() != a.scalar_type())
      fail(name, ": ", argument, " has dtype ", describe(x->scalar_type()), "; a has ",
           describe(a.scalar_type()));
  const auto run = [&](auto element) {
    using T = decltype(element);
    if (!out.numel()) return;
    const Optional row = with_bias ? Optional(torch::stable::contiguous(*bias)) : Optional();
    multiply_matrices(matrix<T>(a), matrix<T>(b),
                      row ? static_cast<const T*>(row->const_data_ptr()) : nullptr,
                      static_cast<T*>(out.mutable_data_ptr()), out.stride(0), add);
  };
  if (a.scalar_type() == ScalarType::Double) return run(double{});
  if (a.scalar_type() != ScalarType::Float)
    fail(name, ": a has dtype ", describe(a.scalar_type()), "; it takes Float or Double");
  run(float{});
}

}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) { m.impl("product_", TORCH_BOX(&nnfast::cpu::product_)); }

// Whether they are faster here than torch's, MKL's: measured on an AMD processor with AVX2.
extern "C" __attribute__((visibility("default"))) int nnfast_products_pay() {
#if defined(__x86_64__)
  try {
    return __builtin_cpu_is("amd") && nnfast::cpu::isa() == nnfast::cpu::Isa::avx2;
  } catch (...) {  // of the variable, which the first kernel tells
    return 0;
  }
#else
  return 0;
#endif
}
