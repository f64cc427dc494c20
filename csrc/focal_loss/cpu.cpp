// The focal loss on the CPU. Long contiguous rows go through vectors of classes; short or strided ones side
// by side, a row to a lane.
#include <atomic>

#include "common/elementwise_cpu.h"
#include "focal_loss/ops.h"

namespace nnfast::cpu {

// The first target that is neither a class nor to be ignored. Reported when the loop is over: torch drops the
// message of what is thrown inside it.
struct BadTarget {
  std::atomic<int64_t> row{std::numeric_limits<int64_t>::max()};

  void at(int64_t bad) {
    int64_t known = row;
    while (bad < known && !row.compare_exchange_weak(known, bad)) {
    }
  }

  template <class T>
  void raise(const SoftmaxRows<T>& rows) const {
    const int64_t bad = row;
    check(bad == std::numeric_limits<int64_t>::max(), "softmax_focal_loss: target has class ",
          rows.target[std::min(bad, rows.rows - 1)], " at index ", bad, "; x has ", rows.classes,
          " classes (ignore_index=", rows.ignore_index, ")");
  }
};

// The class of a row, or -1 where there is none.
template <class T>
NNFAST_INLINE int64_t class_of(const SoftmaxRows<T>& rows, int64_t row, BadTarget& bad) {
  const int64_t target = rows.target[row];
  if (target == rows.ignore_index) return -1;
  if (rows.is_class(target)) [[likely]]
    return target;
  bad.at(row);
  return -1;
}

// exp(x - shift) * scale
template <class Compute>
struct Probability {
  Compute shift, scale;

  template <class Math, class T>
  NNFAST_INLINE T apply(T x) const {
    return Math::exp(x - shift) * scale;
  }
};

// One contiguous row at a time. `Backward` writes dx, else loss and log_sum_exp.
template <class T, bool Backward>
struct LongRows {
  using Compute = typename Scalar<T>::Compute;
  SoftmaxRows<T> rows;
  const Compute* grad;
  Compute* loss;
  T* dx;
  bool stream;
  BadTarget* bad;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const T* const x = rows.x + row * rows.classes;
      const int64_t target = class_of(rows, row, *bad);
      if constexpr (Backward) {
        T* const out = dx + row * rows.classes;
        if (target < 0) {
          std::memset(static_cast<void*>(out), 0, rows.classes * sizeof(T));
          continue;
        }
        // Normalised anew: log_sum_exp is rounded, and p with it by as much as |log_sum_exp| is large.
        const Compute shift = rows.log_sum_exp[row];
        const TargetClass<Compute> at(Scalar<T>::load(x[target]) - shift,
                                      sum_of_others<bytes>(x, target, shift));
        const Compute alpha = rows.alpha ? rows.alpha[target] : Compute(1);
        const Compute slope = grad[row] * at.slope(rows.power, alpha);
        using Write = Map<Probability<Compute>, T, 1>;
        Write{{shift, slope / at.sum}, {x}, out, stream}.template run<bytes>(0, rows.classes);
        out[target] = Scalar<T>::store(-slope * at.q);
      } else {
        const Compute shift = std::max(maximum<bytes>(x), std::numeric_limits<Compute>::lowest());
        const Compute others = sum_of_others<bytes>(x, target, shift);
        if (target < 0) {
          loss[row] = 0;
          rows.log_sum_exp[row] = shift + Precise::log(others);
          continue;
        }
        const TargetClass<Compute> at(Scalar<T>::load(x[target]) - shift, others);
        loss[row] = at.loss(rows.power, rows.alpha ? rows.alpha[target] : Compute(1));
        rows.log_sum_exp[row] = shift + Precise::log(at.sum);
      }
    }
  }

 private:
  static constexpr int ways = 4;  // independent accumulators, against latency

  // Calls visit(pack, way) over n elements, the last pack filled up with -inf.
  template <int bytes, class Visit>
  static NNFAST_INLINE void each(const T* x, int64_t n, const Visit& visit) {
    using P = Pack<T, bytes>;
    int64_t i = 0;
    for (; i + ways * P::lanes <= n; i += ways * P::lanes)
      for (int way = 0; way < ways; ++way) visit(P::load(x + i + way * P::lanes), way);
    for (; i < n; i += P::lanes) {
      if (i + P::lanes <= n) {
        visit(P::load(x + i), 0);
        continue;
      }
      T padded[P::lanes];
      std::fill_n(padded, P::lanes, Scalar<T>::store(-std::numeric_limits<Compute>::infinity()));
      std::memcpy(static_cast<void*>(padded), x + i, (n - i) * sizeof(T));
      visit(P::load(padded), 0);
    }
  }

  // NaN does not count.
  template <int bytes>
  NNFAST_INLINE Compute maximum(const T* x) const {
    using P = Pack<T, bytes>;
    typename P::Compute most[ways];
    for (auto& way : most) way = typename P::Compute{} - std::numeric_limits<Compute>::infinity();
    each<bytes>(x, rows.classes, [&](const P& pack, int way) __attribute__((always_inline)) {
      for (int i = 0; i < P::parts; ++i) most[way] = max(pack.part[i], most[way]);
    });
    for (int way = 1; way < ways; ++way) most[0] = max(most[way], most[0]);
    Compute result = most[0][0];
    for (size_t lane = 1; lane < bytes / sizeof(Compute); ++lane) result = std::max(result, most[0][lane]);
    return result;
  }

  // The sum of exp(x_j - shift) over j != target.
  template <int bytes>
  NNFAST_INLINE Compute sum_of_others(const T* x, int64_t target, Compute shift) const {
    if (target < 0) return sum<bytes>(x, rows.classes, shift);
    return sum<bytes>(x, target, shift) + sum<bytes>(x + target + 1, rows.classes - target - 1, shift);
  }

  template <int bytes>
  static NNFAST_INLINE Compute sum(const T* x, int64_t n, Compute shift) {
    using P = Pack<T, bytes>;
    typename P::Compute sums[ways] = {};
    each<bytes>(x, n, [&](const P& pack, int way) __attribute__((always_inline)) {
      for (int i = 0; i < P::parts; ++i) sums[way] += Scalar<T>::Math::exp(pack.part[i] - shift);
    });
    for (int way = 1; way < ways; ++way) sums[0] += sums[way];
    Compute result = 0;
    for (size_t lane = 0; lane < bytes / sizeof(Compute); ++lane) result += sums[0][lane];
    return result;
  }
};

// 64 rows side by side, `depth` classes of them at a time in a tile that stays in L1.
template <class T, bool Backward>
struct TiledRows {
  using Compute = typename Scalar<T>::Compute;
  using Bits = typename Lanes<Compute>::Bits;
  static constexpr int columns = 64, depth = 32;
  static constexpr Bits none = ~Bits{};
  SoftmaxRows<T> rows;
  const Compute* grad;
  Compute* loss;
  T* dx;
  BadTarget* bad;

  // begin, end: tiles
  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    Tile tile;
    for (int64_t i = begin; i < end; ++i) {
      tile.row = i * columns;
      tile.count = int(std::min<int64_t>(columns, rows.rows - tile.row));
      start(tile);
      for (int64_t c = 0; c < rows.classes; c += depth) {
        copy<false>(tile, c);
        over<bytes>(tile, [&](int v) __attribute__((always_inline)) { add<bytes>(tile, c, v); });
      }
      over<bytes>(tile, [&](int v) __attribute__((always_inline)) { finish<bytes>(tile, v); });
      if constexpr (Backward) {
        for (int64_t c = 0; c < rows.classes; c += depth) {
          if (rows.classes > depth) copy<false>(tile, c);
          over<bytes>(tile, [&](int v) __attribute__((always_inline)) { differentiate<bytes>(tile, c, v); });
          copy<true>(tile, c);
        }
      } else {
        for (int i = 0; i < tile.count; ++i) {
          loss[tile.row + i] = tile.target[i] == none ? Compute(0) : tile.result[i];
          rows.log_sum_exp[tile.row + i] = tile.shift[i];
        }
      }
    }
  }

 private:
  struct Tile {
    alignas(64) Compute x[depth][columns] = {};
    alignas(64) Bits target[columns] = {};
    alignas(64) Compute at_target[columns] = {}, shift[columns] = {}, sum[columns] = {};
    alignas(64) Compute alpha[columns] = {}, result[columns] = {}, scale[columns] = {};
    int64_t row;
    int count;
  };

  template <int bytes>
  struct Vector {
    using type = typename VectorOf<Compute, bytes>::type;
    using bits = typename Lanes<type>::Bits;
    static constexpr int lanes = bytes / sizeof(Compute);
  };

  template <int bytes, class Body>
  static NNFAST_INLINE void over(const Tile& tile, const Body& body) {
    for (int v = 0; v < tile.count; v += Vector<bytes>::lanes) body(v);
  }

  template <class V, class Element>
  static NNFAST_INLINE V load(const Element* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
  }

  template <class V, class Element>
  static NNFAST_INLINE void store(Element* to, V value) {
    std::memcpy(to, &value, sizeof(V));
  }

  NNFAST_INLINE void start(Tile& tile) const {
    for (int i = 0; i < tile.count; ++i) {
      const int64_t row = tile.row + i, target = class_of(rows, row, *bad);
      tile.target[i] = target < 0 ? none : Bits(target);
      tile.at_target[i] = target < 0 ? -std::numeric_limits<Compute>::infinity()
                                     : Scalar<T>::load(rows.x[rows.first(row) + target * rows.inner]);
      tile.alpha[i] = rows.alpha && target >= 0 ? rows.alpha[target] : Compute(1);
      if constexpr (Backward) tile.alpha[i] *= grad[row];
      tile.shift[i] = Backward ? rows.log_sum_exp[row] : std::numeric_limits<Compute>::lowest();
      tile.sum[i] = 0;
    }
  }

  template <bool out>
  NNFAST_INLINE void move(Compute& in_tile, int64_t at) const {
    if constexpr (out)
      dx[at] = Scalar<T>::store(in_tile);
    else
      in_tile = Scalar<T>::load(rows.x[at]);
  }

  // Between the tile and the classes from `c` on of x, or, with `out`, of dx.
  template <bool out>
  NNFAST_INLINE void copy(Tile& tile, int64_t c) const {
    const int64_t classes = std::min<int64_t>(depth, rows.classes - c);
    if (rows.inner == 1) {
      int64_t at = tile.row * rows.classes + c;
      for (int64_t i = 0; i < tile.count; ++i, at += rows.classes)
        for (int64_t j = 0; j < classes; ++j) move<out>(tile.x[j][i], at + j);
      return;
    }
    for (int64_t i = 0; i < tile.count;) {
      const int64_t row = tile.row + i;
      const int64_t run = std::min(tile.count - i, rows.inner - row % rows.inner);
      int64_t at = rows.first(row) + c * rows.inner;
      for (int64_t j = 0; j < classes; ++j, at += rows.inner)
        for (int64_t k = 0; k < run; ++k) move<out>(tile.x[j][i + k], at + k);
      i += run;
    }
  }

  template <int bytes>
  NNFAST_INLINE void add(Tile& tile, int64_t c, int v) const {
    using V = typename Vector<bytes>::type;
    const auto target = load<typename Vector<bytes>::bits>(tile.target + v);
    const int classes = int(std::min<int64_t>(depth, rows.classes - c));
    RunningSum<V> running{load<V>(tile.shift + v), load<V>(tile.sum + v)};
    if constexpr (!Backward) {
      V most = running.maximum;
      for (int j = 0; j < classes; ++j) most = max(load<V>(&tile.x[j][v]), most);
      running.template raise<Precise>(most);
    }
    for (int j = 0; j < classes; ++j) {
      const V e = Scalar<T>::Math::exp(load<V>(&tile.x[j][v]) - running.maximum);
      running.sum += target == Bits(c + j) ? V{} : e;
    }
    store(tile.shift + v, running.maximum);
    store(tile.sum + v, running.sum);
  }

  template <int bytes>
  NNFAST_INLINE void finish(Tile& tile, int v) const {
    using V = typename Vector<bytes>::type;
    const V shift = load<V>(tile.shift + v), alpha = load<V>(tile.alpha + v);
    const TargetClass<V> at(load<V>(tile.at_target + v) - shift, load<V>(tile.sum + v));
    if constexpr (Backward) {
      const V slope = at.slope(rows.power, alpha);
      store(tile.result + v, -slope * at.q);
      store(tile.scale + v, slope / at.sum);
    } else {
      store(tile.result + v, at.loss(rows.power, alpha));
      store(tile.shift + v, shift + Precise::log(at.sum));
    }
  }

  template <int bytes>
  NNFAST_INLINE void differentiate(Tile& tile, int64_t c, int v) const {
    using V = typename Vector<bytes>::type;
    const auto target = load<typename Vector<bytes>::bits>(tile.target + v);
    const V shift = load<V>(tile.shift + v), scale = load<V>(tile.scale + v),
            at_target = load<V>(tile.result + v);
    const int classes = int(std::min<int64_t>(depth, rows.classes - c));
    for (int j = 0; j < classes; ++j) {
      const V p = Scalar<T>::Math::exp(load<V>(&tile.x[j][v]) - shift) * scale;
      const V dx = target == Bits(c + j) ? at_target : p;
      store(&tile.x[j][v], target == none ? V{} : dx);
    }
  }
};

struct FocalDevice : Device {
  static constexpr int64_t elements = 32768;  // least work of a thread
  static constexpr int64_t long_row = 64;

  template <class T, class Compute>
  static void softmax_forward(const SoftmaxRows<T>& rows, Compute* loss, int32_t) {
    run<T, false>(rows, nullptr, loss, nullptr);
  }

  template <class T, class Compute>
  static void softmax_backward(const SoftmaxRows<T>& rows, const Compute* grad, T* dx, int32_t) {
    run<T, true>(rows, grad, nullptr, dx);
  }

 private:
  template <class T, bool Backward>
  static void run(const SoftmaxRows<T>& rows, const typename Scalar<T>::Compute* grad,
                  typename Scalar<T>::Compute* loss, T* dx) {
    BadTarget bad;
    if (Backward) expect_writes(dx, rows.rows * rows.classes * sizeof(T));
    const int64_t grain = std::max<int64_t>(1, elements / std::max<int64_t>(1, rows.classes));
    if (rows.inner == 1 && rows.classes >= long_row) {
      const bool stream = Backward && worth_streaming(2 * rows.rows * rows.classes * sizeof(T));
      parallel(rows.rows, grain, LongRows<T, Backward>{rows, grad, loss, dx, stream, &bad});
    } else {
      using Tiled = TiledRows<T, Backward>;
      const int64_t tiles = (rows.rows + Tiled::columns - 1) / Tiled::columns;
      parallel(tiles, (grain + Tiled::columns - 1) / Tiled::columns, Tiled{rows, grad, loss, dx, &bad});
    }
    bad.raise(rows);
  }
};

}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) { nnfast::FocalLoss<nnfast::cpu::FocalDevice>::add_to(m); }
