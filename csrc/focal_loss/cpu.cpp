// The focal loss on the CPU. Long contiguous rows go through vectors of classes; short or strided ones side
// by side, a row to a lane.
#include <atomic>

#include "common/elementwise_cpu.h"
#include "common/lanes.h"
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

// What there is one of for each row: `most` rows side by side, computed as vectors.
template <class T, int most>
struct RowEnds {
  using Compute = typename Scalar<T>::Compute;
  using Bits = typename Lanes<Compute>::Bits;
  static constexpr Bits none = ~Bits{};

  // shift, others: see TargetClass; others is the sum. at_target is x there, and then the gradient.
  alignas(64) Bits target[most] = {};
  alignas(64) Compute at_target[most] = {}, shift[most] = {}, others[most] = {}, alpha[most] = {};
  alignas(64) Compute loss[most] = {}, scale[most] = {};

  NNFAST_INLINE void start(const SoftmaxRows<T>& rows, const SoftmaxLoss<Compute>& to, int64_t first,
                           int count, BadTarget& bad) {
    bool all_known = true;
    for (int i = 0; i < count; ++i) {
      const int64_t given = rows.target[first + i];
      const bool known = rows.is_class(given), ignored = given == rows.ignore_index;
      all_known &= known | ignored;
      target[i] = known & !ignored ? Bits(given) : none;
      shift[i] = std::numeric_limits<Compute>::lowest();
      alpha[i] = 1;
      others[i] = 0;
    }
    if (to.alpha)
      for (int i = 0; i < count; ++i)
        if (target[i] != none) alpha[i] = to.alpha[target[i]];
    if (!all_known) [[unlikely]]
      for (int i = count - 1; i >= 0; --i)
        if (target[i] == none && rows.target[first + i] != rows.ignore_index) bad.at(first + i);
  }

  template <int bytes>
  NNFAST_INLINE void finish(const SoftmaxRows<T>& rows, const SoftmaxLoss<Compute>& to, int64_t first,
                            int count) {
    using V = typename VectorOf<Compute, bytes>::type;
    using B = typename Lanes<V>::Bits;
    for (int v = 0; v < count; v += bytes / int(sizeof(Compute))) {
      const V weight = load<V>(alpha + v);
      const auto ignored = load<B>(target + v) == none;
      const TargetClass<V> at(load<V>(at_target + v) - load<V>(shift + v), load<V>(others + v));
      const V q_to_gamma = to.power.template of<Precise>(at.q);
      const V slope = at.slope(to.power, weight, q_to_gamma);
      store(loss + v, ignored ? V{} : weight * q_to_gamma * at.cross_entropy);
      store(scale + v, ignored ? V{} : slope / at.sum);
      store(at_target + v, ignored ? V{} : -slope * at.q);
    }
    std::copy_n(loss, count, to.loss + first);
    std::copy_n(shift, count, rows.shift() + first);
    std::copy_n(scale, count, rows.scale() + first);
    std::copy_n(at_target, count, rows.at_target() + first);
  }
};

// Calls visit(at, from, way) for packs of `lanes` elements at x[at] that cover n of them; those before
// x[from] have been visited.
template <int lanes, int ways, class Visit>
NNFAST_INLINE void each_pack(int64_t n, const Visit& visit) {
  int64_t i = 0;
  for (; i + ways * lanes <= n; i += ways * lanes)
    for (int way = 0; way < ways; ++way) visit(i + way * lanes, i + way * lanes, way);
  for (; i + lanes <= n; i += lanes) visit(i, i, 0);
  if (i < n) visit(n - lanes, i, 0);
}

// Which element of its pack a lane of a part is.
template <class P>
NNFAST_INLINE auto elements(int part) {
  return iota<typename P::Bits>() * P::parts + part;
}

// Contiguous rows of at least a vector, some at a time.
template <class T>
struct LongRows {
  using Compute = typename Scalar<T>::Compute;
  static constexpr int most = 16;
  SoftmaxRows<T> rows;
  SoftmaxLoss<Compute> to;
  BadTarget* bad;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const LongRows self = *this;  // in registers, since what is stored may overlap *this
    RowEnds<T, most> ends;
    for (int64_t first = begin; first < end; first += most) {
      const int count = int(std::min<int64_t>(most, end - first));
      ends.start(self.rows, self.to, first, count, *self.bad);
      for (int i = 0; i < count; ++i) {
        const T* const row = self.rows.x + (first + i) * self.rows.classes;
        const bool ignored = ends.target[i] == ends.none;
        const int64_t target = ignored ? -1 : self.rows.target[first + i];
        ends.at_target[i] = ignored ? Compute(0) : Scalar<T>::load(row[target]);
        const auto running = scan<bytes>(row, self.rows.classes, target);
        ends.shift[i] = running.maximum;
        ends.others[i] = running.sum;
      }
      ends.template finish<bytes>(self.rows, self.to, first, count);
    }
  }

 private:
  static constexpr int ways = 4;            // independent accumulators, against latency
  static constexpr int64_t segment = 4096;  // elements that stay in L1 between two passes

  // NaN does not count.
  template <int bytes>
  static NNFAST_INLINE Compute maximum(const T* x, int64_t n) {
    using P = Pack<T, bytes>;
    typename P::Compute most[ways];
    for (auto& way : most) way = typename P::Compute{} - std::numeric_limits<Compute>::infinity();
    each_pack<P::lanes, ways>(n, [&](int64_t at, int64_t, int way) __attribute__((always_inline)) {
      const P pack = P::load(x + at);
      for (int i = 0; i < P::parts; ++i) most[way] = max(pack.part[i], most[way]);
    });
    for (int way = 1; way < ways; ++way) most[0] = max(most[way], most[0]);
    return across(most[0], [](auto a, auto b) __attribute__((always_inline)) { return max(a, b); });
  }

  // The sum of exp(x_j - shift) over j != target.
  template <int bytes>
  static NNFAST_INLINE Compute sum(const T* x, int64_t n, int64_t target, Compute shift) {
    using P = Pack<T, bytes>;
    typename P::Compute sums[ways] = {};
    each_pack<P::lanes, ways>(n, [&](int64_t at, int64_t from, int way) __attribute__((always_inline)) {
      const P pack = P::load(x + at);
      __builtin_prefetch(x + at + n);
      for (int i = 0; i < P::parts; ++i) {
        auto e = Scalar<T>::Math::template exp<true>(pack.part[i] - shift);
        if (from != at || uint64_t(target - at) < P::lanes) [[unlikely]] {
          const auto element = elements<P>(i);
          using Bit = typename Lanes<typename P::Bits>::Element;
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
      running.sum += sum<bytes>(x + begin, n, target < 0 ? -1 : target - begin, running.maximum);
      begin += n;
    }
    return running;
  }
};

// What every backward is given. Each is one pass over memory.
template <class T>
struct Backward {
  using Compute = typename Scalar<T>::Compute;
  SoftmaxRows<T> rows;
  Upstream<Compute> grad;
  T* dx;
  BadTarget* bad;

  // The row's target, or -1 where it is to be ignored.
  NNFAST_INLINE int64_t class_of(int64_t row) const {
    const int64_t target = rows.target[row];
    if (target == rows.ignore_index) return -1;
    if (rows.is_class(target)) [[likely]]
      return target;
    bad->at(row);
    return -1;
  }
};

// Of contiguous rows of at least a vector.
template <class T>
struct LongRowsBackward : Backward<T> {
  using Compute = typename Scalar<T>::Compute;
  bool stream;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const LongRowsBackward self = *this;  // in registers, since what is stored may overlap *this
    constexpr int alignment = Pack<T, bytes>::lanes * sizeof(T);
    const int64_t classes = self.rows.classes;
    for (int64_t row = begin; row < end; ++row) {
      T* const out = self.dx + row * classes;
      const int64_t target = self.class_of(row);
      if (target < 0)
        std::memset(static_cast<void*>(out), 0, classes * sizeof(T));
      else if (bytes >= 32 && self.stream && reinterpret_cast<uintptr_t>(out) % alignment == 0 &&
               classes % Pack<T, bytes>::lanes == 0)
        self.template one<bytes, true>(row, target, out);
      else
        self.template one<bytes, false>(row, target, out);
    }
    if constexpr (bytes >= 32)
      if (self.stream) asm volatile("sfence" ::: "memory");
  }

 private:
  template <int bytes, bool stream>
  NNFAST_INLINE void one(int64_t row, int64_t target, T* out) const {
    using P = Pack<T, bytes>;
    const T* const x = this->rows.x + row * this->rows.classes;
    const Compute grad = this->grad.of(row), shift = this->rows.shift()[row];
    const Compute scale = this->rows.scale()[row] * grad, at_target = this->rows.at_target()[row] * grad;
    each_pack<P::lanes, 4>(this->rows.classes, [&](int64_t at, int64_t, int) __attribute__((always_inline)) {
      P pack = P::load(x + at);
      for (int i = 0; i < P::parts; ++i) {
        pack.part[i] = Scalar<T>::Math::template exp<true>(pack.part[i] - shift) * scale;
        if (uint64_t(target - at) < P::lanes) [[unlikely]]
          pack.part[i] = elements<P>(i) == typename Lanes<typename P::Bits>::Element(target - at)
                             ? typename P::Compute{} + at_target
                             : pack.part[i];
      }
      pack.template store<stream && (bytes >= 32)>(out + at);
    });
  }
};

// Of contiguous short rows, as many at a time as a pack has lanes: that many rows fill one pack for each
// class. The classes lie as in memory, and each element is given what its row has by a permutation.
template <class T>
struct ShortRowsBackward : Backward<T> {
  using Compute = typename Scalar<T>::Compute;
  static constexpr int most_classes = 64;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    using P = Pack<T, bytes>;
    const ShortRowsBackward self = *this;  // in registers, since what is stored may overlap *this
    const int classes = int(self.rows.classes);
    Places<P> places[most_classes];
    for (int v = 0; v < classes; ++v)
      for (int part = 0; part < P::parts; ++part)
        for (int lane = 0; lane < P::lanes / P::parts; ++lane)
          places[v].row[part][lane] = (v * P::lanes + lane * P::parts + part) / classes;
    int64_t row = begin;
    for (; row + P::lanes <= end; row += P::lanes)
      self.template some<P>(places, row, P::lanes, self.rows.x + row * classes, self.dx + row * classes);
    if (row == end) return;
    T x[P::lanes * most_classes] = {}, dx[P::lanes * most_classes];
    std::memcpy(x, self.rows.x + row * classes, (end - row) * classes * sizeof(T));
    self.template some<P>(places, row, int(end - row), x, dx);
    std::memcpy(self.dx + row * classes, dx, (end - row) * classes * sizeof(T));
  }

 private:
  // Whose element each lane is.
  template <class P>
  struct Places {
    typename P::Bits row[P::parts];
  };

  template <class P>
  NNFAST_INLINE void some(const Places<P>* places, int64_t first, int count, const T* x, T* dx) const {
    using V = typename P::Compute;
    alignas(64) Compute shift[P::lanes] = {}, scale[P::lanes] = {}, at_target[P::lanes];
    std::copy_n(this->rows.shift() + first, count, shift);
    for (int i = 0; i < count; ++i) {
      const Compute grad = this->grad.of(first + i);
      scale[i] = this->rows.scale()[first + i] * grad;
      at_target[i] = this->rows.at_target()[first + i] * grad;
    }
    V shifts[P::parts], scales[P::parts];
    std::memcpy(shifts, shift, sizeof(shift));
    std::memcpy(scales, scale, sizeof(scale));
    const int classes = int(this->rows.classes);
    for (int v = 0; v < classes; ++v) {
      P pack = P::load(x + v * P::lanes);
      for (int i = 0; i < P::parts; ++i) {
        const auto row = places[v].row[i];
        pack.part[i] = Scalar<T>::Math::template exp<true>(pack.part[i] - picked<P>(shifts, row)) *
                       picked<P>(scales, row);
      }
      pack.template store<false>(dx + v * P::lanes);
    }
    for (int i = 0; i < count; ++i) {
      T* const out = dx + i * classes;
      const int64_t target = this->class_of(first + i);
      if (target >= 0) [[likely]]
        out[target] = Scalar<T>::store(at_target[i]);
      else
        std::memset(static_cast<void*>(out), 0, classes * sizeof(T));
    }
  }

  template <class P>
  static NNFAST_INLINE typename P::Compute picked(const typename P::Compute* from, typename P::Bits lane) {
    if constexpr (P::parts == 1)
      return __builtin_shuffle(from[0], lane);
    else
      return __builtin_shuffle(from[0], from[1], lane);
  }
};

// `columns` rows side by side, a row to a lane, `depth` classes of them at a time, which stay in L1.
template <class T>
struct Tile {
  using Compute = typename Scalar<T>::Compute;
  static constexpr int columns = 64, depth = 64;
  alignas(64) Compute x[depth][columns] = {};
  int64_t row;
  int count;

  template <int bytes>
  struct Vector {
    using type = typename VectorOf<Compute, bytes>::type;
    using bits = typename Lanes<type>::Bits;
    static constexpr int lanes = bytes / sizeof(Compute);
  };

  NNFAST_INLINE void start(const SoftmaxRows<T>& rows, int64_t number) {
    row = number * columns;
    count = int(std::min<int64_t>(columns, rows.rows - row));
  }

  template <int bytes, class Body>
  NNFAST_INLINE void over(const Body& body) const {
    for (int v = 0; v < count; v += Vector<bytes>::lanes) body(v);
  }

  // Classes from `c` on of strided rows: move(element of the tile, index in x).
  template <class Move>
  NNFAST_INLINE void strided(const SoftmaxRows<T>& rows, int64_t c, const Move& move) {
    const int64_t classes = std::min<int64_t>(depth, rows.classes - c);
    for (int64_t i = 0; i < count;) {
      const int64_t run = std::min(count - i, rows.inner - (row + i) % rows.inner);
      int64_t at = rows.first(row + i) + c * rows.inner;
      for (int64_t j = 0; j < classes; ++j, at += rows.inner)
        for (int64_t k = 0; k < run; ++k) move(x[j][i + k], at + k);
      i += run;
    }
  }

  template <int bytes>
  NNFAST_INLINE void fill(const SoftmaxRows<T>& rows, int64_t c) {
    if (rows.inner > 1)
      return strided(rows, c, [&](Compute& to, int64_t at) __attribute__((always_inline)) {
        to = Scalar<T>::load(rows.x[at]);
      });
    // All classes: longer rows are LongRows'.
    int done = 0;
    if constexpr (bytes > 16 || sizeof(Compute) == 4)
      for (; done + Vector<bytes>::lanes <= count; done += Vector<bytes>::lanes)
        if (!transposed<bytes>(rows, done)) break;
    const T* from = rows.x + (row + done) * rows.classes;
    for (int64_t i = done; i < count; ++i, from += rows.classes)
      for (int64_t j = 0; j < rows.classes; ++j) x[j][i] = Scalar<T>::load(from[j]);
  }

 private:
  // The same for a vector of contiguous rows from `i` on, or false where whole packs would pass the end.
  template <int bytes>
  NNFAST_INLINE bool transposed(const SoftmaxRows<T>& rows, int i) {
    using P = Pack<T, bytes>;
    constexpr int n = Vector<bytes>::lanes, width = P::lanes;
    const int classes = int(rows.classes);
    const int64_t first = row + i, last = first + n - 1;
    if (classes < width && last * classes + width > rows.rows * classes) return false;
    for (int c = 0; c < classes; c += width) {
      const int start = std::max(0, std::min(c, classes - width));
      P packs[n];
      for (int k = 0; k < n; ++k) packs[k] = P::load(rows.x + (first + k) * classes + start);
      for (int part = 0; part < P::parts; ++part) {
        typename Vector<bytes>::type square[n];
        for (int k = 0; k < n; ++k) square[k] = packs[k].part[part];
        transpose<n / 2>(square);
        for (int k = 0; k < n; ++k)
          if (const int j = start + k * P::parts + part; j < classes) store(&x[j][i], square[k]);
      }
    }
    return true;
  }
};

// Short or strided rows. begin, end: tiles
template <class T>
struct TiledRows {
  using Compute = typename Scalar<T>::Compute;
  using Ends = RowEnds<T, Tile<T>::columns>;
  SoftmaxRows<T> rows;
  SoftmaxLoss<Compute> to;
  BadTarget* bad;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const TiledRows self = *this;  // in registers, since what is stored may overlap *this
    Tile<T> tile;
    Ends ends;
    for (int64_t i = begin; i < end; ++i) {
      tile.start(self.rows, i);
      ends.start(self.rows, self.to, tile.row, tile.count, *self.bad);
      std::fill_n(ends.at_target, tile.count, -std::numeric_limits<Compute>::infinity());
      for (int64_t c = 0; c < self.rows.classes; c += tile.depth) {
        tile.template fill<bytes>(self.rows, c);
        tile.template over<bytes>([&](int v)
                                      __attribute__((always_inline)) { self.add<bytes>(tile, ends, c, v); });
      }
      ends.template finish<bytes>(self.rows, self.to, tile.row, tile.count);
    }
  }

 private:
  template <int bytes>
  NNFAST_INLINE void add(const Tile<T>& tile, Ends& ends, int64_t c, int v) const {
    using Vector = typename Tile<T>::template Vector<bytes>;
    using V = typename Vector::type;
    const auto target = load<typename Vector::bits>(ends.target + v);
    const int classes = int(std::min<int64_t>(tile.depth, rows.classes - c));
    RunningSum<V> running{load<V>(ends.shift + v), load<V>(ends.others + v)};
    V at_target = load<V>(ends.at_target + v), most = running.maximum;
    for (int j = 0; j < classes; ++j) most = max(load<V>(&tile.x[j][v]), most);
    running.template raise<Precise>(most);
    for (int j = 0; j < classes; ++j) {
      const V x = load<V>(&tile.x[j][v]);
      const V e = Scalar<T>::Math::template exp<true>(x - running.maximum);
      const auto here = target == typename Ends::Bits(c + j);
      at_target = here ? x : at_target;
      running.sum += here ? V{} : e;
    }
    store(ends.at_target + v, at_target);
    store(ends.shift + v, running.maximum);
    store(ends.others + v, running.sum);
  }
};

// Of strided rows. begin, end: tiles
template <class T>
struct TiledRowsBackward : Backward<T> {
  using Compute = typename Scalar<T>::Compute;
  using Bits = typename Lanes<Compute>::Bits;
  static constexpr Bits none = ~Bits{};

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    using Vector = typename Tile<T>::template Vector<bytes>;
    using V = typename Vector::type;
    constexpr int columns = Tile<T>::columns;
    const TiledRowsBackward self = *this;  // in registers, since what is stored may overlap *this
    Tile<T> tile;
    alignas(64) Bits targets[columns] = {};
    alignas(64) Compute shifts[columns] = {}, scales[columns] = {}, at_target[columns] = {};
    for (int64_t i = begin; i < end; ++i) {
      tile.start(self.rows, i);
      for (int k = 0; k < tile.count; ++k) {
        const int64_t target = self.class_of(tile.row + k);
        const Compute grad = self.grad.of(tile.row + k);
        targets[k] = target < 0 ? none : Bits(target);
        shifts[k] = self.rows.shift()[tile.row + k];
        scales[k] = self.rows.scale()[tile.row + k] * grad;
        at_target[k] = self.rows.at_target()[tile.row + k] * grad;
      }
      for (int64_t c = 0; c < self.rows.classes; c += tile.depth) {
        const int classes = int(std::min<int64_t>(tile.depth, self.rows.classes - c));
        tile.template fill<bytes>(self.rows, c);
        tile.template over<bytes>([&](int v) __attribute__((always_inline)) {
          const auto target = load<typename Vector::bits>(targets + v);
          const auto ignored = target == none;
          const V shift = load<V>(shifts + v), scale = load<V>(scales + v), special = load<V>(at_target + v);
          for (int j = 0; j < classes; ++j) {
            const V e = Scalar<T>::Math::template exp<true>(load<V>(&tile.x[j][v]) - shift);
            const V dx = target == Bits(c + j) ? special : e * scale;
            store(&tile.x[j][v], ignored ? V{} : dx);
          }
        });
        tile.strided(self.rows, c, [&](const Compute& from, int64_t at) __attribute__((always_inline)) {
          self.dx[at] = Scalar<T>::store(from);
        });
      }
    }
  }
};

struct FocalDevice : Device {
  static constexpr int64_t elements = 32768;  // least work of a thread
  static constexpr int64_t long_row = 64;

  template <class T, class Compute>
  static void softmax_forward(const SoftmaxRows<T>& rows, const SoftmaxLoss<Compute>& to, int32_t) {
    BadTarget bad;
    if (is_long(rows))
      parallel(rows.rows, grain(rows), LongRows<T>{rows, to, &bad});
    else
      parallel(tiles(rows), tile_grain(rows), TiledRows<T>{rows, to, &bad});
    bad.raise(rows);
  }

  template <class T, class Compute>
  static void softmax_backward(const SoftmaxRows<T>& rows, const Upstream<Compute>& grad, T* dx, int32_t) {
    BadTarget bad;
    const Backward<T> given{rows, grad, dx, &bad};
    const int64_t bytes = rows.rows * rows.classes * sizeof(T);
    expect_writes(dx, bytes);
    if (is_long(rows))
      parallel(rows.rows, grain(rows), LongRowsBackward<T>{given, worth_streaming(2 * bytes)});
    else if (rows.inner == 1)
      parallel(rows.rows, grain(rows), ShortRowsBackward<T>{given});
    else
      parallel(tiles(rows), tile_grain(rows), TiledRowsBackward<T>{given});
    bad.raise(rows);
  }

 private:
  template <class T>
  static bool is_long(const SoftmaxRows<T>& rows) {
    return rows.inner == 1 && rows.classes >= long_row;
  }

  // Rows, and tiles of them, that are worth a thread.
  template <class T>
  static int64_t grain(const SoftmaxRows<T>& rows) {
    return std::max<int64_t>(1, elements / std::max<int64_t>(1, rows.classes));
  }

  template <class T>
  static int64_t tile_grain(const SoftmaxRows<T>& rows) {
    return (grain(rows) + Tile<T>::columns - 1) / Tile<T>::columns;
  }

  template <class T>
  static int64_t tiles(const SoftmaxRows<T>& rows) {
    return (rows.rows + Tile<T>::columns - 1) / Tile<T>::columns;
  }
};

}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) { nnfast::FocalLoss<nnfast::cpu::FocalDevice>::add_to(m); }
