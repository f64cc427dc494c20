// A block of attention's scores on the CPU, a key to a row and a query to a column: the softmax then goes
// along vectors, and products read keys, values and probabilities as they lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "attention/turn.h"
#include "common/gemm.h"

namespace nnfast::cpu {

// Keys that are summed before they are added to others, so that rounding grows with the number of such
// groups.
constexpr int key_group = 8;

// (N, H, L, D) at any strides.
template <class T>
struct Operand {
  const T* data;
  int64_t n, h, l, d;

  NNFAST_INLINE const T* at(int64_t batch, int64_t head) const { return data + batch * n + head * h; }
};

// The arguments of attention. What is absent has no data.
template <class T>
struct Attention {
  Operand<T> q, k, v, bias;
  Operand<uint8_t> mask;
  Operand<uint8_t> padding;  // strides n and l
  Operand<T> slopes;         // strides n and h
  const T* added;            // (3, H, D): to queries, keys and values, if there are as many of each
  const T* weight;           // (D, D): what queries are multiplied by then
  Operand<T> cos, sin;       // (N, H, L, R), by which queries and keys turn then
  int64_t half;              // R: pairs that turn
  bool interleaved;          // are neighbours
  int64_t batch, heads, key_heads, queries, keys, head, values;
  int64_t block;        // queries of a block in backward
  int64_t left, right;  // no less than both lengths where there is no limit
  T scale, softcap;
  bool drops;
  uint64_t seed;
  uint32_t least;  // word of an element that is kept
  T kept;          // its factor

  NNFAST_INLINE int64_t blocks() const { return (queries + block - 1) / block; }

  // Queries of the block that begins with query i.
  NNFAST_INLINE int columns(int64_t i) const { return int(std::min(queries - i, block)); }

  NNFAST_INLINE bool caps() const { return softcap != 0; }

  // What queries are multiplied by before they meet keys.
  NNFAST_INLINE T factor() const { return caps() ? scale / softcap : scale; }

  NNFAST_INLINE int64_t key_head(int64_t h) const { return h / (heads / key_heads); }

  // What is added to a head's queries (0), keys (1) or values (2), or null.
  NNFAST_INLINE const T* added_to(int64_t which, int64_t h) const {
    return added ? added + (which * heads + h) * head : nullptr;
  }
};

struct Range {
  int64_t begin, end;
};

// x: (rows, columns) without gaps, with a row `added` to each if that is not null.
template <class T>
NNFAST_INLINE void copy_rows(const T* x, int64_t row, int64_t column, int64_t rows, int64_t columns, T* to,
                             const T* added = nullptr) {
  for (int64_t i = 0; i < rows; ++i, to += columns) {
    if (column == 1)
      std::memcpy(to, x + i * row, columns * sizeof(T));
    else
      for (int64_t j = 0; j < columns; ++j) to[j] = x[i * row + j * column];
    if (added)
      for (int64_t j = 0; j < columns; ++j) to[j] += added[j];
  }
}

// Rows of a head's queries or keys x, turned as its places from `first` on are, or back. to: (rows, D) at any
// strides
template <int bytes, bool back, class T>
NNFAST_INLINE void turn_rows(const Attention<T>& p, int64_t n, int64_t h, int64_t first, const T* x,
                             int64_t row, int64_t column, int64_t rows, T* to, int64_t to_row,
                             int64_t to_column) {
  const Turn<T, back> turn{p.head, p.half, p.interleaved};
  const int64_t of_cos = p.cos.l, of_sin = p.sin.l;  // in registers: what is stored may overlap p
  const T *c = p.cos.at(n, h) + first * of_cos, *s = p.sin.at(n, h) + first * of_sin;
  for (int64_t i = 0; i < rows; ++i)
    turn.template run<bytes>(x + i * row, column, c + i * of_cos, s + i * of_sin, to + i * to_row, to_column);
}

// Rows of a head's keys from `first` on as they enter products, (rows, D) without gaps.
template <int bytes, class T>
NNFAST_INLINE void read_keys(const Attention<T>& p, int64_t n, int64_t h, int64_t first, int64_t rows, T* to,
                             const T* added = nullptr) {
  const T* from = p.k.at(n, h) + first * p.k.l;
  if (p.cos.data)
    turn_rows<bytes, false>(p, n, h, first, from, p.k.l, p.k.d, rows, to, p.head, 1);
  else
    copy_rows(from, p.k.l, p.k.d, rows, p.head, to, added);
}

// A product, where it has few rows or columns in sums of 16: torch has those as dot products, whose rounding
// grows less with their length.
template <int bytes, class T>
NNFAST_INLINE void multiply(Gemm<T> product) {
  constexpr int64_t few = 8, together = 16, panel = GemmShape<T, bytes>::panel;
  const int64_t length = product.k;
  if (std::min(product.m, product.n) >= few) return within<bytes>(product);
  if (!product.b_panel) product.b_panel = length * panel;
  for (int64_t i = 0; i < length; i += together) {
    product.k = std::min(together, length - i);
    within<bytes>(product);
    product.a += together * product.a_column, product.b += together * panel;
    product.add = true;
  }
}

// The words of Philox4x32-10 (Salmon et al. 2011) for counters (group, first_row + lane, head, 0).
template <int bytes>
struct Philox {
  using Words = typename VectorOf<uint32_t, bytes>::type;
  using Wide = typename VectorOf<uint64_t, bytes>::type;

  static NNFAST_INLINE void run(uint64_t seed, uint32_t group, uint32_t first_row, uint32_t head,
                                Words (&word)[4]) {
    uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
    Words a = Words{} + group, b = iota<Words>() + first_row, c = Words{} + head, d = {};
    for (int round = 0; round < 10; ++round) {
      const Pair first = times(a, 0xD2511F53u), second = times(c, 0xCD9E8D57u);
      a = second.high ^ b ^ low;
      b = second.low;
      c = first.high ^ d ^ high;
      d = first.low;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
  }

 private:
  struct Pair {
    Words high, low;
  };

  // The halves of 64-bit products.
  static NNFAST_INLINE Pair times(Words x, uint32_t factor) {
    const Wide all = __builtin_bit_cast(Wide, x);
    const Wide even = product(all, factor), odd = product(all >> 32, factor);
    const Wide upper = even & 0xffffffff00000000u, lower = odd & 0xffffffffu;
    return {__builtin_bit_cast(Words, even >> 32 | (odd & 0xffffffff00000000u)),
            __builtin_bit_cast(Words, (even ^ upper) | lower << 32)};
  }

  // Of the lower halves. By hand: compilers multiply all 64 bits, and its intrinsic would tie this template
  // to one instruction set.
  static NNFAST_INLINE Wide product(Wide x, uint32_t factor) {
#if defined(__x86_64__)
    if constexpr (bytes >= 32) {
      Wide result;
      asm("vpmuludq %2, %1, %0" : "=v"(result) : "v"(x), "v"(Wide{} + factor));
      return result;
    }
#endif
    return (x & 0xffffffffu) * factor;
  }
};

// e^x for x <= 0, 0 where it is hardly a normal number: processors are slow at denormals, its products with
// gradients and values included.
template <int count, class V>
NNFAST_INLINE void decay(V (&x)[count]) {
  using T = typename Lanes<V>::Element;
  constexpr T lowest = sizeof(T) == 4 ? T(-80) : T(-700);
  host::Power<V> power[count];
  Precise::power(x, power);
  for (int i = 0; i < count; ++i)
    if constexpr (host::has_scale<V>)
      x[i] = host::scale(x[i] < lowest ? V{} : power[i].p, power[i].n);
    else
      x[i] = x[i] < lowest ? V{} : power[i].raised();
}

// tanh(x) to some units in the last place: -m / (m + 2) with m = e^(-2 |x|) - 1 = 2^n (e^r - 1) + (2^n - 1).
template <int count, class V>
NNFAST_INLINE void tanh(V (&x)[count]) {
  V exponent[count];
  for (int i = 0; i < count; ++i) exponent[i] = max(V{} - 40, -2 * (x[i] < 0 ? -x[i] : x[i]));
  host::Power<V> power[count];
  Precise::power(exponent, power);
  for (int i = 0; i < count; ++i) {
    const V two_to_n = power[i].two_to_n(), m = two_to_n * power[i].over_one + (two_to_n - 1);
    const V t = m / (m + 2);
    x[i] = x[i] < 0 ? t : -t;
  }
}

// What the scores of one head are computed from. block: queries of a block of them, at most
template <class T, int bytes, int block>
struct Scores {
  using V = typename VectorOf<T, bytes>::type;
  using Bits = typename Lanes<V>::Bits;
  static constexpr int lanes = bytes / sizeof(T);
  // vectors that go through the softmax side by side
  static constexpr int group = block % (8 * lanes) == 0 ? 8 : block % (6 * lanes) == 0 ? 6 : 4;
  static_assert(block % (group * lanes) == 0);
  static constexpr T infinity = std::numeric_limits<T>::infinity();

  const Attention<T>& p;
  int64_t n, h;
  Range unpadded;  // keys outside are padding

  NNFAST_INLINE Scores(const Attention<T>& p, int64_t n, int64_t h) : p(p), n(n), h(h), unpadded{0, p.keys} {
    if (!p.padding.data) return;
    const uint8_t* padding = p.padding.at(n, 0);
    while (unpadded.end > 0 && padding[(unpadded.end - 1) * p.padding.l]) --unpadded.end;
    while (unpadded.begin < unpadded.end && padding[unpadded.begin * p.padding.l]) ++unpadded.begin;
  }

  // Keys that some of the queries may see, from a multiple of 4 on: dropout draws for 4 at once.
  NNFAST_INLINE Range seen(int64_t first, int64_t last) const {
    const int64_t begin = std::max(unpadded.begin, first - p.left) / 4 * 4;
    return {begin, std::max(begin, std::min(unpadded.end, last + p.right))};
  }

  // s: (rows, block) of keys from j on and `columns` queries from i on; -inf where a key is unseen.
  // k: (rows, head) without gaps; q: times `factor` and transposed, by `pack_columns`. slope: null, or what
  // the derivatives of the soft cap are left in
  NNFAST_INLINE void compute(int64_t i, int columns, int64_t j, int rows, const T* k, const T* q, T* s,
                             T* slope = nullptr) const {
    multiply<bytes>(Gemm<T>{rows, columns, p.head, k, p.head, 1, q, s, block, false});
    if (p.caps()) cap(columns, rows, s, slope);
    if (p.slopes.data) add_slopes(i, columns, j, rows, s);
    if (of_pairs(p.bias)) add_bias(i, columns, j, rows, s);
    if (of_pairs(p.mask)) add_mask(i, columns, j, rows, s);
    if (of_keys(p.bias) || of_keys(p.mask) || p.padding.data) add_keys(columns, j, rows, s);
    if (j + rows - 1 > i + p.right || j < i + columns - 1 - p.left) hide(i, columns, j, rows, s);
  }

  // What dropout does to the probabilities of 4 keys from j on: 0 or a factor, (4, block).
  NNFAST_INLINE void dropout(int64_t i, int columns, int64_t j, T* factors) const {
    using Random = Philox<bytes>;
    constexpr int words = bytes / sizeof(uint32_t);
    for (int c = 0; c < columns; c += words) {
      typename Random::Words word[4];
      Random::run(p.seed, uint32_t(j / 4), uint32_t(i + c), uint32_t(n * p.heads + h), word);
      for (int w = 0; w < 4; ++w)
        if constexpr (sizeof(T) == 4) {
          store(factors + w * block + c, word[w] >= p.least ? V{} + p.kept : V{});
        } else {
          for (int l = 0; l < words; ++l) factors[w * block + c + l] = word[w][l] >= p.least ? p.kept : 0;
        }
    }
  }

 private:
  template <class X>
  static NNFAST_INLINE bool of_pairs(const Operand<X>& x) {
    return x.data && x.l;
  }

  template <class X>
  static NNFAST_INLINE bool of_keys(const Operand<X>& x) {
    return x.data && !x.l;
  }

  // Of products with queries that `Attention::factor` was multiplied into.
  NNFAST_INLINE void cap(int columns, int rows, T* s, T* slope) const {
    constexpr int some = group / 2;
    for (int at = 0; at < rows * block; at += block)
      for (int c = at; c < at + columns; c += some * lanes) {
        V t[some];
        for (int g = 0; g < some; ++g) t[g] = load<V>(s + c + g * lanes);
        tanh(t);
        for (int g = 0; g < some; ++g) {
          store(s + c + g * lanes, t[g] * p.softcap);
          if (slope) store(slope + c + g * lanes, 1 - t[g] * t[g]);
        }
      }
  }

  NNFAST_INLINE void add_slopes(int64_t i, int columns, int64_t j, int rows, T* s) const {
    const V slope = V{} + p.slopes.at(n, h)[0];
    V lane = {};
    for (int l = 0; l < lanes; ++l) lane[l] = T(l);
    for (int r = 0; r < rows; ++r, s += block)
      for (int c = 0; c < columns; c += lanes) {
        const V behind = lane + T(i + c + p.keys - p.queries - (j + r));
        store(s + c, load<V>(s + c) - slope * (behind < 0 ? -behind : behind));
      }
  }

  NNFAST_INLINE void add_bias(int64_t i, int columns, int64_t j, int rows, T* s) const {
    const T* bias = p.bias.at(n, h) + i * p.bias.l + j * p.bias.d;
    for (int c = 0; c < columns; c += lanes) {
      int r = 0;
      if (p.bias.d == 1 && c + lanes <= columns)
        for (; r + lanes <= rows; r += lanes) {
          V square[lanes];
          for (int l = 0; l < lanes; ++l) square[l] = load<V>(bias + (c + l) * p.bias.l + r);
          transpose<lanes / 2>(square);
          for (int l = 0; l < lanes; ++l) {
            T* at = s + (r + l) * block + c;
            store(at, load<V>(at) + square[l]);
          }
        }
      for (; r < rows; ++r)
        for (int l = c; l < std::min(c + lanes, columns); ++l)
          s[r * block + l] += bias[l * p.bias.l + r * p.bias.d];
    }
  }

  // Side by side, 4 keys' bytes of a query are a word.
  NNFAST_INLINE void add_mask(int64_t i, int columns, int64_t j, int rows, T* s) const {
    const uint8_t* mask = p.mask.at(n, h) + i * p.mask.l + j * p.mask.d;
    alignas(64) typename Lanes<V>::Element as_words[block];
    int r = 0;
    if (p.mask.d == 1)
      for (; r + 4 <= rows; r += 4) {
        for (int c = 0; c < columns; ++c) {
          uint32_t word;
          std::memcpy(&word, mask + c * p.mask.l + r, sizeof(word));
          const typename Lanes<T>::Bits bits = word;
          std::memcpy(as_words + c, &bits, sizeof(bits));
        }
        for (int c = 0; c < columns; c += lanes) {
          const Bits word = load<Bits>(as_words + c);
          for (int l = 0; l < 4; ++l) {
            T* at = s + (r + l) * block + c;
            const V score = load<V>(at);
            store(at, (word >> 8 * l & 255) == 0 ? V{} - infinity : score);
          }
        }
      }
    for (; r < rows; ++r)
      for (int c = 0; c < columns; ++c)
        if (!mask[c * p.mask.l + r * p.mask.d]) s[r * block + c] = -infinity;
  }

  NNFAST_INLINE void add_keys(int columns, int64_t j, int rows, T* s) const {
    const T* bias = of_keys(p.bias) ? p.bias.at(n, h) : nullptr;
    const uint8_t* mask = of_keys(p.mask) ? p.mask.at(n, h) : nullptr;
    const uint8_t* padding = p.padding.data ? p.padding.at(n, 0) : nullptr;
    for (int r = 0; r < rows; ++r, s += block) {
      if ((padding && padding[(j + r) * p.padding.l]) || (mask && !mask[(j + r) * p.mask.d])) {
        std::fill_n(s, columns, -infinity);
      } else if (bias) {
        const T e = bias[(j + r) * p.bias.d];
        for (int c = 0; c < columns; c += lanes) store(s + c, load<V>(s + c) + e);
      }
    }
  }

  NNFAST_INLINE void hide(int64_t i, int columns, int64_t j, int rows, T* s) const {
    for (int r = 0; r < rows; ++r, s += block) {
      const int64_t first = std::clamp<int64_t>(j + r - p.right - i, 0, columns);
      const int64_t end = std::clamp<int64_t>(j + r + p.left + 1 - i, first, columns);
      std::fill(s, s + first, -infinity);
      std::fill(s + end, s + columns, -infinity);
    }
  }
};

}  // namespace nnfast::cpu
