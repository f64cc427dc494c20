// Attention on the CPU without a matrix of scores: an online softmax over blocks of keys (Milakov and
// Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), float32 and float64. Backward makes
// the probabilities again from the log-sum-exp. Whatever is summed has one owner: results repeat bit by bit.
#include <optional>
#include <tuple>

#include "attention/scores.h"
#include "common/tensor.h"

namespace nnfast::cpu {

// Blocks of queries that share what is packed of the keys, at most, and the bytes of queries and results that
// they may hold: half of a second cache.
constexpr int64_t most_blocks = 8, most_held = 256 << 10;

// Queries and keys of a block in forward: its scores fill half of a first cache, of 32 KB or, where there is
// AVX-512, mostly more.
constexpr int forward_queries = 64;
template <int bytes>
constexpr int forward_keys = bytes == 64 ? 128 : 64;

// The same in backward, whose products make 6 rows at once, or 14 with AVX-512: of these sizes few are left.
constexpr int query_block = 96, key_block = 132;

// out: strides of (N, H, Lq), features side by side. begin, end: spans of queries of a head
template <class T>
struct Forward {
  Attention<T> p;
  int64_t queries_each;
  T *out, *lse;
  Operand<T> of_out;

  NNFAST_INLINE int64_t spans() const { return (p.queries + queries_each - 1) / queries_each; }

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t width = whole_panels<T, bytes>(p.values);
    const Scratch<T> q(queries_each * p.head), raw(p.weight || p.cos.data ? forward_queries * p.head : 0),
        k(forward_keys<bytes> * p.head), v(forward_keys<bytes> * width), out(queries_each * width),
        s(forward_keys<bytes> * forward_queries), ends(2 * queries_each);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / spans(), first = task % spans() * queries_each;
      const Scores<T, bytes, forward_queries> scores(p, row / p.heads, row % p.heads);
      one(scores, first, std::min(p.queries - first, queries_each), q, raw, k, v, out, s, ends);
    }
  }

 private:
  template <int bytes>
  NNFAST_INLINE void one(const Scores<T, bytes, forward_queries>& scores, int64_t first, int64_t queries,
                         T* q, T* raw, T* k, T* v, T* out, T* s, T* ends) const {
    const int64_t n = scores.n, h = scores.h, of_keys = p.key_head(h);
    const int64_t width = whole_panels<T, bytes>(p.values);
    const T *from_k = p.k.at(n, of_keys), *from_v = p.v.at(n, of_keys);
    T *most = ends, *sum = ends + queries_each;
    for (int64_t i = 0; i < queries; i += forward_queries) {
      const int64_t columns = std::min<int64_t>(queries - i, forward_queries);
      const T* from = p.q.at(n, h) + (first + i) * p.q.l;
      int64_t row = p.q.l, column = p.q.d;
      if (p.cos.data) {
        turn_rows<bytes, false>(p, n, h, first + i, from, row, column, columns, raw, p.head, 1);
        from = raw, row = p.head, column = 1;
      }
      pack_columns<bytes>(from, row, column, columns, p.head, p.factor(), p.weight ? raw : q + i * p.head,
                          p.added_to(0, h));
      if (p.weight) weigh_queries<bytes>(raw, columns, q + i * p.head);
    }
    std::fill_n(most, queries_each, -scores.infinity);
    std::fill_n(sum, queries_each, T{});
    std::fill_n(out, queries * width, T{});
    const Range all = scores.seen(first, first + queries);
    for (int64_t j = all.begin; j < all.end; j += forward_keys<bytes>) {
      const int rows = int(std::min<int64_t>(all.end - j, forward_keys<bytes>));
      read_keys<bytes>(p, n, of_keys, j, rows, k, p.added_to(1, h));
      pack_rows<bytes>(from_v + j * p.v.l, p.v.l, p.v.d, rows, p.values, T(1), v, p.added_to(2, h));
      for (int64_t i = 0; i < queries; i += forward_queries) {
        const int columns = int(std::min<int64_t>(queries - i, forward_queries));
        const Range seen = scores.seen(first + i, first + i + columns);
        const int64_t skipped = std::clamp<int64_t>(seen.begin - j, 0, rows);
        const int left = int(std::min<int64_t>(seen.end - j, rows) - skipped);
        if (left <= 0) continue;
        scores.compute(first + i, columns, j + skipped, left, k + skipped * p.head, q + i * p.head, s);
        const int64_t share =
            (forward_keys<bytes> * forward_queries + queries - 1) / queries;  // of the next rows
        const int64_t next = j + forward_keys<bytes> + i / forward_queries * share;
        Ahead ahead{from_k, from_v, next, std::min({next + share, j + 2 * forward_keys<bytes>, all.end})};
        weigh(scores, first + i, columns, j + skipped, left, s, most + i, sum + i, out + i * width, width,
              ahead);
        multiply<bytes>(Gemm<T>{columns, p.values, left, s, 1, forward_queries,
                                v + skipped * GemmShape<T, bytes>::panel, out + i * width, width, true,
                                rows * GemmShape<T, bytes>::panel});
      }
    }
    finish<bytes>(queries, most, sum);
    T* to = this->out + n * of_out.n + h * of_out.h + first * of_out.l;
    for (int64_t i = 0; i < queries; ++i, to += of_out.l)
      for (int64_t d = 0; d < p.values; ++d) to[d] = out[i * width + d] * sum[i];
    std::copy_n(most, queries, lse + (n * p.heads + h) * p.queries + first);
  }

  // Packed queries times the weight: a panel of them at a time, since panels lie one after another.
  template <int bytes>
  NNFAST_INLINE void weigh_queries(const T* q, int64_t columns, T* to) const {
    constexpr int64_t panel = GemmShape<T, bytes>::panel;
    for (int64_t i = 0; i < columns; i += panel)
      within<bytes>(
          Gemm<T>{p.head, panel, p.head, p.weight, 1, p.head, q + i * p.head, to + i * p.head, panel, false});
  }

  // Maxima to log-sum-exps, and sums to what they divide by.
  template <int bytes>
  static NNFAST_INLINE void finish(int64_t queries, T* most, T* sum) {
    using V = typename VectorOf<T, bytes>::type;
    for (int64_t i = 0; i < queries; i += bytes / sizeof(T)) {
      const V l = load<V>(sum + i);
      store(most + i,
            l == 0 ? V{} - std::numeric_limits<T>::infinity() : load<V>(most + i) + Precise::log(l));
      store(sum + i, l == 0 ? V{} : 1 / l);
    }
  }

  // Rows of keys and values to fetch into the second cache, beside arithmetic.
  struct Ahead {
    const T *k, *v;
    int64_t next, end;
  };

  NNFAST_INLINE void fetch(Ahead& ahead, int64_t rows) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (const int64_t last = std::min(ahead.next + rows, ahead.end); ahead.next < last; ++ahead.next) {
      const T *key = ahead.k + ahead.next * p.k.l, *value = ahead.v + ahead.next * p.v.l;
      for (int64_t d = 0; d < p.head; d += line) __builtin_prefetch(key + d, 0, 2);
      for (int64_t d = 0; d < p.values; d += line) __builtin_prefetch(value + d, 0, 2);
    }
  }

  // Scores to e^(score - most), which `most` is raised for, and what it had been comes to in sum and out.
  template <int bytes>
  NNFAST_INLINE void weigh(const Scores<T, bytes, forward_queries>& scores, int64_t i, int columns, int64_t j,
                           int rows, T* s, T* most, T* sum, T* out, int64_t width, Ahead& ahead) const {
    using V = typename VectorOf<T, bytes>::type;
    constexpr int lanes = scores.lanes, group = scores.group;
    const int64_t fetched = (ahead.end - ahead.next) * key_group / rows + 1;  // rows, with each group
    alignas(64) T shrunk[forward_queries], factors[4 * forward_queries];
    for (int c = 0; c < columns; c += group * lanes) {
      V old[group], raised[group];
      for (int g = 0; g < group; ++g) raised[g] = old[g] = load<V>(most + c + g * lanes);
      for (int r = 0; r < rows; ++r)
        for (int g = 0; g < group; ++g)
          raised[g] = max(load<V>(s + r * forward_queries + c + g * lanes), raised[g]);
      for (int g = 0; g < group; ++g) {
        store(most + c + g * lanes, raised[g]);
        raised[g] = raised[g] == -scores.infinity ? V{} : raised[g];  // or blind queries would be NaN
        old[g] -= raised[g];
      }
      decay(old);
      for (int g = 0; g < group; ++g) {
        store(shrunk + c + g * lanes, old[g]);
        old[g] *= load<V>(sum + c + g * lanes);
      }
      V total[group] = {};
      for (int first = 0; first < rows; first += key_group) {
        V some[group] = {};
        fetch(ahead, fetched);
        for (int r = first; r < std::min(first + key_group, rows); ++r) {
          T* const at = s + r * forward_queries + c;
          V e[group];
          for (int g = 0; g < group; ++g) e[g] = load<V>(at + g * lanes) - raised[g];
          decay(e);
          for (int g = 0; g < group; ++g) store(at + g * lanes, e[g]), some[g] += e[g];
        }
        for (int g = 0; g < group; ++g) total[g] += some[g];
      }
      for (int g = 0; g < group; ++g) store(sum + c + g * lanes, old[g] + total[g]);
    }
    if (p.drops)
      for (int r = 0; r < rows; ++r) {
        if (r % 4 == 0) scores.dropout(i, columns, j + r, factors);
        T *at = s + r * forward_queries, *factor = factors + r % 4 * forward_queries;
        for (int c = 0; c < columns; c += lanes) store(at + c, load<V>(at + c) * load<V>(factor + c));
      }
    for (int c = 0; c < columns; ++c, out += width)
      if (shrunk[c] != 1)
        for (int64_t d = 0; d < width; d += lanes) store(out + d, load<V>(out + d) * shrunk[c]);
  }
};

// Whether a block of the scores has all keys that its queries see, and their probabilities as they are.
template <class T>
NNFAST_INLINE bool whole(const Attention<T>& p) {
  return p.keys <= key_block && !p.drops;
}

// What the gradients of one block of queries start from.
template <class T>
struct Upstream {
  Operand<T> grad, out;
  const T *lse, *grad_lse;  // (N, H, Lq) without gaps; grad_lse may be null
};

// Packed once for each block of queries.
template <class T, int bytes>
struct Block {
  using V = typename VectorOf<T, bytes>::type;
  static constexpr int lanes = bytes / sizeof(T), group = Scores<T, bytes, query_block>::group;
  T* turned;              // (query_block, D), queries before they are packed; null if none turn
  T *q, *grad;            // transposed
  T *q_rows, *grad_rows;  // as they are, where given
  T *lse, *delta;         // (query_block,); delta is not yet of the probabilities where blocks are whole
  T *s, *ds;              // (key_block, query_block)
  T* slope;               // likewise, of the soft cap; null where the gradient is that of capped scores

  NNFAST_INLINE void start(const Attention<T>& p, const Upstream<T>& up, int64_t n, int64_t h, int64_t i,
                           int columns) const {
    const T *from_q = p.q.at(n, h) + i * p.q.l, *from = up.grad.at(n, h) + i * up.grad.l;
    int64_t q_row = p.q.l, q_column = p.q.d;
    if (turned) {
      turn_rows<bytes, false>(p, n, h, i, from_q, q_row, q_column, columns, turned, p.head, 1);
      from_q = turned, q_row = p.head, q_column = 1;
    }
    pack_columns<bytes>(from_q, q_row, q_column, columns, p.head, p.factor(), q);
    pack_columns<bytes>(from, up.grad.l, up.grad.d, columns, p.values, T(1), grad);
    if (q_rows) pack_rows<bytes>(from_q, q_row, q_column, columns, p.head, p.scale, q_rows);
    if (grad_rows) pack_rows<bytes>(from, up.grad.l, up.grad.d, columns, p.values, T(1), grad_rows);
    const T* out = up.out.at(n, h) + i * up.out.l;
    const int64_t row = (n * p.heads + h) * p.queries + i;
    std::fill_n(lse, query_block, T{});
    std::fill_n(delta, query_block, T{});
    for (int c = 0; c < columns; ++c) {
      const T of_row = up.lse[row + c];
      lse[c] = of_row == -std::numeric_limits<T>::infinity() ? T{} : of_row;  // e^-inf is 0 then as well
      const T sum =
          whole(p) ? T{} : product(from + c * up.grad.l, up.grad.d, out + c * up.out.l, up.out.d, p.values);
      delta[c] = up.grad_lse ? sum - up.grad_lse[row + c] : sum;
    }
  }

  static NNFAST_INLINE T product(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t n) {
    V sums = {};
    int64_t i = 0;
    if (a_step == 1 && b_step == 1)
      for (; i + lanes <= n; i += lanes) sums += load<V>(a + i) * load<V>(b + i);
    T sum = across(sums, [](auto x, auto y) __attribute__((always_inline)) { return x + y; });
    for (; i < n; ++i) sum += a[i * a_step] * b[i * b_step];
    return sum;
  }

  // ds: the gradient of the scores, and s: the probabilities, after dropout. k, v: (rows, D) without gaps.
  NNFAST_INLINE void compute(const Scores<T, bytes, query_block>& scores, int64_t i, int columns, int64_t j,
                             int rows, const T* k, const T* v) const {
    const Attention<T>& p = scores.p;
    scores.compute(i, columns, j, rows, k, q, s, slope);
    multiply<bytes>(Gemm<T>{rows, columns, p.values, v, p.values, 1, grad, ds, query_block, false});
    if (whole(p))
      normalised(columns, rows);
    else
      weighted(scores, i, columns, j, rows);
    if (slope)
      for (int at = 0; at < rows * query_block; at += query_block)
        for (int c = at; c < at + columns; c += lanes) store(ds + c, load<V>(ds + c) * load<V>(slope + c));
  }

 private:
  // Scores to probabilities, e^(score - lse), and their gradients to those of the scores.
  NNFAST_INLINE void weighted(const Scores<T, bytes, query_block>& scores, int64_t i, int columns, int64_t j,
                              int rows) const {
    const Attention<T>& p = scores.p;
    alignas(64) T factors[4 * query_block];
    for (int r = 0; r < rows; ++r) {
      if (p.drops && r % 4 == 0) scores.dropout(i, columns, j + r, factors);
      const T* factor = factors + r % 4 * query_block;
      T *of_s = s + r * query_block, *of_ds = ds + r * query_block;
      for (int c = 0; c < columns; c += group * lanes) {
        V e[group];
        for (int g = 0; g < group; ++g) e[g] = load<V>(of_s + c + g * lanes) - load<V>(lse + c + g * lanes);
        decay(e);
        for (int g = 0; g < group; ++g) {
          const int at = c + g * lanes;
          const V kept = p.drops ? load<V>(factor + at) : V{} + 1;
          store(of_ds + at, e[g] * (load<V>(of_ds + at) * kept - load<V>(delta + at)));
          store(of_s + at, e[g] * kept);
        }
      }
    }
  }

  // The same where a block is whole: its probabilities add up to 1, which a rounded log-sum-exp keeps them
  // from, and delta is theirs. As exact as a softmax that was kept.
  NNFAST_INLINE void normalised(int columns, int rows) const {
    alignas(64) T sums[query_block] = {}, inner[query_block] = {};
    for (int first = 0; first < rows; first += key_group)
      for (int c = 0; c < columns; c += group * lanes) {
        V some[group] = {}, products[group] = {};
        for (int r = first; r < std::min(first + key_group, rows); ++r) {
          T *of_s = s + r * query_block + c, *of_ds = ds + r * query_block + c;
          V e[group];
          for (int g = 0; g < group; ++g) e[g] = load<V>(of_s + g * lanes) - load<V>(lse + c + g * lanes);
          decay(e);
          for (int g = 0; g < group; ++g) {
            store(of_s + g * lanes, e[g]);
            some[g] += e[g], products[g] += e[g] * load<V>(of_ds + g * lanes);
          }
        }
        for (int g = 0; g < group; ++g) {
          store(sums + c + g * lanes, load<V>(sums + c + g * lanes) + some[g]);
          store(inner + c + g * lanes, load<V>(inner + c + g * lanes) + products[g]);
        }
      }
    for (int c = 0; c < columns; c += lanes) {
      const V sum = load<V>(sums + c), scale = sum == 0 ? V{} : 1 / sum;
      store(sums + c, scale);
      store(inner + c, load<V>(delta + c) + load<V>(inner + c) * scale);
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; c += lanes) {
        T *of_s = s + r * query_block + c, *of_ds = ds + r * query_block + c;
        const V e = load<V>(of_s) * load<V>(sums + c);
        store(of_s, e);
        store(of_ds, e * (load<V>(of_ds) - load<V>(inner + c)));
      }
  }
};

// Gradients of queries, keys and values. begin, end: parts of a key head, each with some blocks of its
// queries, of which some `together` share what is read of a block of keys
template <class T>
struct Backward {
  Attention<T> p;
  Upstream<T> up;
  int64_t parts, together;
  T *dq, *dk, *dv;
  Operand<T> of_dq, of_dk, of_dv;  // their strides
  T* partial;  // (N * Hk, parts, Lk, width of dk + width of dv), if there are several parts

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int panel = GemmShape<T, bytes>::panel;
    const int64_t k_width = whole_panels<T, bytes>(p.head), v_width = whole_panels<T, bytes>(p.values);
    const Scratch<T> k(p.keys * p.head), v(p.keys * p.values), k_rows(p.keys * k_width);
    const Scratch<T> sums(parts > 1 ? 0 : p.keys * (k_width + v_width)),
        of_q(together * query_block * k_width);
    const Scratch<T> q(together * query_block * p.head), grad(together * query_block * p.values),
        q_rows(together * query_block * k_width), grad_rows(together * query_block * v_width),
        ends(together * 2 * query_block), s((p.caps() ? 3 : 2) * key_block * query_block),
        turned(p.cos.data ? query_block * p.head : 0);
    const auto block = [&](int64_t b) __attribute__((always_inline)) {
      b *= query_block;
      return Block<T, bytes>{p.cos.data ? static_cast<T*>(turned) : nullptr,
                             q + b * p.head,
                             grad + b * p.values,
                             q_rows + b * k_width,
                             grad_rows + b * v_width,
                             ends + 2 * b,
                             ends + 2 * b + query_block,
                             s,
                             s + key_block * query_block,
                             p.caps() ? s + 2 * key_block * query_block : nullptr};
    };
    const int64_t step = parts * p.block;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts, n = row / p.key_heads, of_keys = row % p.key_heads;
      const T *from_k = p.k.at(n, of_keys), *from_v = p.v.at(n, of_keys);
      read_keys<bytes>(p, n, of_keys, 0, p.keys, static_cast<T*>(k));
      // one, where projections are folded
      const bool same =
          from_v == from_k && p.v.l == p.k.l && p.v.d == p.k.d && p.values == p.head && !p.cos.data;
      if (!same) copy_rows(from_v, p.v.l, p.v.d, p.keys, p.values, static_cast<T*>(v));
      const T* const values = same ? k : v;
      for (int64_t j = 0; j < p.keys; j += key_block)
        pack_rows<bytes>(k + j * p.head, p.head, 1, keys_of(j), p.head, T(1), k_rows + j * k_width);
      T* dk_sum = parts > 1 ? partial + task * p.keys * (k_width + v_width) : static_cast<T*>(sums);
      T* dv_sum = dk_sum + p.keys * k_width;
      std::fill_n(dk_sum, p.keys * (k_width + v_width), T{});
      const int64_t group = p.heads / p.key_heads;
      for (int64_t h = of_keys * group; h < (of_keys + 1) * group; ++h) {
        const Scores<T, bytes, query_block> scores(p, n, h);
        for (int64_t first = task % parts * p.block; first < p.queries; first += together * step) {
          const int64_t last = std::min(first + together * step, p.queries);
          std::fill_n(static_cast<T*>(of_q), together * query_block * k_width, T{});
          for (int64_t i = first, b = 0; i < last; i += step, ++b)
            block(b).start(p, up, n, h, i, p.columns(i));
          const Range all = scores.seen(first, last);
          for (int64_t j = all.begin / key_block * key_block; j < all.end; j += key_block)
            for (int64_t i = first, b = 0; i < last; i += step, ++b) {
              const int columns = p.columns(i);
              const Range seen = scores.seen(i, i + columns);
              const int64_t from = std::max(j, seen.begin);
              const int rows = int(std::min(seen.end, j + key_block) - from);
              if (rows <= 0) continue;
              const Block<T, bytes> one = block(b);
              one.compute(scores, i, columns, from, rows, k + from * p.head, values + from * p.values);
              within<bytes>(Gemm<T>{rows, p.values, columns, one.s, query_block, 1, one.grad_rows,
                                    dv_sum + from * v_width, v_width, true});
              within<bytes>(Gemm<T>{rows, p.head, columns, one.ds, query_block, 1, one.q_rows,
                                    dk_sum + from * k_width, k_width, true});
              within<bytes>(Gemm<T>{columns, p.head, rows, one.ds, 1, query_block,
                                    k_rows + j * k_width + (from - j) * panel,
                                    of_q + b * query_block * k_width, k_width, true, keys_of(j) * panel});
            }
          for (int64_t i = first, b = 0; i < last; i += step, ++b)
            put_turned<bytes>(n, h, i, of_q + b * query_block * k_width, k_width, p.columns(i), p.scale, dq,
                              of_dq);
        }
      }
      if (parts == 1) {
        put_turned<bytes>(n, of_keys, 0, dk_sum, k_width, p.keys, T(1), dk, of_dk);
        put(dv_sum, v_width, p.keys, p.values, T(1), dv + n * of_dv.n + of_keys * of_dv.h, of_dv);
      }
    }
  }

  // Keys of the block that begins with key j.
  NNFAST_INLINE int64_t keys_of(int64_t j) const { return std::min<int64_t>(p.keys - j, key_block); }

  // Of queries or keys, from place `first` on; these turn back.
  template <int bytes>
  NNFAST_INLINE void put_turned(int64_t n, int64_t h, int64_t first, T* from, int64_t width, int64_t rows,
                                T factor, T* to, const Operand<T>& strides) const {
    to += n * strides.n + h * strides.h + first * strides.l;
    if (!p.cos.data) return put(from, width, rows, p.head, factor, to, strides);
    if (factor != 1)
      for (int64_t i = 0; i < rows * width; ++i) from[i] *= factor;
    turn_rows<bytes, true>(p, n, h, first, from, width, 1, rows, to, strides.l, strides.d);
  }

  static NNFAST_INLINE void put(const T* from, int64_t width, int64_t rows, int64_t columns, T factor, T* to,
                                const Operand<T>& strides) {
    for (int64_t i = 0; i < rows; ++i)
      if (strides.d == 1)
        for (int64_t d = 0; d < columns; ++d) to[i * strides.l + d] = from[i * width + d] * factor;
      else
        for (int64_t d = 0; d < columns; ++d)
          to[i * strides.l + d * strides.d] = from[i * width + d] * factor;
  }
};

// Adds up the parts of a key head's gradients, in their order. begin, end: key heads
template <class T>
struct Parts {
  Backward<T> of;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const auto& p = of.p;
    const int64_t k_width = whole_panels<T, bytes>(p.head), v_width = whole_panels<T, bytes>(p.values);
    const int64_t size = p.keys * (k_width + v_width);
    for (int64_t row = begin; row < end; ++row) {
      T* sum = of.partial + row * of.parts * size;
      for (int64_t part = 1; part < of.parts; ++part)
        for (int64_t i = 0; i < size; ++i) sum[i] += sum[part * size + i];
      const int64_t n = row / p.key_heads, h = row % p.key_heads;
      of.template put_turned<bytes>(n, h, 0, sum, k_width, p.keys, T(1), of.dk, of.of_dk);
      of.put(sum + p.keys * k_width, v_width, p.keys, p.values, T(1), of.dv + n * of.of_dv.n + h * of.of_dv.h,
             of.of_dv);
    }
  }
};

// The gradient of a bias that broadcasts to (N, H, Lq, Lk): the scores' once more, so that a block of it has
// one owner, which adds up what shares it. begin, end: blocks
template <class T>
struct BiasBackward {
  Attention<T> p;
  Upstream<T> up;
  int64_t sizes[4];
  T* db;  // without gaps

  NNFAST_INLINE int64_t rows() const { return sizes[2] == 1 ? 1 : p.blocks(); }
  NNFAST_INLINE int64_t columns() const { return sizes[3] == 1 ? 1 : (p.keys + key_block - 1) / key_block; }
  NNFAST_INLINE int64_t blocks() const { return sizes[0] * sizes[1] * rows() * columns(); }

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const Scratch<T> q(query_block * p.head), grad(query_block * p.values), ends(2 * query_block),
        s(2 * key_block * query_block), k(key_block * p.head), v(key_block * p.values),
        total(key_block * query_block), turned(p.cos.data ? query_block * p.head : 0);
    const Block<T, bytes> block{p.cos.data ? static_cast<T*>(turned) : nullptr,
                                q,
                                grad,
                                nullptr,
                                nullptr,
                                ends,
                                ends + query_block,
                                s,
                                s + key_block * query_block,
                                nullptr};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % columns(), row = task / columns() % rows();
      const int64_t plane = task / columns() / rows();
      std::fill_n(static_cast<T*>(total), key_block * query_block, T{});
      const Range batch = owned(plane / sizes[1], sizes[0], p.batch);
      const Range heads = owned(plane % sizes[1], sizes[1], p.heads);
      const Range queries = owned(row, rows(), p.blocks());
      const Range keys = owned(column, columns(), (p.keys + key_block - 1) / key_block);
      for (int64_t n = batch.begin; n < batch.end; ++n)
        for (int64_t h = heads.begin; h < heads.end; ++h)
          for (int64_t i = queries.begin; i < queries.end; ++i)
            sum(Scores<T, bytes, query_block>(p, n, h), block, i * p.block, keys, k, v, total);
      put(total, plane, row * p.block, column * key_block);
    }
  }

 private:
  // Which of `n` there are `one` of `size` has a share in.
  static NNFAST_INLINE Range owned(int64_t one, int64_t size, int64_t n) {
    return size == 1 ? Range{0, n} : Range{one, one + 1};
  }

  template <int bytes>
  NNFAST_INLINE void sum(const Scores<T, bytes, query_block>& scores, const Block<T, bytes>& block, int64_t i,
                         const Range& keys, T* k, T* v, T* total) const {
    const int64_t n = scores.n, of_keys = p.key_head(scores.h);
    const int columns = p.columns(i);
    const Range seen = scores.seen(i, i + columns);
    block.start(p, up, n, scores.h, i, columns);
    for (int64_t b = keys.begin; b < keys.end; ++b) {
      const int64_t first = b * key_block, j = std::max(first, seen.begin);
      const int rows = int(std::min(first + key_block, seen.end) - j);
      if (rows <= 0) continue;
      read_keys<bytes>(p, n, of_keys, j, rows, k);
      copy_rows(p.v.at(n, of_keys) + j * p.v.l, p.v.l, p.v.d, rows, p.values, v);
      block.compute(scores, i, columns, j, rows, k, v);
      T* to = total + (j - first) * query_block;
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) to[r * query_block + c] += block.ds[r * query_block + c];
    }
  }

  NNFAST_INLINE void put(T* total, int64_t plane, int64_t i, int64_t j) const {
    if (sizes[2] == 1)
      for (int r = 0; r < key_block; ++r)
        for (int c = 1; c < query_block; ++c) total[r * query_block] += total[r * query_block + c];
    if (sizes[3] == 1)
      for (int r = 1; r < key_block; ++r)
        for (int c = 0; c < query_block; ++c) total[c] += total[r * query_block + c];
    for (int64_t c = 0; c < p.block && i + c < sizes[2]; ++c)
      for (int64_t r = 0; r < key_block && j + r < sizes[3]; ++r)
        db[(plane * sizes[2] + i + c) * sizes[3] + j + r] = total[r * query_block + c];
  }
};

using Optional = std::optional<Tensor>;
constexpr const char *forward_name = "attention.cpu", *backward_name = "attention_backward.cpu";

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
Operand<T> operand(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The same where a dimension of size 1 is broadcast.
template <class T>
Operand<T> broadcast(const Optional& x) {
  if (!x) return {};
  Operand<T> result = operand<T>(*x);
  int64_t* const strides[] = {&result.n, &result.h, &result.l, &result.d};
  for (int i = 0; i < 4; ++i)
    if (x->size(i) == 1) *strides[i] = 0;
  return result;
}

void check_dtype(const char* op, const char* name, const Optional& x, ScalarType dtype) {
  if (x && x->scalar_type() != dtype)
    fail(op, ": ", name, " has dtype ", describe(x->scalar_type()), "; it needs ", describe(dtype));
}

template <class T>
Attention<T> arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Optional& mask, const Optional& padding, const Optional& bias,
                       const Optional& slopes, const Optional& seed, const Optional& cos, const Optional& sin,
                       bool is_causal, double scale, double softcap, int64_t left, int64_t right,
                       double dropout_p, bool interleaved) {
  for (const auto& [name, x] : {std::pair("k", &k), std::pair("v", &v)})
    check_dtype(op, name, *x, q.scalar_type());
  check_dtype(op, "bias", bias, q.scalar_type());
  check_dtype(op, "alibi_slopes", slopes, q.scalar_type());
  check_dtype(op, "mask", mask, ScalarType::Bool);
  check_dtype(op, "key_padding", padding, ScalarType::Bool);
  check_dtype(op, "seed", seed, ScalarType::Long);
  Attention<T> p{operand<T>(q),
                 operand<T>(k),
                 operand<T>(v),
                 broadcast<T>(bias),
                 broadcast<uint8_t>(mask),
                 {},
                 {},
                 {},
                 {}};
  if (padding) p.padding = {data<uint8_t>(*padding), padding->stride(0), 0, padding->stride(1), 0};
  if (slopes) p.slopes = {data<T>(*slopes), slopes->stride(0), slopes->stride(1), 0, 0};
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.head = q.size(3);
  p.key_heads = k.size(1), p.keys = k.size(2), p.values = v.size(3);
  const auto shares = [](int64_t x, int64_t of) { return std::max<int64_t>((x + of - 1) / of, 1); };
  p.block = shares(shares(p.queries, shares(p.queries, query_block)), 16) * 16;  // blocks of about one size
  const int64_t unlimited = p.queries + p.keys;
  p.left = left < 0 ? unlimited : std::min(left, unlimited);
  p.right = is_causal ? 0 : right < 0 ? unlimited : std::min(right, unlimited);
  p.scale = T(scale), p.softcap = T(softcap);
  p.drops = dropout_p > 0 && seed;
  p.seed = seed ? uint64_t(*data<int64_t>(*seed)) : 0;
  p.least = uint32_t(dropout_p * 4294967296.0);
  p.kept = T(1 / (1 - dropout_p));
  if (cos && sin) {
    check(cos->size(3) == sin->size(3), op, ": cos has ", cos->size(3), " angles, sin ", sin->size(3));
    for (const auto& [name, x] : {std::pair("cos", &cos), std::pair("sin", &sin)})
      check((*x)->size(1) == 1 || p.key_heads == p.heads, op, ": ", name, " has ", (*x)->size(1),
            " heads, q ", p.heads, ", k ", p.key_heads);
    p.cos = broadcast<T>(cos), p.sin = broadcast<T>(sin);
    p.half = cos->size(3), p.interleaved = interleaved;
  }
  return p;
}

template <class Body>
auto of_type(const char* op, const Tensor& q, const Body& body) {
  if (q.scalar_type() == ScalarType::Double) return body(double{});
  if (q.scalar_type() != ScalarType::Float)
    fail(op, ": q has dtype ", describe(q.scalar_type()), "; it takes Float or Double");
  return body(float{});
}

// Cosines or sines by which q and k turn, as `Turn` takes them.
Optional of_places(const char* op, const char* name, const Tensor& q, const Tensor& k,
                   const Optional& given) {
  return given ? Optional(angles(op, name, q, *given, std::max(q.size(2), k.size(2)))) : given;
}

// in_bias: (3, H, D), added to q, k and v as they are read, and query_weight: (D, D), which queries are
// multiplied by then; neither where queries and keys turn
std::tuple<Tensor, Tensor> forward_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Optional& in_bias, const Optional& query_weight,
                                      const Optional& mask, const Optional& padding, const Optional& bias,
                                      const Optional& slopes, const Optional& seed, const Optional& of_cos,
                                      const Optional& of_sin, bool is_causal, double scale, double softcap,
                                      int64_t left, int64_t right, double dropout_p, bool interleaved) {
  return of_type(op, q, [&](auto element) {
    using T = decltype(element);
    const Optional cos = of_places(op, "cos", q, k, of_cos), sin = of_places(op, "sin", q, k, of_sin);
    auto p = arguments<T>(op, q, k, v, mask, padding, bias, slopes, seed, cos, sin, is_causal, scale, softcap,
                          left, right, dropout_p, interleaved);
    for (const auto& [name, x, size] : {std::tuple("in_bias", &in_bias, 3 * p.heads * p.head),
                                        std::tuple("query_weight", &query_weight, p.head * p.head)}) {
      check_dtype(op, name, *x, q.scalar_type());
      if (*x && !((*x)->is_contiguous() && (*x)->numel() == size))
        fail(op, ": ", name, " has ", (*x)->numel(), " elements; it needs ", size, ", without gaps");
    }
    if (in_bias && (p.key_heads != p.heads || p.values != p.head))
      fail(op, ": q, k and v need to have the same heads and head dim");
    p.added = in_bias ? data<T>(*in_bias) : nullptr;
    p.weight = query_weight ? data<T>(*query_weight) : nullptr;
    const int64_t row = p.heads * p.values;  // of one place, whichever of batch and length comes first
    const bool length_first = q.stride(0) < q.stride(2);
    Tensor out =
        new_strided(q, {p.batch, p.heads, p.queries, p.values},
                    {length_first ? row : p.queries * row, p.values, length_first ? p.batch * row : row, 1});
    Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.queries});
    expect_writes(out.mutable_data_ptr(), out.numel() * sizeof(T));
    const int64_t heads = p.batch * p.heads, blocks = (p.queries + forward_queries - 1) / forward_queries;
    if (heads * blocks == 0) return std::make_tuple(out, lse);
    const int64_t held = forward_queries * (p.head + p.values) * sizeof(T);
    int64_t each = std::clamp<int64_t>(most_held / std::max<int64_t>(held, 1), 1, most_blocks);
    while (each > 1 && heads * ((blocks + each - 1) / each) < 2 * int64_t(torch::stable::get_num_threads()))
      --each;  // or threads would have none
    const Forward<T> loop{p, each * forward_queries, static_cast<T*>(out.mutable_data_ptr()),
                          static_cast<T*>(lse.mutable_data_ptr()), operand<T>(out)};
    parallel(heads * loop.spans(), 1, loop);
    return std::make_tuple(out, lse);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& mask,
                                   const Optional& padding, const Optional& bias, const Optional& slopes,
                                   const Optional& seed, const Optional& cos, const Optional& sin,
                                   bool is_causal, double scale, double softcap, int64_t left, int64_t right,
                                   double dropout_p, bool interleaved) {
  return forward_of(forward_name, q, k, v, {}, {}, mask, padding, bias, slopes, seed, cos, sin, is_causal,
                    scale, softcap, left, right, dropout_p, interleaved);
}

Tensor projected(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& in_bias,
                 const Optional& query_weight, const Optional& mask, const Optional& padding,
                 const Optional& bias, bool is_causal, double scale) {
  return std::get<0>(forward_of("projected_attention", q, k, v, in_bias, query_weight, mask, padding, bias,
                                {}, {}, {}, {}, is_causal, scale, 0, -1, -1, 0, false));
}

Tensor without_gaps(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Optional& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Optional& mask, const Optional& padding, const Optional& bias, const Optional& slopes,
    const Optional& seed, const Optional& of_cos, const Optional& of_sin, const Tensor& out,
    const Tensor& lse, bool is_causal, double scale, double softcap, int64_t left, int64_t right,
    double dropout_p, bool interleaved, bool bias_grad) {
  return of_type(backward_name, q, [&](auto element) {
    using T = decltype(element);
    const Optional cos = of_places(backward_name, "cos", q, k, of_cos),
                   sin = of_places(backward_name, "sin", q, k, of_sin);
    const auto p = arguments<T>(backward_name, q, k, v, mask, padding, bias, slopes, seed, cos, sin,
                                is_causal, scale, softcap, left, right, dropout_p, interleaved);
    for (const auto& [name, x] :
         {std::pair("grad_out", &grad), std::pair("out", &out), std::pair("lse", &lse)})
      check_dtype(backward_name, name, *x, q.scalar_type());
    check_dtype(backward_name, "grad_lse", grad_lse, q.scalar_type());
    const Tensor of_rows = without_gaps(lse);
    const Optional of_lse = grad_lse ? Optional(without_gaps(*grad_lse)) : Optional();
    const Upstream<T> up{operand<T>(grad), operand<T>(out), data<T>(of_rows),
                         of_lse ? data<T>(*of_lse) : nullptr};
    Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
    for (const Tensor* x : {&dq, &dk, &dv}) expect_writes(x->mutable_data_ptr(), x->numel() * sizeof(T));
    Tensor db = bias_grad ? torch::stable::new_empty(*bias, bias->sizes()) : torch::stable::new_empty(q, {0});
    const int64_t heads = p.batch * p.key_heads, threads = torch::stable::get_num_threads();
    const int64_t parts = std::max<int64_t>(1, std::min(p.blocks(), heads ? threads / heads : 1));
    const int64_t held = query_block * (3 * p.head + 2 * p.values) * sizeof(T);
    const int64_t together = std::clamp<int64_t>(2 * most_held / std::max<int64_t>(held, 1), 1,
                                                 std::clamp<int64_t>(p.blocks() / parts, 1, most_blocks));
    Tensor partial =
        torch::stable::new_empty(q, {parts > 1 ? heads * parts * p.keys * 2 * (p.head + p.values + 64) : 0});
    const Backward<T> loop{p,
                           up,
                           parts,
                           together,
                           static_cast<T*>(dq.mutable_data_ptr()),
                           static_cast<T*>(dk.mutable_data_ptr()),
                           static_cast<T*>(dv.mutable_data_ptr()),
                           operand<T>(dq),
                           operand<T>(dk),
                           operand<T>(dv),
                           static_cast<T*>(partial.mutable_data_ptr())};
    if (heads) parallel(heads * parts, 1, loop);
    if (heads && parts > 1) parallel(heads, 1, Parts<T>{loop});
    if (bias_grad) {
      const BiasBackward<T> of_bias{p,
                                    up,
                                    {bias->size(0), bias->size(1), bias->size(2), bias->size(3)},
                                    static_cast<T*>(db.mutable_data_ptr())};
      if (bias->numel()) parallel(of_bias.blocks(), 1, of_bias);
    }
    return std::make_tuple(dq, dk, dv, db);
  });
}

}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("attention.cpu", TORCH_BOX(&nnfast::cpu::forward));
  m.impl("projected_attention", TORCH_BOX(&nnfast::cpu::projected));
  m.impl("attention_backward.cpu", TORCH_BOX(&nnfast::cpu::backward));
}
