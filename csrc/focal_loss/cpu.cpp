// The focal loss on the CPU. Long contiguous rows go through vectors of classes; short or strided ones side
// by side, a row to a lane.
#include <atomic>
#include <vector>

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

  bool found() const { return row != std::numeric_limits<int64_t>::max(); }

  template <class T>
  void raise(const SoftmaxRows<T>& rows) const {
    const int64_t bad = row;
    check(!found(), "softmax_focal_loss: target has class ", rows.target[std::min(bad, rows.rows - 1)],
          " at index ", bad, "; x has ", rows.classes, " classes (ignore_index=", rows.ignore_index, ")");
  }
};

// The targets of a vector of rows, all ones where they are to be ignored.
template <int bytes, class T>
NNFAST_INLINE auto classes_of(const SoftmaxRows<T>& rows, int64_t row, BadTarget& bad) {
  using Long = typename VectorOf<int64_t, bytes>::type;
  using Unsigned = typename VectorOf<uint64_t, bytes>::type;
  using Compute = typename Scalar<T>::Compute;
  using Bits = typename VectorOf<typename Lanes<Compute>::Bits, bytes>::type;
  constexpr int parts = sizeof(int64_t) / sizeof(Compute), n = bytes / sizeof(int64_t);
  Bits result[parts];
  Long known = Long{} - 1;
  for (int part = 0; part < parts; ++part) {
    const Long target = load<Long>(rows.target + row + part * n);
    const Long valid = __builtin_bit_cast(Unsigned, target) < uint64_t(rows.classes);
    const Long ignored = target == rows.ignore_index;
    known &= valid | ignored;
    result[part] = __builtin_bit_cast(Bits, ignored | ~valid | target);
  }
  if (across(known, [](auto a, auto b) __attribute__((always_inline)) { return a & b; }) == 0) [[unlikely]]
    for (int i = parts * n - 1; i >= 0; --i) {
      const int64_t target = rows.target[row + i];
      if (!rows.is_class(target) && target != rows.ignore_index) bad.at(row + i);
    }
  if constexpr (parts == 1)
    return result[0];
  else  // the lower halves
    return __builtin_shuffle(result[0], result[1], iota<Bits>() * 2);
}

// What a vector of rows comes to: shift and others as TargetClass has them, x at the target, the target's
// factor.
template <class V>
struct RowEnd {
  V loss, scale, at_target;

  template <class Compute, class Ignored>
  NNFAST_INLINE RowEnd(const Power<Compute>& power, V x, V shift, V others, V alpha, const Ignored& ignored) {
    const TargetClass<V> at(x - shift, others);
    const V q_to_gamma = power.template of<Precise>(at.q);
    const V slope = at.slope(power, alpha, q_to_gamma);
    loss = ignored ? V{} : alpha * q_to_gamma * at.cross_entropy;
    scale = ignored ? V{} : slope * at.inverse;
    at_target = ignored ? V{} : -slope * at.q;
  }
};

// Losses summed, and the mean's denominator, by units of rows that do not depend on the number of threads: a
// long row, or a tile of short ones.
template <class Compute>
struct Totals {
  struct Sum {
    double loss = 0, count = 0;
  };
  std::vector<Sum> units;
  const Compute* weight;  // (classes,) or null

  // In four chains, against latency.
  Sum all() const {
    Sum chains[4];
    for (size_t i = 0; i < units.size(); ++i) {
      chains[i % 4].loss += units[i].loss;
      chains[i % 4].count += units[i].count;
    }
    return {(chains[0].loss + chains[1].loss) + (chains[2].loss + chains[3].loss),
            (chains[0].count + chains[1].count) + (chains[2].count + chains[3].count)};
  }

  // The mean's denominator, ahead of the losses.
  template <class T>
  double denominator(const SoftmaxRows<T>& rows) const {
    double count = 0;
    for (int64_t row = 0; row < rows.rows; ++row) {
      const int64_t target = rows.target[row];
      if (target != rows.ignore_index && rows.is_class(target)) count += weight ? weight[target] : Compute(1);
    }
    return count;
  }
};

// What a forward is given; its losses, or their totals.
template <class T>
struct Forwards {
  using Compute = typename Scalar<T>::Compute;
  SoftmaxRows<T> rows;
  SoftmaxLoss<Compute> to;
  BadTarget* bad;
  Totals<Compute>* totals;
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

  NNFAST_INLINE void start(const Forwards<T>& given, int64_t first, int count) {
    const SoftmaxRows<T>& rows = given.rows;
    bool all_known = true;
    for (int i = 0; i < count; ++i) {
      const int64_t target_class = rows.target[first + i];
      const bool known = rows.is_class(target_class), ignored = target_class == rows.ignore_index;
      all_known &= known | ignored;
      target[i] = known & !ignored ? Bits(target_class) : none;
      shift[i] = std::numeric_limits<Compute>::lowest();
      alpha[i] = 1;
      others[i] = 0;
    }
    if (given.to.alpha)
      for (int i = 0; i < count; ++i)
        if (target[i] != none) alpha[i] = given.to.alpha[target[i]];
    if (!all_known) [[unlikely]]
      for (int i = count - 1; i >= 0; --i)
        if (target[i] == none && rows.target[first + i] != rows.ignore_index) given.bad->at(first + i);
  }

  template <int bytes>
  NNFAST_INLINE void finish(const Forwards<T>& given, int64_t first, int count) {
    using V = typename VectorOf<Compute, bytes>::type;
    using B = typename Lanes<V>::Bits;
    for (int v = 0; v < count; v += bytes / int(sizeof(Compute))) {
      const RowEnd<V> end(given.to.power, load<V>(at_target + v), load<V>(shift + v), load<V>(others + v),
                          load<V>(alpha + v), load<B>(target + v) == none);
      store(loss + v, end.loss);
      store(scale + v, end.scale);
      store(at_target + v, end.at_target);
    }
    std::copy_n(shift, count, given.rows.shift() + first);
    std::copy_n(scale, count, given.rows.scale() + first);
    std::copy_n(at_target, count, given.rows.at_target() + first);
    if (given.to.loss) std::copy_n(loss, count, given.to.loss + first);
  }

  // What row i adds.
  NNFAST_INLINE void add_to(typename Totals<Compute>::Sum& sum, const Compute* weight, int i) const {
    if (target[i] == none) return;
    sum.loss += loss[i];
    sum.count += weight ? weight[target[i]] : Compute(1);
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

// Contiguous rows of at least a vector, some at a time. Of wide types also with their gradient, where `dx` is
// given: exp(x_j - shift), written as it is summed and scaled while it is in L2.
template <class T>
struct LongRows : Forwards<T> {
  using Compute = typename Scalar<T>::Compute;
  T* dx = nullptr;
  Compute grad = 1;  // upstream, of each row
  static constexpr int most = 16;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const LongRows self = *this;  // in registers, since what is stored may overlap *this
    RowEnds<T, most> ends;
    const int64_t in_l2 = (128 << 10) / (self.rows.classes * int64_t(sizeof(T)));
    const int64_t step = self.dx ? std::clamp<int64_t>(in_l2, 1, most) : most;
    for (int64_t first = begin; first < end; first += step) {
      const int count = int(std::min(step, end - first));
      ends.start(self, first, count);
      for (int i = 0; i < count; ++i) {
        const T* const row = self.rows.x + (first + i) * self.rows.classes;
        const bool ignored = ends.target[i] == ends.none;
        const int64_t target = ignored ? -1 : self.rows.target[first + i];
        ends.at_target[i] = ignored ? Compute(0) : Scalar<T>::load(row[target]);
        const auto running =
            self.dx ? scan<bytes, true>(row, self.rows.classes, target, self.row_of_dx(first + i))
                    : scan<bytes, false>(row, self.rows.classes, target, nullptr);
        ends.shift[i] = running.maximum;
        ends.others[i] = running.sum;
      }
      ends.template finish<bytes>(self, first, count);
      if (self.totals)
        for (int i = 0; i < count; ++i) ends.add_to(self.totals->units[first + i], self.totals->weight, i);
      for (int i = 0; self.dx && i < count; ++i) {
        T* const out = self.row_of_dx(first + i);
        scale<bytes>(out, self.rows.classes, ends.scale[i] * self.grad);
        if (ends.target[i] != ends.none)
          out[self.rows.target[first + i]] = Scalar<T>::store(ends.at_target[i] * self.grad);
        else
          std::memset(static_cast<void*>(out), 0, self.rows.classes * sizeof(T));
      }
    }
  }

 private:
  NNFAST_INLINE T* row_of_dx(int64_t row) const { return dx + row * this->rows.classes; }

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

  // The sum of exp(x_j - shift) over j != target. With `keep`, each of them goes to `terms`, the target's
  // too.
  template <int bytes, bool keep>
  static NNFAST_INLINE Compute sum(const T* x, int64_t n, int64_t target, Compute shift, T* terms) {
    using P = Pack<T, bytes>;
    typename P::Compute sums[ways] = {};
    each_pack<P::lanes, ways>(n, [&](int64_t at, int64_t from, int way) __attribute__((always_inline)) {
      P pack = P::load(x + at);
      __builtin_prefetch(x + at + n);
      for (int i = 0; i < P::parts; ++i) {
        auto e = pack.part[i] = Scalar<T>::Math::template exp<true>(pack.part[i] - shift);
        if (from != at || uint64_t(target - at) < P::lanes) [[unlikely]] {
          const auto element = elements<P>(i);
          using Bit = typename Lanes<typename P::Bits>::Element;
          e = (element == Bit(target - at)) | (element < Bit(from - at)) ? typename P::Compute{} : e;
        }
        sums[way] += e;
      }
      if constexpr (keep) pack.template store<false>(terms + at);
    });
    for (int way = 1; way < ways; ++way) sums[0] += sums[way];
    return across(sums[0], [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }

  // Terms that are kept are those of the row's maximum.
  template <int bytes, bool keep>
  static NNFAST_INLINE RunningSum<Compute> scan(const T* x, int64_t classes, int64_t target, T* terms) {
    RunningSum<Compute> running;
    for (int64_t begin = 0; begin < classes;) {
      const int64_t left = classes - begin, n = keep || left < 2 * segment ? left : segment;
      const Compute most = maximum<bytes>(x + begin, n);
      if (most > running.maximum) running.template raise<Precise>(most);
      running.sum += sum<bytes, keep>(x + begin, n, target < 0 ? -1 : target - begin, running.maximum, terms);
      begin += n;
    }
    return running;
  }

  template <int bytes>
  static NNFAST_INLINE void scale(T* x, int64_t n, Compute factor) {
    using P = Pack<T, bytes>;
    each_pack<P::lanes, 4>(n, [&](int64_t at, int64_t from, int) __attribute__((always_inline)) {
      P pack = P::load(x + at);
      for (int i = 0; i < P::parts; ++i) {
        typename P::Compute factors = typename P::Compute{} + factor;
        if (from != at) [[unlikely]]
          factors = elements<P>(i) < typename Lanes<typename P::Bits>::Element(from - at)
                        ? typename P::Compute{} + 1
                        : factors;
        pack.part[i] *= factors;
      }
      pack.template store<false>(x + at);
    });
  }
};

// Contiguous short rows, a row to a lane. begin, end: tiles
template <class T>
struct ShortRows : Forwards<T> {
  using Compute = typename Scalar<T>::Compute;
  static constexpr int most_classes = 64, tile = 64;
  static constexpr int ways = 2;  // vectors at once, against latency

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int n = Lane<bytes>::count;
    const ShortRows self = *this;  // in registers, since what is stored may overlap *this
    const int classes = int(self.rows.classes), width = Pack<T, bytes>::lanes;
    // The last row that whole packs can be loaded from.
    const int64_t last = self.rows.rows - 1 - (std::max(width, classes) - 1) / classes;
    for (int64_t i = begin; i < end; ++i) {
      Part<bytes> part{};
      const int64_t first = i * tile, beyond = std::min(self.rows.rows, first + tile);
      int64_t row = first;
      for (const int64_t end = std::min(beyond, last + 1); row + ways * n <= end; row += ways * n)
        self.template some<bytes, ways>(self.rows.x + row * classes, row, part);
      for (; row < beyond; row += n) {
        if (row + n - 1 <= last)
          self.template some<bytes, 1>(self.rows.x + row * classes, row, part);
        else
          self.template few<bytes>(row, int(std::min<int64_t>(n, beyond - row)), part);
      }
      if (self.totals) self.totals->units[i] = {sum(part.loss), sum(part.count)};
    }
  }

 private:
  template <int bytes>
  struct Lane {
    using V = typename VectorOf<Compute, bytes>::type;
    using Bits = typename Lanes<V>::Bits;
    static constexpr int count = bytes / sizeof(Compute);
  };

  // Of a tile, still a row to a lane.
  template <int bytes>
  struct Part {
    typename Lane<bytes>::V loss, count;
  };

  // In pairs.
  template <class V>
  static NNFAST_INLINE double sum(V value) {
    return across(value, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }

  // Rows at the end, copied to where more can be loaded.
  template <int bytes>
  NNFAST_INLINE void few(int64_t row, int count, Part<bytes>& part) const {
    constexpr int n = Lane<bytes>::count, width = Pack<T, bytes>::lanes;
    const int64_t classes = this->rows.classes;
    T x[n * most_classes + width] = {};
    int64_t targets[n];
    Compute loss[n], slopes[3 * n];
    std::memcpy(x, this->rows.x + row * classes, count * classes * sizeof(T));
    std::fill_n(targets, n, this->rows.ignore_index);
    std::copy_n(this->rows.target + row, count, targets);
    ShortRows copy = *this;
    BadTarget bad;
    copy.rows.target = targets;
    copy.rows.slopes = slopes;
    copy.rows.rows = n;
    copy.to.loss = loss;
    copy.bad = &bad;
    copy.template some<bytes, 1>(x, 0, part);
    if (bad.found()) this->bad->at(row + bad.row);
    for (int k = 0; k < 3; ++k)
      std::copy_n(slopes + k * n, count, this->rows.slopes + k * this->rows.rows + row);
    if (this->to.loss) std::copy_n(loss, count, this->to.loss + row);
  }

  // Vectors of rows: x is that of `row`.
  template <int bytes, int count>
  NNFAST_INLINE void some(const T* x, int64_t row, Part<bytes>& part) const {
    using V = typename Lane<bytes>::V;
    using B = typename Lane<bytes>::Bits;
    using Bit = typename Lanes<B>::Element;
    constexpr int n = Lane<bytes>::count;
    const int classes = int(this->rows.classes);
    alignas(64) V columns[count][most_classes];
    V shift[count], others[count] = {}, at_target[count] = {};
    B target[count];
    for (int k = 0; k < count; ++k) {
      transposed<bytes>(x + k * n * classes, classes, columns[k]);
      target[k] = classes_of<bytes>(this->rows, row + k * n, *this->bad);
      shift[k] = columns[k][0];
    }
    for (int j = 1; j < classes; ++j)
      for (int k = 0; k < count; ++k) shift[k] = max(columns[k][j], shift[k]);
    for (int k = 0; k < count; ++k)  // where all are -inf
      shift[k] = max(shift[k], V{} + std::numeric_limits<Compute>::lowest());
    for (int j = 0; j < classes; ++j)
      for (int k = 0; k < count; ++k) {
        const V e = Scalar<T>::Math::template exp<true>(columns[k][j] - shift[k]);
        const auto here = target[k] == Bit(j);
        at_target[k] = here ? columns[k][j] : at_target[k];
        others[k] += here ? V{} : e;
      }
    for (int k = 0; k < count; ++k) {
      const auto ignored = target[k] == ~Bit{};
      const RowEnd<V> end(this->to.power, at_target[k], shift[k], others[k],
                          picked<bytes>(this->to.alpha, target[k]), ignored);
      store(this->rows.shift() + row + k * n, shift[k]);
      store(this->rows.scale() + row + k * n, end.scale);
      store(this->rows.at_target() + row + k * n, end.at_target);
      if (this->to.loss) store(this->to.loss + row + k * n, end.loss);
      part.loss += end.loss;
      if (this->totals) part.count += ignored ? V{} : picked<bytes>(this->totals->weight, target[k]);
    }
  }

  // values[target], or 1.
  template <int bytes>
  static NNFAST_INLINE typename Lane<bytes>::V picked(const Compute* values,
                                                      typename Lane<bytes>::Bits target) {
    typename Lane<bytes>::V result = typename Lane<bytes>::V{} + 1;
    if (values)
      for (int i = 0; i < Lane<bytes>::count; ++i)
        if (~target[i]) result[i] = values[target[i]];
    return result;
  }

  // Columns of a vector of rows.
  template <int bytes>
  static NNFAST_INLINE void transposed(const T* x, int classes, typename Lane<bytes>::V* columns) {
    using P = Pack<T, bytes>;
    constexpr int n = Lane<bytes>::count, width = P::lanes;
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, float> && bytes == 64) {
      // Quarters put together as they are loaded: half as many shuffles for 16 classes, fewer for less.
      for (int c = 0; c < classes; c += 4) {
        const int start = std::max(0, std::min(c, classes - 4));
        typename Lane<bytes>::V square[4];
        for (int k = 0; k < 4; ++k)
          square[k] = gathered_quarters<typename Lane<bytes>::V>(x + k * classes + start, 4 * classes);
        transpose<2>(square);
        for (int k = 0; k < 4; ++k)
          if (start + k < classes) columns[start + k] = square[k];
      }
      return;
    }
#endif
    for (int c = 0; c < classes; c += width) {
      const int start = std::max(0, std::min(c, classes - width));
      P packs[n];
      for (int k = 0; k < n; ++k) packs[k] = P::load(x + k * classes + start);
      for (int part = 0; part < P::parts; ++part) {
        typename Lane<bytes>::V square[n];
        for (int k = 0; k < n; ++k) square[k] = packs[k].part[part];
        transpose<n / 2>(square);
        for (int k = 0; k < n; ++k)
          if (const int j = start + k * P::parts + part; j < classes) columns[j] = square[k];
      }
    }
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
    constexpr int n = P::lanes / P::parts;
    alignas(64) Compute padded[3][P::lanes], at_target[P::lanes];
    alignas(64) typename Lanes<Compute>::Bits target[P::lanes];
    const Compute *shift = this->rows.shift() + first, *scale = this->rows.scale() + first,
                  *loss_at_target = this->rows.at_target() + first;
    bool all = false;  // rows have a target
    if (count == P::lanes) {
      typename P::Bits known = ~typename P::Bits{};
      for (int i = 0; i < P::parts; ++i) {
        const typename P::Bits classes = classes_of<sizeof(V)>(this->rows, first + i * n, *this->bad);
        store(target + i * n, classes);
        known &= classes != ~typename Lanes<Compute>::Bits{};
      }
      all = across(known, [](auto a, auto b) __attribute__((always_inline)) { return a & b; }) != 0;
    } else {
      int k = 0;
      for (const Compute** from : {&shift, &scale, &loss_at_target}) {
        std::fill_n(padded[k], P::lanes, Compute{});
        std::copy_n(*from, count, padded[k]);
        *from = padded[k++];
      }
    }
    V shifts[P::parts], scales[P::parts];
    for (int i = 0; i < P::parts; ++i) {
      V grad = V{} + *this->grad.grad;
      if (this->grad.step)
        for (int lane = 0; lane < n; ++lane)
          grad[lane] = i * n + lane < count ? this->grad.of(first + i * n + lane) : 0;
      shifts[i] = load<V>(shift + i * n);
      scales[i] = load<V>(scale + i * n) * grad;
      store(at_target + i * n, load<V>(loss_at_target + i * n) * grad);
    }
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
    if (all) [[likely]] {
      for (int i = 0; i < P::lanes; ++i) dx[i * classes + target[i]] = Scalar<T>::store(at_target[i]);
      return;
    }
    for (int i = 0; i < count; ++i) {
      T* const out = dx + i * classes;
      const int64_t target = this->class_of(first + i);
      if (target >= 0)
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

  NNFAST_INLINE void fill(const SoftmaxRows<T>& rows, int64_t c) {
    strided(rows, c, [&](Compute& to, int64_t at) __attribute__((always_inline)) {
      to = Scalar<T>::load(rows.x[at]);
    });
  }
};

// Strided rows. begin, end: tiles
template <class T>
struct TiledRows : Forwards<T> {
  using Compute = typename Scalar<T>::Compute;
  using Ends = RowEnds<T, Tile<T>::columns>;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const TiledRows self = *this;  // in registers, since what is stored may overlap *this
    Tile<T> tile;
    Ends ends;
    for (int64_t i = begin; i < end; ++i) {
      tile.start(self.rows, i);
      ends.start(self, tile.row, tile.count);
      std::fill_n(ends.at_target, tile.count, -std::numeric_limits<Compute>::infinity());
      for (int64_t c = 0; c < self.rows.classes; c += tile.depth) {
        tile.fill(self.rows, c);
        tile.template over<bytes>([&](int v)
                                      __attribute__((always_inline)) { self.add<bytes>(tile, ends, c, v); });
      }
      ends.template finish<bytes>(self, tile.row, tile.count);
      if (self.totals)
        for (int k = 0; k < tile.count; ++k) ends.add_to(self.totals->units[i], self.totals->weight, k);
    }
  }

 private:
  template <int bytes>
  NNFAST_INLINE void add(const Tile<T>& tile, Ends& ends, int64_t c, int v) const {
    using Vector = typename Tile<T>::template Vector<bytes>;
    using V = typename Vector::type;
    const auto target = load<typename Vector::bits>(ends.target + v);
    const int classes = int(std::min<int64_t>(tile.depth, this->rows.classes - c));
    RunningSum<V> running{load<V>(ends.shift + v), load<V>(ends.others + v)};
    V at_target = load<V>(ends.at_target + v), most = running.maximum;
    for (int j = 0; j < classes; ++j) most = max(load<V>(&tile.x[j][v]), most);
    if (c == 0)
      running.maximum = most;
    else
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
        tile.fill(self.rows, c);
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
  static void softmax_forward(const SoftmaxRows<T>& rows, const SoftmaxLoss<Compute>& to, int32_t,
                              Totals<Compute>* totals = nullptr) {
    BadTarget bad;
    const Forwards<T> given{rows, to, &bad, totals};
    if (totals) totals->units.resize(is_long(rows) ? rows.rows : tiles(rows));
    if (is_long(rows))
      parallel(rows.rows, grain(rows), LongRows<T>{given});
    else if (rows.inner == 1)
      parallel(tiles(rows), tile_grain(rows), ShortRows<T>{given});
    else
      parallel(tiles(rows), tile_grain(rows), TiledRows<T>{given});
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

  // Both in one pass over memory: totals and gradient of long rows.
  template <class T>
  static void softmax_both(const SoftmaxRows<T>& rows, const SoftmaxLoss<T>& to, Totals<T>& totals, T grad,
                           T* dx) {
    BadTarget bad;
    totals.units.resize(rows.rows);
    expect_writes(dx, rows.rows * rows.classes * sizeof(T));
    parallel(rows.rows, grain(rows), LongRows<T>{{rows, to, &bad, &totals}, dx, grad});
    bad.raise(rows);
  }

  template <class T>
  static bool is_long(const SoftmaxRows<T>& rows) {
    return rows.inner == 1 && rows.classes >= long_row;
  }

 private:
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

// What has an implementation here alone: the losses of rows as one, without their own memory. x may be (N, C)
// too.
struct CpuFocalLoss : FocalLoss<FocalDevice> {
  // (sum of losses / denominator, denominator, slopes). The denominator is one, or the mean's: how many rows
  // are not ignored, or the sum of their weights.
  static std::tuple<Tensor, Tensor, Tensor> total(const Tensor& x, const Tensor& target, const Alpha& alpha,
                                                  const Alpha& weight, double gamma, int64_t ignore_index,
                                                  bool mean) {
    return dispatch(softmax_name, x, [&](auto element) {
      using T = decltype(element);
      using Compute = typename Scalar<T>::Compute;
      const Arguments<T> arguments(x, target, true);
      const Alpha alphas = arguments.per_class("alpha", alpha);
      const Alpha weights = arguments.per_class("weight", weight);
      check_gamma(softmax_name, gamma);
      Tensor slopes = arguments.new_slopes();
      Totals<Compute> totals{{}, arguments.values(weights)};
      FocalDevice::softmax_forward(
          arguments.rows(slopes.mutable_data_ptr(), ignore_index),
          SoftmaxLoss<Compute>{nullptr, arguments.values(alphas), Power<Compute>(gamma)}, -1, &totals);
      const auto sum = totals.all();
      const double denominator = mean ? sum.count : 1;
      return std::make_tuple(scalar<Compute>(x, sum.loss / denominator), scalar<Compute>(x, denominator),
                             slopes);
    });
  }

  // (factor * sum of losses / denominator, its gradient), of long rows in wide types.
  static std::tuple<Tensor, Tensor> total_and_gradient(const Tensor& x, const Tensor& target,
                                                       const Alpha& alpha, const Alpha& weight, double gamma,
                                                       int64_t ignore_index, bool mean, double factor) {
    return dispatch(softmax_name, x, [&](auto element) -> std::tuple<Tensor, Tensor> {
      using T = decltype(element);
      if constexpr (sizeof(T) < sizeof(float)) {
        fail(softmax_name, ": x has dtype ", describe(x.scalar_type()),
             "; its gradient is made along with its loss in float32 and float64");
      } else {
        const Arguments<T> arguments(x, target, true);
        const Alpha alphas = arguments.per_class("alpha", alpha);
        const Alpha weights = arguments.per_class("weight", weight);
        check_gamma(softmax_name, gamma);
        Tensor slopes = arguments.new_slopes(), dx = new_like(arguments.x);
        const SoftmaxRows<T> rows = arguments.rows(slopes.mutable_data_ptr(), ignore_index);
        check(FocalDevice::is_long(rows), softmax_name, ": x has shape ", describe(x.sizes()),
              "; its gradient is made along with its loss from ", FocalDevice::long_row, " classes on");
        Totals<T> totals{{}, arguments.values(weights)};
        const double scale = factor / (mean ? totals.denominator(rows) : 1);
        FocalDevice::softmax_both(rows, SoftmaxLoss<T>{nullptr, arguments.values(alphas), Power<T>(gamma)},
                                  totals, T(scale), static_cast<T*>(dx.mutable_data_ptr()));
        return {scalar<T>(x, totals.all().loss * scale), dx};
      }
    });
  }

  static Tensor total_backward(const Tensor& grad, const Tensor& denominator, const Tensor& x,
                               const Tensor& target, const Tensor& slopes, int64_t ignore_index) {
    return dispatch(softmax_name, x, [&](auto element) {
      using T = decltype(element);
      using Compute = typename Scalar<T>::Compute;
      const Arguments<T> arguments(x, target, true);
      arguments.check_tensor("grad", grad, {});
      arguments.check_tensor("denominator", denominator, {});
      arguments.check_slopes(slopes);
      const Tensor saved = contiguous(slopes);
      const Compute upstream = *static_cast<const Compute*>(grad.const_data_ptr()) /
                               *static_cast<const Compute*>(denominator.const_data_ptr());
      Tensor dx = new_like(arguments.x);
      FocalDevice::softmax_backward(arguments.rows(const_cast<void*>(saved.const_data_ptr()), ignore_index),
                                    Upstream<Compute>{&upstream, 0}, static_cast<T*>(dx.mutable_data_ptr()),
                                    -1);
      return dx;
    });
  }

 private:
  template <class Compute>
  static Tensor scalar(const Tensor& like, double value) {
    Tensor result = new_floats(like, {}, sizeof(Compute) == 8);
    *static_cast<Compute*>(result.mutable_data_ptr()) = Compute(value);
    return result;
  }
};

}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  nnfast::cpu::CpuFocalLoss::add_to(m);
  m.impl("softmax_focal_loss_total", TORCH_BOX(&nnfast::cpu::CpuFocalLoss::total));
  m.impl("softmax_focal_loss_total_backward", TORCH_BOX(&nnfast::cpu::CpuFocalLoss::total_backward));
  m.impl("softmax_focal_loss_total_and_gradient", TORCH_BOX(&nnfast::cpu::CpuFocalLoss::total_and_gradient));
}
