// Batch norm, residual and activation on the CPU. One engine walks over stretches of memory in which the
// channel repeats with a period of whole vectors: rows of channels where they are innermost, else a plane of
// one channel. What is done to a vector is a Body.
#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <numeric>
#include <utility>

#include "common/lanes.h"
#include "conv_bn_act/ops.h"

namespace nnfast::cpu {

// Bit j of a mask belongs to lane j of a Pack.
template <class T, int bytes>
struct LaneBits {
  using P = Pack<T, bytes>;
  using V = typename P::Compute;
  using Bits = typename P::Bits;
  using Mask = decltype(V{} > V{});
  static constexpr int parts = P::parts, lanes = P::lanes;

  // Not 0 in the lanes whose bit is set. Bits, since GCC takes a Mask apart that crosses a branch.
  template <int part>
  static NNFAST_INLINE Bits spread(uint32_t bits) {
    return (Bits{} + bits) & lane_bits<part>(std::make_integer_sequence<int, lanes / parts>());
  }

  static NNFAST_INLINE uint32_t gather(const Mask (&mask)[parts]) {
    if constexpr (bytes == 64 && parts == 2) {
      const Bits both =
          (__builtin_bit_cast(Bits, mask[0]) & 0xffffu) | (__builtin_bit_cast(Bits, mask[1]) & 0xffff0000u);
      uint32_t bits;
      asm("vpmovw2m %1, %0" : "=k"(bits) : "v"(both));
      return bits;
    } else {
      uint32_t bits[parts];
      for (int part = 0; part < parts; ++part) bits[part] = signs(mask[part]);
      if constexpr (parts == 1) return bits[0];
      return apart(bits[0]) | apart(bits[parts - 1]) << 1;
    }
  }

 private:
  template <int part, int... lane>
  static NNFAST_INLINE Bits lane_bits(std::integer_sequence<int, lane...>) {
    return Bits{1u << (lane * parts + part)...};
  }

  static NNFAST_INLINE uint32_t signs(Mask mask) {
    uint32_t bits = 0;
#if defined(__x86_64__)
    constexpr bool wide = sizeof(mask[0]) == 8;
    if constexpr (bytes == 64) {
      uint16_t narrow;
      if constexpr (wide)
        asm("vpmovq2m %1, %0" : "=k"(narrow) : "v"(mask));
      else
        asm("vpmovd2m %1, %0" : "=k"(narrow) : "v"(mask));
      bits = narrow;
    } else if constexpr (bytes == 32) {
      if constexpr (wide)
        asm("vmovmskpd %1, %0" : "=r"(bits) : "x"(mask));
      else
        asm("vmovmskps %1, %0" : "=r"(bits) : "x"(mask));
    } else {
      if constexpr (wide)
        asm("movmskpd %1, %0" : "=r"(bits) : "x"(mask));
      else
        asm("movmskps %1, %0" : "=r"(bits) : "x"(mask));
    }
#else
    for (int i = 0; i < lanes / parts; ++i) bits |= uint32_t(mask[i] & 1) << i;
#endif
    return bits;
  }

  // Bit i becomes bit 2i, for 8 bits.
  static NNFAST_INLINE uint32_t apart(uint32_t bits) {
    bits = (bits | bits << 4) & 0x0f0f;
    bits = (bits | bits << 2) & 0x3333;
    return (bits | bits << 1) & 0x5555;
  }
};

// Walks over stretches. Body offers
//   tables, inputs, outputs, sums   how many coefficients of a column, tensors read, written (or null), sums
//   takes_bits, gives_bits          whether it may read a mask, and whether it may write one
//   apply<Math>(in, column, open, out, term, z)   on vectors; the mask to write says where act.is_open(z)
template <class Body, int bytes>
struct Engine {
  using T = typename Body::Element;
  using Compute = typename Scalar<T>::Compute;
  using P = Pack<T, bytes>;
  using V = typename P::Compute;
  using LB = LaneBits<T, bytes>;
  using Mask = typename LB::Mask;
  static constexpr int tables = Body::tables, inputs = Body::inputs, outputs = Body::outputs;
  static constexpr int sums = Body::sums, parts = P::parts, lanes = P::lanes;
  static constexpr int slots = sums ? sums : 1, sinks = outputs ? outputs : 1;
  static constexpr int unit = lanes < 8 ? 8 : lanes;  // whole bytes of mask

  Body body;
  const T* in[inputs];
  T* out[sinks];
  int64_t width;            // columns: a multiple of `unit`
  int64_t table_width;      // `width`, or `lanes` where all columns share their coefficients
  const Compute* table;     // (tables, table_width), each Pack's columns in the order of its parts
  double* total = nullptr;  // (sums, width), likewise

  // Where column j of a table is.
  static NNFAST_INLINE int64_t place(int64_t j) {
    if constexpr (parts == 1) return j;
    return j / lanes * lanes + j % parts * (lanes / parts) + j % lanes / parts;
  }

  // n elements from `first` on. Bit 0 of the masks is theirs. What costs least is compiled by itself, where a
  // branch would cost as much; one body for all else, since each is compiled for each instruction set.
  NNFAST_INLINE void run(int64_t first, int64_t n, const uint8_t* bits, uint8_t* bits_out,
                         bool stream) const {
    Engine engine = *this;  // in registers, since what is stored may overlap *this
    if constexpr (requires { body.act; })
      for (const Activation cheap : {Activation::identity, Activation::relu})
        if (body.act.which == cheap) {
          engine.body.act.which = cheap;
          return engine.walk(first, n, bits, bits_out, stream);
        }
    engine.walk(first, n, bits, bits_out, stream);
  }

 private:
  NNFAST_INLINE void walk(int64_t first, int64_t n, const uint8_t* bits, uint8_t* bits_out,
                          bool stream) const {
    const int64_t whole = n / lanes * lanes;
    V sum[slots][parts] = {}, odd[slots][parts] = {};
    const auto vector = [&](int64_t i, const Compute* columns, auto& sum) __attribute__((always_inline)) {
      const T* from[inputs];
      T* to[sinks];
      for (int k = 0; k < inputs; ++k) from[k] = in[k] + first + i;
      for (int k = 0; k < outputs; ++k) to[k] = out[k] + first + i;
      uint32_t open = 0;
      if (Body::takes_bits && bits) open = get(bits, i, lanes);
      const uint32_t gives = one<false>(from, to, columns, open, 0, bits_out, stream, sum);
      if (Body::gives_bits && bits_out) put(bits_out, i, lanes, gives);
    };
    if constexpr (sums == 0) {
      const int64_t row = shared() ? whole : width, step = shared() ? 0 : lanes;
      for (int64_t i = 0; i < whole;) {
        const int64_t end = std::min(i + row, whole);
        for (const Compute* columns = table; i < end; i += lanes, columns += step) vector(i, columns, sum);
      }
    } else {
      // where all columns share their sums: they are those of the first
      const int64_t step = shared() ? lanes : width, group = shared() ? 32 : 8;
      for (int64_t at = 0, rows = shared() ? whole / lanes : whole / width; at < whole; rows -= group) {
        const int64_t count = std::clamp<int64_t>(rows, 1, group);
        const int64_t columns = rows > 0 ? step : whole - at;
        for (int64_t j = 0; j < columns; j += lanes) {
          const Compute* const coefficients = column(j);
          int64_t i = at + j, r = 0;
          if constexpr (inputs == 1) {  // there additions would wait for one another
            for (; r + 1 < count; r += 2, i += 2 * step) {
              vector(i, coefficients, sum);
              vector(i + step, coefficients, odd);
            }
            for (int s = 0; s < sums; ++s)
              for (int part = 0; part < parts; ++part) sum[s][part] += std::exchange(odd[s][part], V{});
          }
          for (; r < count; ++r, i += step) vector(i, coefficients, sum);
          if (shared() && rows <= group) continue;  // with what is left
          add(j, sum);
        }
        at += count * step;
      }
    }
    if (whole < n) rest(first, whole, n, bits, bits_out, sum);
    if (sums && (whole < n || shared())) add(shared() ? 0 : whole % width, sum);
  }

  NNFAST_INLINE bool shared() const { return table_width != width || width == lanes; }

  // Adds sums to the total and leaves zeros.
  NNFAST_INLINE void add(int64_t j, V (&sum)[slots][parts]) const {
    for (int s = 0; s < sums; ++s)
      for (int part = 0; part < parts; ++part) {
        double* const to = total + s * width + j + part * (lanes / parts);
        if constexpr (sizeof(Compute) == sizeof(double)) {
          add_to(to, sum[s][part]);
        } else {
          using Narrow = typename VectorOf<Compute, bytes / 2>::type;
          const auto halves = __builtin_bit_cast(std::array<Narrow, 2>, sum[s][part]);
          add_to(to, widened(halves[0]));
          add_to(to + bytes / 8, widened(halves[1]));
        }
        sum[s][part] = V{};
      }
  }

  template <class Narrow>
  static NNFAST_INLINE auto widened(Narrow value) {
    using Wide = typename VectorOf<double, bytes>::type;
#if defined(__x86_64__)
    if constexpr (bytes >= 32) {  // by hand: GCC converts it in parts
      Wide wide;
      asm("vcvtps2pd %1, %0" : "=v"(wide) : "v"(value));
      return wide;
    }
#endif
    return __builtin_convertvector(value, Wide);
  }

  template <class Wide>
  static NNFAST_INLINE void add_to(double* to, Wide value) {
    store(to, load<Wide>(to) + value);
  }

  NNFAST_INLINE const Compute* column(int64_t j) const { return table + (shared() ? 0 : j); }

  // Less than a vector: the last whole one of the stretch again, or else a padded copy.
  NNFAST_INLINE void rest(int64_t first, int64_t i, int64_t n, const uint8_t* bits, uint8_t* bits_out,
                          V (&sum)[slots][parts]) const {
    const int count = int(n - i), again = shared() && n >= lanes ? lanes - count : 0;
    const T* from[inputs];
    T* to[sinks];
    T padded[inputs + sinks][lanes];
    for (int k = 0; k < inputs; ++k) {
      from[k] = in[k] + first + i - again;
      if (again) continue;
      std::memset(static_cast<void*>(padded[k]), 0, sizeof(padded[k]));
      std::memcpy(static_cast<void*>(padded[k]), from[k], count * sizeof(T));
      from[k] = padded[k];
    }
    for (int k = 0; k < outputs; ++k) to[k] = again ? out[k] + first + i - again : padded[inputs + k];
    uint32_t open = 0;
    if (Body::takes_bits && bits) open = get(bits, i, count) << again;
    if (Body::takes_bits && bits && again) open |= get(bits, i - lanes, lanes) >> count;
    const uint32_t keep = ((1u << count) - 1) << again;
    const int64_t j = shared() ? 0 : i % width;
    const uint32_t gives = one<true>(from, to, column(j), open, keep, bits_out, false, sum);
    for (int k = 0; k < outputs; ++k)
      if (out[k] && !again) std::memcpy(static_cast<void*>(out[k] + first + i), to[k], count * sizeof(T));
    if (Body::gives_bits && bits_out) put(bits_out, i, count, (gives & keep) >> again);
  }

  // `partial`: only lanes of `keep` add to the sums.
  template <bool partial>
  NNFAST_INLINE uint32_t one(const T* const (&from)[inputs], T* const (&to)[sinks], const Compute* columns,
                             uint32_t open, uint32_t keep, const uint8_t* bits_out, bool stream,
                             V (&sum)[slots][parts]) const {
    P packs[inputs], results[sinks];
    for (int k = 0; k < inputs; ++k) packs[k] = P::load(from[k]);
    V z[parts] = {};
    const auto each = [&](auto index) __attribute__((always_inline)) {
      constexpr int part = decltype(index)::value;
      V x[inputs], c[tables], y[sinks] = {}, term[slots] = {};
      for (int k = 0; k < inputs; ++k) x[k] = packs[k].part[part];
      for (int k = 0; k < tables; ++k) c[k] = load<V>(columns + k * table_width + part * (lanes / parts));
      const auto opened = LB::template spread<part>(open);
      body.template apply<typename Scalar<T>::Math>(x, c, opened, y, term, z[part]);
      for (int k = 0; k < outputs; ++k) results[k].part[part] = y[k];
      for (int s = 0; s < sums; ++s)
        if constexpr (partial)
          sum[s][part] += LB::template spread<part>(keep) != 0 ? term[s] : V{};
        else
          sum[s][part] += term[s];
    };
    each(std::integral_constant<int, 0>());  // GCC would leave a loop, and the sums in memory
    if constexpr (parts == 2) each(std::integral_constant<int, 1>());
    for (int k = 0; k < outputs; ++k) {
      if (!out[k]) continue;
      if constexpr (bytes >= 32 && !partial)
        if (stream) {
          results[k].template store<true>(to[k]);
          continue;
        }
      results[k].template store<false>(to[k]);
    }
    if constexpr (Body::gives_bits)
      if (bits_out) {
        Mask open_z[parts];
        for (int part = 0; part < parts; ++part) open_z[part] = body.act.is_open(z[part]);
        return LB::gather(open_z);
      }
    return 0;
  }

  // Bits i to i + count of a mask, where i is a multiple of `lanes`.
  static NNFAST_INLINE uint32_t get(const uint8_t* bits, int64_t i, int count) {
    bits += i / 8;
    if constexpr (lanes < 8) return *bits >> i % 8 & ((1u << lanes) - 1);
    typename std::conditional_t<lanes == 8, uint8_t, std::conditional_t<lanes == 16, uint16_t, uint32_t>> all;
    if (count == lanes) {
      std::memcpy(&all, bits, sizeof(all));
      return all;
    }
    uint32_t some = 0;
    for (int j = 0; j < count; j += 8) some |= uint32_t(bits[j / 8]) << j;
    return some;
  }

  static NNFAST_INLINE void put(uint8_t* bits, int64_t i, int count, uint32_t value) {
    bits += i / 8;
    if constexpr (lanes < 8) {
      *bits = uint8_t((i % 8 ? *bits : 0) | value << i % 8);
    } else if (count == lanes) {
      std::memcpy(bits, &value, lanes / 8);
    } else {
      for (int j = 0; j < count; j += 8) bits[j / 8] = uint8_t(value >> j);
    }
  }
};

// Masks of rows that do not fill their last byte, to and from the engine's, which knows no rows.
struct RowBits {
  int64_t columns, row_bytes;

  void pack(const uint8_t* from, int64_t rows, uint8_t* to) const {
    std::memset(to, 0, (rows * columns + 7) / 8 + 1);
    for (int64_t row = 0, bit = 0; row < rows; ++row, bit += columns, from += row_bytes)
      for (int64_t k = 0; k < row_bytes; ++k) {
        const int64_t at = bit + 8 * k;
        const uint32_t shifted = uint32_t(from[k]) << at % 8;
        to[at / 8] |= uint8_t(shifted);
        to[at / 8 + 1] |= uint8_t(shifted >> 8);
      }
  }

  void unpack(const uint8_t* from, int64_t rows, uint8_t* to) const {
    for (int64_t row = 0, bit = 0; row < rows; ++row, bit += columns, to += row_bytes)
      for (int64_t k = 0; k < row_bytes; ++k) {
        const int64_t at = bit + 8 * k, left = columns - 8 * k;
        const uint32_t two = from[at / 8] | uint32_t(from[at / 8 + 1]) << 8;
        to[k] = uint8_t(two >> at % 8 & (left < 8 ? (1u << left) - 1 : 255u));
      }
  }
};

// A Body, its tensors and its channels' coefficients.
template <class Body>
struct Task {
  using T = typename Body::Element;
  using Compute = typename Scalar<T>::Compute;
  static constexpr int sinks = Body::outputs ? Body::outputs : 1;
  Body body;
  Layout layout;
  const T* in[Body::inputs];
  T* out[sinks];
  const uint8_t* bits;
  uint8_t* bits_out;
  const Compute* coefficients;  // (tables, channels)

  // Channels that one stretch goes through.
  int64_t period() const { return layout.channels_last ? layout.channels : 1; }
  bool repacks() const { return (bits || bits_out) && layout.channels_last && layout.channels % 8; }
  RowBits row_bits() const { return {layout.columns(), layout.mask_bytes()}; }

  // The mask's byte of element i, the first of its row or, where rows are planes, a multiple of 8 from it.
  int64_t byte_of(int64_t i) const {
    return i / layout.columns() * layout.mask_bytes() + i % layout.columns() / 8;
  }
};

// An engine at work on a task: its table, its sums.
template <class Body, int bytes>
struct Worker {
  using E = Engine<Body, bytes>;
  using Compute = typename E::Compute;
  const Task<Body>& task;
  const int64_t period, width, table_width;
  Scratch<Compute> table;
  Scratch<double> total;
  Scratch<uint8_t> packed;
  E engine;

  // `columns`: about how many a row of the engine's should have, `most` the elements of a stretch.
  NNFAST_INLINE Worker(const Task<Body>& task, int64_t columns, int64_t most)
      : task(task),
        period(task.period()),
        width(width_of(period, task.layout.channels_last ? columns : 1)),
        table_width(task.layout.channels_last ? width : E::lanes),
        table(E::tables * table_width),
        total(E::sums * width),
        packed(task.repacks() ? most / 8 + 2 : 0),
        engine{task.body, {}, {}, width, table_width, table.get(), total.get()} {
    std::copy_n(task.in, Body::inputs, engine.in);
    std::copy_n(task.out, Task<Body>::sinks, engine.out);
  }

  static int64_t width_of(int64_t period, int64_t columns) {
    int64_t width = period;
    while (width % E::unit) width += period;
    return width * ((columns + width - 1) / width);
  }

  // value(k, c) for `period` channels.
  template <class Value>
  NNFAST_INLINE void fill(const Value& value) const {
    Compute* to = table.get();
    for (int k = 0; k < E::tables; ++k, to += table_width) {
      if (table_width == E::lanes && period == 1) {  // often: of each plane
        const typename E::V all = typename E::V{} + value(k, 0);
        for (int part = 0; part < E::parts; ++part) store(to + part * (E::lanes / E::parts), all);
        continue;
      }
      for (int64_t c = 0; c < period; ++c) to[E::place(c)] = value(k, c);
      for (int64_t j = period; j < table_width; ++j) to[E::place(j)] = to[E::place(j - period)];
    }
  }

  // The task's own coefficients, from channel `first` on.
  NNFAST_INLINE void fill(int64_t first) const {
    const int64_t channels = task.layout.channels;
    fill([&](int k, int64_t c)
             __attribute__((always_inline)) { return task.coefficients[k * channels + first + c]; });
  }

  NNFAST_INLINE void run(int64_t first, int64_t n, bool stream) const {
    const uint8_t* from = task.bits ? task.bits + task.byte_of(first) : nullptr;
    uint8_t* const to = task.bits_out ? task.bits_out + task.byte_of(first) : nullptr;
    const bool repacks = task.repacks();
    if (repacks && from) {
      task.row_bits().pack(from, n / period, packed.get());
      from = packed.get();
    }
    engine.run(first, n, from, to && repacks ? packed.get() : to, stream);
    if (repacks && to) task.row_bits().unpack(packed.get(), n / period, to);
  }

  NNFAST_INLINE void clear() const { std::fill_n(total.get(), E::sums * width, 0.0); }

  // The sums of each channel: (sums, period). What they are made from is lost.
  NNFAST_INLINE void fold(double* to) const {
    double* from = total.get();
    for (int s = 0; s < E::sums; ++s, to += period, from += width) {
      if (period == 1) {
        int64_t left = width;
        for (; left % 2 == 0; left /= 2)
          for (int64_t j = 0; j < left / 2; ++j) from[j] += from[left / 2 + j];
        *to = std::accumulate(from, from + left, 0.0);
        continue;
      }
      std::fill_n(to, period, 0.0);
      for (int64_t j = 0; j < width; j += period)
        for (int64_t c = 0; c < period; ++c) to[c] += from[E::place(j + c)];
    }
  }
};

constexpr int64_t piece = 16384;  // elements that are worked on at once, a multiple of 64
constexpr int64_t grain = 32768;  // least elements of a thread

// Planes in pieces of whole bytes of mask.
struct Pieces {
  int64_t size, count;

  explicit Pieces(int64_t pixels) : count(std::max<int64_t>(1, (pixels + piece - 1) / piece)) {
    size = ((pixels + count - 1) / count + 63) / 64 * 64;
    count = std::max<int64_t>(1, (pixels + size - 1) / size);
  }
};

// Elementwise, in the order of memory.
template <class Body>
struct Map {
  using T = typename Body::Element;
  Task<Body> task;
  Pieces pieces;
  bool stream;

  explicit Map(const Task<Body>& task) : task(task), pieces(task.layout.pixels) {
    const int64_t bytes = task.layout.numel() * sizeof(T);
    stream = worth_streaming((Body::inputs + Body::outputs) * bytes) &&
             task.layout.columns() * sizeof(T) % 64 == 0;
    for (int k = 0; k < Body::outputs; ++k) {
      if (!task.out[k]) continue;
      stream &= reinterpret_cast<uintptr_t>(task.out[k]) % 64 == 0;
      expect_writes(task.out[k], bytes);
    }
  }

  void start() const {
    if (task.layout.channels_last)
      parallel(task.layout.rows(), (grain + task.period() - 1) / task.period(), *this);
    else
      parallel(task.layout.rows() * pieces.count, (grain + pieces.size - 1) / pieces.size, *this);
  }

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const Layout& layout = task.layout;
    const int64_t most = std::max<int64_t>(1, task.repacks() ? piece / layout.channels : layout.rows());
    const Worker<Body, bytes> worker(task, 256, most * layout.channels);
    int64_t plane = begin / pieces.count, from = begin % pieces.count * pieces.size;
    int64_t channel = layout.channels_last ? 0 : plane % layout.channels;
    worker.fill(channel);
    for (int64_t i = begin; i < end;) {
      int64_t first, n;
      if (layout.channels_last) {
        const int64_t rows = std::min(most, end - i);
        first = i * layout.channels;
        n = rows * layout.channels;
        i += rows;
      } else {
        if (from >= layout.pixels) {
          from = 0, ++plane, channel = channel + 1 == layout.channels ? 0 : channel + 1;
          worker.fill(channel);
        }
        first = plane * layout.pixels + from;
        n = std::min(pieces.size, layout.pixels - from);
        from += pieces.size;
        ++i;
      }
      worker.run(first, n, stream);
    }
#if defined(__x86_64__)
    if (stream) asm volatile("sfence" ::: "memory");
#endif
  }
};

// Sums over channels, in parts that each add up blocks of about `piece` elements one after another.
// Accumulate::block(worker, part, channel, n, run) takes one in, where run() adds it up.
template <class Body, class Accumulate>
struct Reduce {
  Task<Body> task;
  Accumulate accumulate;
  Pieces pieces;
  int64_t parts, planes;  // planes of a block

  Reduce(const Task<Body>& task, int64_t parts, const Accumulate& accumulate)
      : task(task),
        accumulate(accumulate),
        pieces(task.layout.pixels),
        parts(parts),
        planes(pieces.count > 1 ? 1
                                : std::max<int64_t>(1, piece / std::max<int64_t>(1, task.layout.pixels))) {}

  static int64_t parts_of(const Layout& layout) {
    return std::clamp<int64_t>(layout.numel() / grain, 1, torch::stable::get_num_threads());
  }

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const Layout& layout = task.layout;
    const int64_t channels = layout.channels, images = layout.images;
    const Worker<Body, bytes> worker(task, 1, 256 * (channels + 64));
    const int64_t rows_a_block =
        worker.width / worker.period * std::clamp<int64_t>(piece / worker.width, 8, 256);
    const int64_t a_channel = pieces.count > 1 ? images * pieces.count : (images + planes - 1) / planes;
    const int64_t all = layout.channels_last ? layout.rows() : channels * a_channel;
    const Scratch<double> sums(Body::sums * worker.period);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = all * (part + 1) / parts;
      for (int64_t i = all * part / parts; i < last;) {
        int64_t channel = 0, first, n, stretches = 1;
        if (layout.channels_last) {
          const int64_t rows = std::min(rows_a_block, last - i);
          first = i * channels;
          n = rows * channels;
          i += rows;
        } else {
          const int64_t image = i % a_channel / pieces.count * planes;
          const int64_t from = i % a_channel % pieces.count * pieces.size;
          channel = i / a_channel;
          first = (image * channels + channel) * layout.pixels + from;
          n = std::min(pieces.size, layout.pixels - from);
          stretches = std::min(planes, images - image);
          ++i;
        }
        const auto add_up = [&](int64_t stretches, int64_t n) __attribute__((always_inline)) {
          worker.clear();
          for (int64_t k = 0; k < stretches; ++k) worker.run(first + k * channels * layout.pixels, n, false);
          worker.fold(sums.get());
          return double(n / worker.period * stretches);
        };
        for (bool ready = accumulate.start(worker, part, channel);; ready = true) {
          // an eighth, to know about what to expect
          const int64_t most = ready ? stretches : (stretches + 7) / 8;
          const int64_t length = ready || stretches > 1 ? n : (n / worker.period + 7) / 8 * worker.period;
          const double count = add_up(most, length);
          accumulate.finish(worker, part, channel, count, sums.get(), ready);
          if (ready) break;
        }
      }
    }
  }
};

// What is done to a vector.

template <class T>
struct Moments {
  using Element = T;
  static constexpr int tables = 1, inputs = 1, outputs = 0, sums = 2;
  static constexpr bool takes_bits = false, gives_bits = false;

  template <class Math, class V, class Open>
  NNFAST_INLINE void apply(const V* in, const V* column, Open, V*, V* term, V&) const {
    const V d = in[0] - column[0];
    term[0] = d;
    term[1] = d * d;
  }
};

// Coefficients of z: mean, scale and shift, and the residual's mean and scale, which are 0 and 1 where it has
// no norm.
template <bool residual>
constexpr int z_tables = residual ? 5 : 3;

template <bool residual, class V>
NNFAST_INLINE V z_of(const V* in, const V* column) {
  V z = (in[0] - column[0]) * column[1] + column[2];
  if constexpr (residual) z += (in[1] - column[3]) * column[4];
  return z;
}

template <class T, bool residual>
struct Forward {
  using Element = T;
  static constexpr int tables = z_tables<residual>, inputs = 1 + residual, outputs = 1, sums = 0;
  static constexpr bool takes_bits = false, gives_bits = true;
  AnyActivation<typename Scalar<T>::Compute> act;

  template <class Math, class V, class Open>
  NNFAST_INLINE void apply(const V* in, const V* column, Open, V* out, V*, V& z) const {
    z = z_of<residual>(in, column);
    out[0] = act.template forward<Math>(z);
  }
};

// What both passes of the gradient start with. in: grad, x, residual.
template <class T, bool residual>
struct Gradients {
  using Element = T;
  static constexpr int inputs = 2 + residual;
  static constexpr bool takes_bits = true, gives_bits = false;
  AnyActivation<typename Scalar<T>::Compute> act;
  bool masked;

  template <class Math, class V, class Open>
  NNFAST_INLINE V dz(const V* in, const V* column, Open open) const {
    if (masked) return act.gated(in[0], open);
    return act.template backward<Math>(in[0], z_of<residual>(in + 1, column));
  }
};

template <class T, bool residual>
struct GradientSums : Gradients<T, residual> {
  static constexpr int tables = z_tables<residual>, outputs = 1, sums = 2 + residual;

  template <class Math, class V, class Open>
  NNFAST_INLINE void apply(const V* in, const V* column, Open open, V* out, V* term, V&) const {
    out[0] = term[0] = this->template dz<Math>(in, column, open);
    term[1] = term[0] * (in[1] - column[0]);
    if constexpr (residual) term[2] = term[0] * (in[2] - column[3]);
  }
};

// Coefficients: z's, then slope and offset of the gradient, then those of the residual's.
template <class T, bool residual>
struct Backward : Gradients<T, residual> {
  static constexpr int first = z_tables<residual>, tables = residual ? 9 : 5, outputs = 1 + residual,
                       sums = 0;

  template <class Math, class V, class Open>
  NNFAST_INLINE void apply(const V* in, const V* column, Open open, V* out, V*, V&) const {
    const V dz = this->template dz<Math>(in, column, open);
    out[0] = input_gradient(column[1], dz, column[first], in[1] - column[0], column[first + 1]);
    if constexpr (residual)
      out[1] = input_gradient(column[4], dz, column[first + 2], in[2] - column[3], column[first + 3]);
  }
};

// Mean and sum of squared deviations, of each part: blockwise, shifted by the mean of what came before, which
// costs never more digits than it adds to the total. The first block is added up twice, to have such a mean.
// Merged by Chan et al. 1983.
struct Statistics {
  int64_t channels;
  double *count, *mean, *m2;  // (parts, channels), zero at first

  static NNFAST_INLINE void merge(double& count, double& mean, double& m2, double n, double other_mean,
                                  double other_m2) {
    if (count == 0) {
      count = n, mean = other_mean, m2 = other_m2;
      return;
    }
    const double total = count + n, share = n / total, delta = other_mean - mean;
    mean = mean * (1 - share) + other_mean * share;
    m2 += other_m2 + delta * delta * share * count;
    count = total;
  }

  // Finite.
  template <class Compute>
  static NNFAST_INLINE Compute shift(double mean) {
    const Compute shift = Compute(mean);
    return shift - shift == 0 ? shift : Compute(0);
  }

  template <class W>
  NNFAST_INLINE bool start(const W& worker, int64_t part, int64_t channel) const {
    fill(worker, part, channel);
    return count[part * channels + channel] != 0;
  }

  template <class W>
  NNFAST_INLINE void finish(const W& worker, int64_t part, int64_t channel, double n, const double* sums,
                            bool last) const {
    const int64_t first = part * channels + channel, period = worker.period;
    double *const means = mean + first, *const counts = count + first, *const m2s = m2 + first;
    if (!last) {
      for (int64_t c = 0; c < period; ++c) means[c] = sums[c] / n;
      return fill(worker, part, channel);
    }
    for (int64_t c = 0; c < period; ++c) {
      const double shifted = sums[c] / n;
      merge(counts[c], means[c], m2s[c], n, shift<typename W::Compute>(means[c]) + shifted,
            sums[period + c] - shifted * sums[c]);
    }
  }

 private:
  template <class W>
  NNFAST_INLINE void fill(const W& worker, int64_t part, int64_t channel) const {
    const double* const means = mean + part * channels + channel;
    worker.fill([&](int, int64_t c)
                    __attribute__((always_inline)) { return shift<typename W::Compute>(means[c]); });
  }
};

// Sums, of each part.
struct Totals {
  int64_t channels;
  double* totals;  // (parts, sums, channels), zero at first

  template <class W>
  NNFAST_INLINE bool start(const W& worker, int64_t, int64_t channel) const {
    worker.fill(channel);
    return true;
  }

  template <class W>
  NNFAST_INLINE void finish(const W& worker, int64_t part, int64_t channel, double, const double* sums,
                            bool) const {
    for (int s = 0; s < W::E::sums; ++s) {
      double* const to = totals + (part * W::E::sums + s) * channels + channel;
      for (int64_t c = 0; c < worker.period; ++c) to[c] += sums[s * worker.period + c];
    }
  }
};

struct BatchNormDevice {
  template <class T, class Compute>
  static void stats(const T* x, const Layout& layout, Compute* mean, Compute* var, const Tensor&) {
    using Body = Moments<T>;
    const int64_t channels = layout.channels, parts = Reduce<Body, Statistics>::parts_of(layout);
    const int64_t n = parts * channels;
    const std::unique_ptr<double[]> partial(new double[3 * n]());
    const Statistics all{channels, partial.get(), partial.get() + n, partial.get() + 2 * n};
    const Task<Body> task{{}, layout, {x}, {}, nullptr, nullptr, nullptr};
    if (layout.numel()) parallel(parts, 1, Reduce<Body, Statistics>(task, parts, all));
    for (int64_t c = 0; c < channels; ++c) {
      double count = 0, total_mean = 0, m2 = 0;
      for (int64_t i = c; i < n; i += channels)
        if (all.count[i] > 0) Statistics::merge(count, total_mean, m2, all.count[i], all.mean[i], all.m2[i]);
      mean[c] = count > 0 ? Compute(total_mean) : std::numeric_limits<Compute>::quiet_NaN();
      var[c] = Compute(m2 / count);
    }
  }

  template <class T, class Compute>
  static void update(T* running, const Compute* value, const Compute* offset, int64_t n, Compute factor,
                     Compute momentum, int32_t) {
    for (int64_t i = 0; i < n; ++i) {
      const Compute now = value[i] * factor + (offset ? offset[i] : Compute(0));
      running[i] = Scalar<T>::store((1 - momentum) * Scalar<T>::load(running[i]) + momentum * now);
    }
  }

  template <class T>
  static void forward(const Problem<T>& problem, T* y, uint8_t* mask, int32_t) {
    const auto run = [&](auto residual) {
      using Body = Forward<T, residual>;
      const auto coefficients = coefficients_of(problem, Body::tables, residual);
      Map<Body>(task_of(Body{problem.act}, problem, nullptr, {y}, nullptr, mask, coefficients)).start();
    };
    problem.residual ? run(std::true_type{}) : run(std::false_type{});
  }

  template <class T, class Compute>
  static void sums(const Problem<T>& problem, const T* grad, const uint8_t* mask, Compute* const (&out)[3],
                   T* dz, const Tensor&) {
    const auto run = [&](auto residual) {
      using Body = GradientSums<T, residual>;
      using Loop = Reduce<Body, Totals>;
      const auto coefficients = coefficients_of(problem, Body::tables, residual);
      const int64_t channels = problem.layout.channels, parts = Loop::parts_of(problem.layout);
      const std::unique_ptr<double[]> totals(new double[parts * Body::sums * channels]());
      const auto task =
          task_of(Body{{problem.act, mask != nullptr}}, problem, grad, {dz}, mask, nullptr, coefficients);
      if (dz) expect_writes(dz, problem.layout.numel() * sizeof(T));
      if (problem.layout.numel()) parallel(parts, 1, Loop(task, parts, {channels, totals.get()}));
      for (int s = 0; s < Body::sums && out[s]; ++s) {
        const Norm<Compute>& norm = s == 2 ? problem.residual_norm : problem.norm;
        for (int64_t c = 0; c < channels; ++c) {
          double total = 0;
          for (int64_t part = 0; part < parts; ++part)
            total += totals[(part * Body::sums + s) * channels + c];
          out[s][c] = Compute(s == 0 ? total : total * norm.inv_std(c));
        }
      }
    };
    needs_residual(problem, mask) ? run(std::true_type{}) : run(std::false_type{});
  }

  template <class T, class Compute>
  static void backward(const Problem<T>& problem, const T* grad, const uint8_t* mask,
                       const Sums<Compute>& sums, const Sums<Compute>& residual_sums, Compute count, T* dx,
                       T* dresidual, int32_t) {
    const auto run = [&](auto residual) {
      using Body = Backward<T, residual>;
      const int64_t channels = problem.layout.channels;
      const auto coefficients = coefficients_of(problem, Body::tables, residual);
      const auto add = [&](int table, const Norm<Compute>& norm, const Sums<Compute>& sums) {
        for (int64_t c = 0; c < channels; ++c) {
          const Gradient<Compute> gradient =
              norm.mean ? Gradient<Compute>(norm, sums, count, c) : Gradient<Compute>();
          coefficients[table * channels + c] = gradient.slope;
          coefficients[(table + 1) * channels + c] = gradient.offset;
        }
      };
      add(Body::first, problem.norm, sums);
      if constexpr (residual) add(Body::first + 2, problem.residual_norm, residual_sums);
      Map<Body>(task_of(Body{{problem.act, mask != nullptr}}, problem, grad, {dx, dresidual}, mask, nullptr,
                        coefficients))
          .start();
    };
    needs_residual(problem, mask) ? run(std::true_type{}) : run(std::false_type{});
  }

 private:
  template <class T>
  using ComputeOf = typename Scalar<T>::Compute;

  template <class T>
  static bool needs_residual(const Problem<T>& problem, const uint8_t* mask) {
    if (problem.residual_norm.mean) return true;
    return problem.residual && !mask && problem.act.which != Activation::identity;
  }

  // (tables, channels), what z needs filled in.
  template <class T>
  static std::unique_ptr<ComputeOf<T>[]> coefficients_of(const Problem<T>& problem, int tables,
                                                         bool residual) {
    const int64_t channels = problem.layout.channels;
    std::unique_ptr<ComputeOf<T>[]> to(new ComputeOf<T>[tables * channels]);
    for (int64_t c = 0; c < channels; ++c) {
      const Affine<ComputeOf<T>> affine(problem.norm, c);
      to[c] = affine.mean;
      to[channels + c] = affine.scale;
      to[2 * channels + c] = affine.shift;
      if (!residual) continue;
      const Affine<ComputeOf<T>> other =
          problem.residual_norm.mean ? Affine(problem.residual_norm, c) : Affine<ComputeOf<T>>{0, 1, 0};
      to[2 * channels + c] += other.shift;
      to[3 * channels + c] = other.mean;
      to[4 * channels + c] = other.scale;
    }
    return to;
  }

  template <class Body, class T = typename Body::Element>
  static Task<Body> task_of(const Body& body, const Problem<T>& problem, const std::type_identity_t<T>* grad,
                            std::initializer_list<std::type_identity_t<T>*> out, const uint8_t* bits,
                            uint8_t* bits_out, const std::unique_ptr<ComputeOf<T>[]>& coefficients) {
    Task<Body> task{body, problem.layout, {}, {}, bits, bits_out, coefficients.get()};
    int k = 0;
    for (const T* tensor : {grad, problem.x, problem.residual})
      if (tensor && k < Body::inputs) task.in[k++] = tensor;
    std::copy_n(out.begin(), Task<Body>::sinks, task.out);
    return task;
  }
};

}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) { nnfast::BatchNormAct<nnfast::cpu::BatchNormDevice>::add_to(m); }
