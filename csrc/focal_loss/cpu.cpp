// The focal loss on the CPU. Long contiguous rows go through vectors of classes; short or strided ones side
// by side, a row to a lane.
#include <atomic>
#include <memory>

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

// What there is one of for each row: `most` rows side by side, computed as vectors. Neither p nor its sum is
// taken from log_sum_exp alone: that is rounded, and p with it by as much as |log_sum_exp| is large.
template <class T, bool Backward, int most>
struct RowEnds {
  using Compute = typename Scalar<T>::Compute;
  using Bits = typename Lanes<Compute>::Bits;
  static constexpr Bits none = ~Bits{};

  // shift, others: see TargetClass; others is the sum. scale: a gradient is exp(x_j - shift) * scale, and
  // -others * scale at the target.
  alignas(64) Bits target[most] = {};
  alignas(64) Compute at_target[most] = {}, shift[most] = {}, others[most] = {}, alpha[most] = {};
  alignas(64) Compute loss[most] = {}, scale[most] = {};

  NNFAST_INLINE void start(const SoftmaxRows<T>& rows, const Compute* grad, int64_t first, int count,
                           BadTarget& bad) {
    bool all_known = true;
    for (int i = 0; i < count; ++i) {
      const int64_t given = rows.target[first + i];
      const bool known = rows.is_class(given), ignored = given == rows.ignore_index;
      all_known &= known | ignored;
      target[i] = known & !ignored ? Bits(given) : none;
      shift[i] = Backward ? rows.log_sum_exp[first + i] : std::numeric_limits<Compute>::lowest();
      alpha[i] = Backward ? grad[first + i] : Compute(1);
      others[i] = 0;
    }
    if (rows.alpha)
      for (int i = 0; i < count; ++i)
        if (target[i] != none) alpha[i] *= rows.alpha[target[i]];
    if (!all_known) [[unlikely]]
      for (int i = count - 1; i >= 0; --i)
        if (target[i] == none && rows.target[first + i] != rows.ignore_index) bad.at(first + i);
  }

  template <int bytes>
  NNFAST_INLINE void finish(const SoftmaxRows<T>& rows, int count) {
    using V = typename VectorOf<Compute, bytes>::type;
    using B = typename Lanes<V>::Bits;
    for (int v = 0; v < count; v += bytes / int(sizeof(Compute))) {
      const V before = load<V>(shift + v), weight = load<V>(alpha + v);
      const auto ignored = load<B>(target + v) == none;
      const TargetClass<V> at(load<V>(at_target + v) - before, load<V>(others + v));
      if constexpr (Backward) {
        store(scale + v, ignored ? V{} : at.slope(rows.power, weight) / at.sum);
      } else {
        store(loss + v, ignored ? V{} : at.loss(rows.power, weight));
        store(shift + v, before + Precise::log(ignored ? load<V>(others + v) : at.sum));
      }
    }
  }
};

// Contiguous rows of at least a vector, some at a time, each in one pass over memory. `Backward` writes dx,
// else loss and log_sum_exp.
template <class T, bool Backward>
struct LongRows {
  using Compute = typename Scalar<T>::Compute;
  static constexpr int most = 16;
  SoftmaxRows<T> rows;
  const Compute* grad;
  Compute* loss;
  T* dx;
  bool stream;
  BadTarget* bad;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    using P = Pack<T, bytes>;
    const LongRows self = *this;  // in registers, since what is stored may overlap *this
    const int64_t classes = self.rows.classes, stride = (classes / P::lanes + 1) * P::lanes;
    constexpr int64_t near_cache = 128 << 10;
    const int group = int(std::clamp<int64_t>(near_cache / (stride * sizeof(Compute)), 1, most));
    std::unique_ptr<Compute[]> exps;
    if (Backward) exps = std::make_unique_for_overwrite<Compute[]>(group * stride);
    RowEnds<T, Backward, most> ends;
    for (int64_t first = begin; first < end; first += group) {
      const int count = int(std::min<int64_t>(group, end - first));
      const T* const x = self.rows.x + first * classes;
      ends.start(self.rows, self.grad, first, count, *self.bad);
      for (int i = 0; i < count; ++i) {
        const T* const row = x + i * classes;
        const int64_t target = self.rows.target[first + i];
        const bool ignored = ends.target[i] == ends.none;
        ends.at_target[i] = ignored ? Compute(0) : Scalar<T>::load(row[target]);
        if constexpr (Backward) {
          if (!ignored)
            ends.others[i] = sum<bytes, true>(row, classes, target, ends.shift[i], exps.get() + i * stride);
        } else {
          const auto running = scan<bytes>(row, classes, ignored ? -1 : target);
          ends.shift[i] = running.maximum;
          ends.others[i] = running.sum;
        }
      }
      ends.template finish<bytes>(self.rows, count);
      if constexpr (Backward) {
        for (int i = 0; i < count; ++i) {
          T* const out = self.dx + (first + i) * classes;
          if (ends.target[i] == ends.none)
            std::memset(static_cast<void*>(out), 0, classes * sizeof(T));
          else
            self.write<bytes>(out, exps.get() + i * stride, self.rows.target[first + i], ends.scale[i],
                              -ends.others[i]);
        }
      } else {
        std::copy_n(ends.loss, count, self.loss + first);
        std::copy_n(ends.shift, count, self.rows.log_sum_exp + first);
      }
    }
    if constexpr (bytes >= 32)
      if (Backward && stream) asm volatile("sfence" ::: "memory");
  }

 private:
  static constexpr int ways = 4;            // independent accumulators, against latency
  static constexpr int64_t segment = 4096;  // elements that stay in L1 between two passes

  // Calls visit(at, from, way) for packs at x[at] that cover n elements; those before x[from] have been
  // visited.
  template <int bytes, class Visit>
  static NNFAST_INLINE void each(int64_t n, const Visit& visit) {
    constexpr int lanes = Pack<T, bytes>::lanes;
    int64_t i = 0;
    for (; i + ways * lanes <= n; i += ways * lanes)
      for (int way = 0; way < ways; ++way) visit(i + way * lanes, i + way * lanes, way);
    for (; i + lanes <= n; i += lanes) visit(i, i, 0);
    if (i < n) visit(n - lanes, i, 0);
  }

  // Which element of its pack a lane of a part is.
  template <int bytes>
  static NNFAST_INLINE auto elements(int part) {
    using P = Pack<T, bytes>;
    using Bits = typename P::Bits;
    return iota<Bits>() * P::parts + part;
  }

  // NaN does not count.
  template <int bytes>
  static NNFAST_INLINE Compute maximum(const T* x, int64_t n) {
    using P = Pack<T, bytes>;
    typename P::Compute most[ways];
    for (auto& way : most) way = typename P::Compute{} - std::numeric_limits<Compute>::infinity();
    each<bytes>(n, [&](int64_t at, int64_t, int way) __attribute__((always_inline)) {
      const P pack = P::load(x + at);
      for (int i = 0; i < P::parts; ++i) most[way] = max(pack.part[i], most[way]);
    });
    for (int way = 1; way < ways; ++way) most[0] = max(most[way], most[0]);
    return across(most[0], [](auto a, auto b) __attribute__((always_inline)) { return max(a, b); });
  }

  // The sum of exp(x_j - shift) over j != target. With `keep` all go to exps, pack after pack.
  template <int bytes, bool keep>
  static NNFAST_INLINE Compute sum(const T* x, int64_t n, int64_t target, Compute shift,
                                   Compute* exps = nullptr) {
    using P = Pack<T, bytes>;
    typename P::Compute sums[ways] = {};
    each<bytes>(n, [&](int64_t at, int64_t from, int way) __attribute__((always_inline)) {
      const P pack = P::load(x + at);
      if (!keep) __builtin_prefetch(x + at + n);
      for (int i = 0; i < P::parts; ++i) {
        auto e = Scalar<T>::Math::template exp<true>(pack.part[i] - shift);
        if (keep) store(exps + from + i * (P::lanes / P::parts), e);
        if (from != at || uint64_t(target - at) < P::lanes) [[unlikely]] {
          const auto element = elements<bytes>(i);
          using Bits = typename P::Bits;
          using Bit = typename Lanes<Bits>::Element;
          e = (element == Bit(target - at)) | (element < Bit(from - at)) ? typename P::Compute{} : e;
        }
        sums[way] += e;
      }
    });
    for (int way = 1; way < ways; ++way) sums[0] += sums[way];
    return across(sums[0], [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }

  template <int bytes>
  static NNFAST_INLINE RunningSum<Compute> scan(const T* x, int64_t classes, int64_t target) {
    RunningSum<Compute> running;
    for (int64_t begin = 0; begin < classes;) {
      const int64_t left = classes - begin, n = left < 2 * segment ? left : segment;
      const Compute most = maximum<bytes>(x + begin, n);
      if (most > running.maximum) running.template raise<Precise>(most);
      running.sum += sum<bytes, false>(x + begin, n, target < 0 ? -1 : target - begin, running.maximum);
      begin += n;
    }
    return running;
  }

  template <int bytes>
  NNFAST_INLINE void write(T* out, const Compute* exps, int64_t target, Compute scale,
                           Compute at_target) const {
    const auto packs = [&](auto stream) __attribute__((always_inline)) {
      using P = Pack<T, bytes>;
      each<bytes>(rows.classes, [&](int64_t at, int64_t from, int) __attribute__((always_inline)) {
        P pack;
        for (int i = 0; i < P::parts; ++i) {
          auto e = load<typename P::Compute>(exps + from + i * (P::lanes / P::parts));
          if (uint64_t(target - at) < P::lanes) [[unlikely]]
            e = elements<bytes>(i) == typename Lanes<typename P::Bits>::Element(target - at)
                    ? typename P::Compute{} + at_target
                    : e;
          pack.part[i] = e * scale;
        }
        pack.template store<stream>(out + at);
      });
    };
    constexpr int alignment = Pack<T, bytes>::lanes * sizeof(T);
    if constexpr (bytes >= 32)
      if (stream && reinterpret_cast<uintptr_t>(out) % alignment == 0 &&
          rows.classes % Pack<T, bytes>::lanes == 0)
        return packs(std::true_type{});
    packs(std::false_type{});
  }
};

// Swaps rows and columns of a square of as many vectors as a vector has lanes.
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

// 64 rows side by side, a row to a lane, `depth` classes of them at a time in a tile that stays in L1.
template <class T, bool Backward>
struct TiledRows {
  using Compute = typename Scalar<T>::Compute;
  using Ends = RowEnds<T, Backward, 64>;
  static constexpr int columns = 64, depth = 64;
  SoftmaxRows<T> rows;
  const Compute* grad;
  Compute* loss;
  T* dx;
  BadTarget* bad;

  // begin, end: tiles
  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const TiledRows self = *this;  // in registers, since what is stored may overlap *this
    Tile tile;
    for (int64_t i = begin; i < end; ++i) {
      tile.row = i * columns;
      tile.count = int(std::min<int64_t>(columns, rows.rows - tile.row));
      tile.end = std::min(end * columns, rows.rows);
      self.one<bytes>(tile);
    }
  }

 private:
  struct Tile {
    alignas(64) Compute x[depth][columns] = {};
    Ends ends;
    int64_t row, end;  // end: of the rows that this thread writes, in ascending order
    int count;
  };

  template <int bytes>
  NNFAST_INLINE void one(Tile& tile) const {
    const int64_t classes = rows.classes;
    tile.ends.start(rows, grad, tile.row, tile.count, *bad);
    std::fill_n(tile.ends.at_target, tile.count, -std::numeric_limits<Compute>::infinity());
    for (int64_t c = 0; c < classes; c += depth) {
      copy<bytes, false>(tile, c);
      over<bytes>(tile, [&](int v) __attribute__((always_inline)) { add<bytes>(tile, c, v); });
    }
    tile.ends.template finish<bytes>(rows, tile.count);
    if constexpr (Backward) {
      for (int64_t c = 0; c < classes; c += depth) {
        const bool again = classes > depth;
        if (again) copy<bytes, false>(tile, c);
        over<bytes>(tile, [&](int v) __attribute__((always_inline)) {
          again ? differentiate<bytes, true>(tile, c, v) : differentiate<bytes, false>(tile, c, v);
        });
        copy<bytes, true>(tile, c);
      }
    } else {
      std::copy_n(tile.ends.loss, tile.count, loss + tile.row);
      std::copy_n(tile.ends.shift, tile.count, rows.log_sum_exp + tile.row);
    }
  }

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

  template <bool out>
  NNFAST_INLINE void move(Compute& in_tile, int64_t at) const {
    if constexpr (out)
      dx[at] = Scalar<T>::store(in_tile);
    else
      in_tile = Scalar<T>::load(rows.x[at]);
  }

  // Between the tile and the classes from `c` on of x, or, with `out`, of dx.
  template <int bytes, bool out>
  NNFAST_INLINE void copy(Tile& tile, int64_t c) const {
    const int64_t classes = std::min<int64_t>(depth, rows.classes - c);
    if (rows.inner == 1) {
      // All classes: longer rows are LongRows'.
      int done = 0;
      if constexpr (bytes > 16 || sizeof(Compute) == 4)
        for (; done + Vector<bytes>::lanes <= tile.count; done += Vector<bytes>::lanes)
          if (!transposed<bytes, out>(tile, done)) break;
      int64_t at = (tile.row + done) * rows.classes;
      for (int64_t i = done; i < tile.count; ++i, at += rows.classes)
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

  // The same for a vector of contiguous rows from `i` on, or false where that would pass the end. Packs are
  // whole: what one writes past its row, the next row overwrites.
  template <int bytes, bool out>
  NNFAST_INLINE bool transposed(Tile& tile, int i) const {
    using P = Pack<T, bytes>;
    using V = typename Vector<bytes>::type;
    constexpr int n = Vector<bytes>::lanes, width = P::lanes;
    const int classes = int(rows.classes);
    const int64_t first = tile.row + i, last = first + n - 1;
    const int64_t end = out ? tile.end : rows.rows;
    if (classes < width && last * classes + width > end * classes) return false;
    for (int c = 0; c < classes; c += width) {
      const int start = std::max(0, std::min(c, classes - width));
      P packs[n];
      if constexpr (!out)
        for (int row = 0; row < n; ++row) packs[row] = P::load(rows.x + (first + row) * classes + start);
      for (int part = 0; part < P::parts; ++part) {
        V square[n];
        for (int k = 0; k < n; ++k)
          square[k] = out ? load<V>(&tile.x[start + k * P::parts + part][i]) : packs[k].part[part];
        transpose<n / 2>(square);
        for (int k = 0; k < n; ++k)
          if constexpr (out)
            packs[k].part[part] = square[k];
          else if (const int j = start + k * P::parts + part; j < classes)
            store(&tile.x[j][i], square[k]);
      }
      if constexpr (out)
        for (int row = 0; row < n; ++row)
          packs[row].template store<false>(dx + (first + row) * classes + start);
    }
    return true;
  }

  template <int bytes>
  NNFAST_INLINE void add(Tile& tile, int64_t c, int v) const {
    using V = typename Vector<bytes>::type;
    Ends& ends = tile.ends;
    const auto target = load<typename Vector<bytes>::bits>(ends.target + v);
    const int classes = int(std::min<int64_t>(depth, rows.classes - c));
    RunningSum<V> running{load<V>(ends.shift + v), load<V>(ends.others + v)};
    V at_target = load<V>(ends.at_target + v);
    if constexpr (!Backward) {
      V most = running.maximum;
      for (int j = 0; j < classes; ++j) most = max(load<V>(&tile.x[j][v]), most);
      running.template raise<Precise>(most);
    }
    for (int j = 0; j < classes; ++j) {
      const V x = load<V>(&tile.x[j][v]);
      const V e = Scalar<T>::Math::template exp<true>(x - running.maximum);
      const auto here = target == typename Ends::Bits(c + j);
      at_target = here ? x : at_target;
      running.sum += here ? V{} : e;
      if constexpr (Backward) store(&tile.x[j][v], e);
    }
    store(ends.at_target + v, at_target);
    store(ends.shift + v, running.maximum);
    store(ends.others + v, running.sum);
  }

  // Where `again`, the tile holds x, else what add left: exp(x - shift).
  template <int bytes, bool again>
  NNFAST_INLINE void differentiate(Tile& tile, int64_t c, int v) const {
    using V = typename Vector<bytes>::type;
    const Ends& ends = tile.ends;
    const auto target = load<typename Vector<bytes>::bits>(ends.target + v);
    const auto ignored = target == Ends::none;
    const V shift = load<V>(ends.shift + v), scale = load<V>(ends.scale + v);
    const V at_target = -load<V>(ends.others + v);
    const int classes = int(std::min<int64_t>(depth, rows.classes - c));
    for (int j = 0; j < classes; ++j) {
      const V x = load<V>(&tile.x[j][v]);
      V e = x;
      if constexpr (again) e = Scalar<T>::Math::template exp<true>(x - shift);
      const V dx = (target == typename Ends::Bits(c + j) ? at_target : e) * scale;
      store(&tile.x[j][v], ignored ? V{} : dx);
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
