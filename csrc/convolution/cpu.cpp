// 3x3 convolutions at stride 1 on the CPU, channels last, by Winograd's F(2x2, 3x3) (Winograd 1980; Lavin and
// Gray 2015, arXiv:1509.09308): 16 products for 4 results of a channel instead of 36.
//
//   y = A^T [sum over channels of (G w G^T) * (B^T x B)] A     of tiles of 2x2 results, patches of 4x4 pixels
//   dw = G^T [sum over tiles of (A dy A^T) * (B^T x B)] G
//
// A thread transforms the patches of some tiles, which stay in its cache: for each of the 16 points one
// product of matrices follows (`Gemm`), tiles x channels x channels made, and the results' transform. The
// input gradient is the convolution of the gradient by the weights turned round.
#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "activation/math.h"
#include "common/gemm.h"
#include "common/lanes.h"
#include "common/tensor.h"

namespace nnfast::cpu {
namespace {

constexpr int points = 16;  // of a patch, and of its transform

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <int bytes>
using Floats = typename VectorOf<float, bytes>::type;

template <int bytes>
constexpr int lanes_of = bytes / sizeof(float);

// The first n elements of a vector in memory, all of them if `whole`.
template <int bytes, bool whole>
struct Span {
  using V = Floats<bytes>;
  static constexpr bool is_whole = whole;
  int64_t n;

  NNFAST_INLINE V load(const float* from) const {
    V vector{};
    if constexpr (whole)
      std::memcpy(&vector, from, sizeof(V));
    else
      for (int i = 0; i < lanes_of<bytes>; ++i) vector[i] = i < n ? from[i] : 0.0f;
    return vector;
  }

  NNFAST_INLINE V load_if(const float* from) const { return from ? load(from) : V{}; }

  NNFAST_INLINE void store(float* to, V vector) const {
    if constexpr (whole)
      std::memcpy(to, &vector, sizeof(V));
    else
      for (int64_t i = 0; i < n; ++i) to[i] = vector[i];
  }
};

// Not if any is NaN: 0 times what is infinite or NaN is.
template <int bytes>
NNFAST_INLINE bool all_zero(Floats<bytes> vector) {
  bool all = true;
  for (int i = 0; i < lanes_of<bytes>; ++i) all &= vector[i] == 0;
  return all;
}

template <int bytes>
NNFAST_INLINE void store(float* to, Floats<bytes> vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// Calls body(first channel, Span) for the channels [begin, end); up to `padded` with empty spans.
template <int bytes, class Body>
NNFAST_INLINE void for_each_vector(int64_t begin, int64_t end, int64_t padded, const Body& body) {
  constexpr int lanes = lanes_of<bytes>;
  int64_t c = begin;
  for (; c + lanes <= end; c += lanes) body(c, Span<bytes, true>{lanes});
  for (; c < padded; c += lanes) body(c, Span<bytes, false>{std::max<int64_t>(end - c, 0)});
}

// Memory of a thread that is kept from call to call, unless it is much: to touch fresh pages for the first
// time cost half as much as all that was computed in them.
class Workspace {
 public:
  float* get(int64_t n) {
    if (n > size_ || size_ > most) {
      memory_.emplace(n);
      size_ = n;
    }
    return memory_->get();
  }

 private:
  static constexpr int64_t most = 2 << 20;
  int64_t size_ = 0;
  std::optional<Scratch<float>> memory_;
};

// An image batch in memory: (images, height, width, channels).
struct Images {
  int64_t images, height, width, channels;
};

// Results in tiles of 2x2; the patch of tile (i, j) begins at pixel (2 i - pad_height, 2 j - pad_width).
struct Grid {
  int64_t images, rows, columns, pad_height, pad_width;

  Grid(const Images& results, int64_t pad_height, int64_t pad_width)
      : images(results.images),
        rows(ceil_div(results.height, 2)),
        columns(ceil_div(results.width, 2)),
        pad_height(pad_height),
        pad_width(pad_width) {}
  int64_t tiles() const { return images * rows * columns; }

  // Calls body(image, i, j, j_end, t) for every stretch of tiles [first, last) that lies in one row.
  template <class Body>
  NNFAST_INLINE void for_each_row(int64_t first, int64_t last, const Body& body) const {
    for (int64_t t = first; t < last;) {
      const int64_t row = t / columns, j = t % columns, j_end = std::min(columns, j + last - t);
      body(row / rows, row % rows, j, j_end, t - first);
      t += j_end - j;
    }
  }
};

enum class Kind { plain, normed, gated };

// What is convolved: x; act((x - center) * scale + shift); or a gradient x through the activation that made
// y.
struct Input {
  Images size;
  const float *x, *y, *center, *scale, *shift;
  AnyActivation<float> act;

  Kind kind() const {
    if (scale) return Kind::normed;
    return y && act.which != Activation::identity ? Kind::gated : Kind::plain;
  }

  // Some channels of its pixels.
  template <Kind kind, int bytes, bool whole>
  struct Reader {
    using V = Floats<bytes>;
    const Input& input;
    int64_t channel;
    Span<bytes, whole> span;
    V center{}, scale{}, shift{};

    NNFAST_INLINE Reader(const Input& input, int64_t channel, Span<bytes, whole> span)
        : input(input), channel(channel), span(span) {
      if constexpr (kind == Kind::normed) {
        center = span.load_if(input.center ? input.center + channel : nullptr);
        scale = span.load(input.scale + channel);
        shift = span.load(input.shift + channel);
      }
    }

    NNFAST_INLINE V operator()(int64_t pixel) const {
      const int64_t at = pixel * input.size.channels + channel;
      V x = span.load(input.x + at);
      if constexpr (kind == Kind::normed) x = input.act.forward<Precise>((x - center) * scale + shift);
      if constexpr (kind == Kind::gated) x = input.act.backward<Precise>(x, span.load(input.y + at));
      return x;
    }
  };
};

// Where transforms go: point after point, in which tiles are rows of channels; or panels of channels are rows
// of tiles, as `Gemm` takes its right side.
struct Place {
  int64_t point, tile, panel, panel_step;

  static Place rows(int64_t tiles, int64_t channels) { return {tiles * channels + 16, channels, 0, 0}; }
  static Place panels(int64_t tiles, int64_t channels, int64_t panel) {
    return {tiles * channels + 16, panel, panel, tiles * panel};
  }
  int64_t numel() const { return points * point; }
  NNFAST_INLINE int64_t at(int64_t channel) const {
    return panel ? channel / panel * panel_step + channel % panel : channel;
  }
};

// B^T x B of the patches of tiles [first, last), for channels [begin, end).
template <Kind kind>
struct Patches {
  const Input& input;
  const Grid& grid;
  int64_t first, last;
  float* to;
  Place place;
  int64_t origin = 0;  // the channel that lies first in `to`

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t padded = begin + round_up(end - begin, place.panel ? place.panel : lanes_of<bytes>);
    for_each_vector<bytes>(
        begin, end, padded, [&](int64_t channel, auto span) __attribute__((always_inline)) {
          const Input::Reader<kind, bytes, decltype(span)::is_whole> read(input, channel, span);
          rows<bytes>(read, to + place.at(channel - origin));
        });
  }

 private:
  template <int bytes, class Read>
  NNFAST_INLINE void rows(const Read& read, float* out) const {
    using V = Floats<bytes>;
    const int64_t height = input.size.height, width = input.size.width;
    grid.for_each_row(
        first, last,
        [&](int64_t image, int64_t i, int64_t j, int64_t j_end, int64_t t) __attribute__((always_inline)) {
          const int64_t top = 2 * i - grid.pad_height, pixel = (image * height + top) * width;
          const bool rows_inside = top >= 0 && top + 4 <= height;
          int64_t x = 2 * j - grid.pad_width;
          const auto column = [&](int64_t x, V(&to)[4]) __attribute__((always_inline)) {
            V d[4] = {};
            if (x >= 0 && x < width) {
              const int64_t at = pixel + x;
              if (rows_inside) {
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) d[r] = read(at + r * width);
              } else {
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r)
                  if (top + r >= 0 && top + r < height) d[r] = read(at + r * width);
              }
            }
            to[0] = d[0] - d[2];
            to[1] = d[1] + d[2];
            to[2] = d[2] - d[1];
            to[3] = d[1] - d[3];
          };
          V c0[4], c1[4], c2[4], c3[4];
          column(x, c0);
          column(x + 1, c1);
          float* at = out + t * place.tile;
          for (; j < j_end; ++j, x += 2, at += place.tile) {
            column(x + 2, c2);
            column(x + 3, c3);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
              store<bytes>(at + (4 * r) * place.point, c0[r] - c2[r]);
              store<bytes>(at + (4 * r + 1) * place.point, c1[r] + c2[r]);
              store<bytes>(at + (4 * r + 2) * place.point, c2[r] - c1[r]);
              store<bytes>(at + (4 * r + 3) * place.point, c1[r] - c3[r]);
              c0[r] = c2[r];
              c1[r] = c3[r];
            }
          }
        });
  }
};

// A^T m A of the products of tiles [first, last), for channels [begin, end): 2x2 results each. `body.sink`
// takes them; `finite` becomes false if any is infinite or NaN.
template <class Body>
struct Results {
  const Body& body;
  const Grid& grid;
  const Images& size;
  int64_t chunk, first, last;
  const float* from;
  Place place;
  std::atomic<bool>& finite;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    for_each_vector<bytes>(begin, end, end, [&](int64_t channel, auto span) __attribute__((always_inline)) {
      typename Body::template Sink<bytes, decltype(span)::is_whole> sink(body, chunk, channel, span);
      tiles<bytes>(sink, from + channel - begin, channel);
      sink.finish();
    });
  }

 private:
  template <int bytes, class Sink>
  NNFAST_INLINE void tiles(Sink& sink, const float* in, int64_t channel) const {
    using V = Floats<bytes>;
    V check{};
    grid.for_each_row(
        first, last,
        [&](int64_t image, int64_t i, int64_t j, int64_t j_end, int64_t t) __attribute__((always_inline)) {
          const float* at = in + t * place.tile;
          const bool below = 2 * i + 1 < size.height;
          int64_t to = ((image * size.height + 2 * i) * size.width + 2 * j) * size.channels + channel;
          const int64_t row = size.width * size.channels;
          for (; j < j_end; ++j, at += place.tile, to += 2 * size.channels) {
            V s[2][4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
              V m[4];
#pragma GCC unroll 4
              for (int r = 0; r < 4; ++r) std::memcpy(&m[r], at + (4 * r + k) * place.point, sizeof(V));
              s[0][k] = m[0] + m[1] + m[2];
              s[1][k] = m[1] - m[2] - m[3];
            }
            const bool right = 2 * j + 1 < size.width;
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) {
              const V left_z = s[r][0] + s[r][1] + s[r][2], right_z = s[r][1] - s[r][2] - s[r][3];
              check += left_z * 0.0f;
              check += right_z * 0.0f;
              if (r == 1 && !below) break;
              sink.write(to + r * row, left_z);
              if (right) sink.write(to + r * row + size.channels, right_z);
            }
          }
        });
    if (!all_zero<bytes>(check)) finite.store(false, std::memory_order_relaxed);
  }
};

// y = act(z + bias + residual); of a chunk's y, for each channel, the mean and the squared deviations.
struct Activate {
  const float *bias, *residual;
  AnyActivation<float> act;
  float *y, *statistics;  // (chunks, 2, channels), or null
  int64_t channels;

  template <int bytes, bool whole>
  struct Sink {
    using V = Floats<bytes>;
    const Activate& body;
    Span<bytes, whole> span;
    int64_t chunk, channel, count = 0;
    V bias, shift{}, sum{}, squares{};  // sums of y - shift: with y of the chunk, their digits are kept

    NNFAST_INLINE Sink(const Activate& body, int64_t chunk, int64_t channel, Span<bytes, whole> span)
        : body(body), span(span), chunk(chunk), channel(channel) {
      bias = span.load_if(body.bias ? body.bias + channel : nullptr);
    }

    NNFAST_INLINE void write(int64_t at, V z) {
      z += bias;
      if (body.residual) z += span.load(body.residual + at);
      const V y = body.act.forward<Precise>(z);
      span.store(body.y + at, y);
      if (!body.statistics) return;
      if (!count++) shift = y;
      const V apart = y - shift;
      sum += apart;
      squares += apart * apart;
    }

    NNFAST_INLINE void finish() const {
      if (!body.statistics) return;
      float* const to = body.statistics + 2 * chunk * body.channels + channel;
      const V mean = sum / float(count), deviations = squares - sum * mean;
      span.store(to, shift + mean);
      span.store(to + body.channels, max(V{}, deviations));
    }
  };
};

// dx = z + added; with a prologue, dz = z * act'((x - center) * scale + shift), its sums and those of
// dz * (x - center) over a chunk, and dx = dz, times scale if `scaled`.
struct Differentiate {
  const float *added, *x, *center, *scale, *shift;
  AnyActivation<float> act;
  bool scaled;
  float *dx, *sums;  // (chunks, 2, channels)
  int64_t channels;

  template <int bytes, bool whole>
  struct Sink {
    using V = Floats<bytes>;
    const Differentiate& body;
    Span<bytes, whole> span;
    int64_t chunk, channel;
    V center{}, scale{}, shift{}, sum{}, along{};

    NNFAST_INLINE Sink(const Differentiate& body, int64_t chunk, int64_t channel, Span<bytes, whole> span)
        : body(body), span(span), chunk(chunk), channel(channel) {
      if (!body.scale) return;
      center = span.load_if(body.center ? body.center + channel : nullptr);
      scale = span.load(body.scale + channel);
      shift = span.load(body.shift + channel);
    }

    NNFAST_INLINE void write(int64_t at, V z) {
      if (body.added) z += span.load(body.added + at);
      if (body.scale) {
        const V centred = span.load(body.x + at) - center;
        z = body.act.backward<Precise>(z, centred * scale + shift);
        sum += z;
        along += z * centred;
        if (body.scaled) z *= scale;
      }
      span.store(body.dx + at, z);
    }

    NNFAST_INLINE void finish() const {
      if (!body.scale) return;
      float* const to = body.sums + 2 * chunk * body.channels + channel;
      span.store(to, sum);
      span.store(to + body.channels, along);
    }
  };
};

// Tiles that a thread handles at a time, and how channels made are dealt out where tiles are few.
struct Plan {
  int64_t chunk, chunks, parts;

  Plan(int64_t tiles, int64_t channels, int64_t out_channels) {
    constexpr int64_t cache = 1 << 20, fewest = 96;
    const int64_t threads = torch::stable::get_num_threads();
    chunk = std::max(cache / (points * 4 * (channels + out_channels)), fewest);
    chunks = ceil_div(tiles, chunk);
    chunk = ceil_div(tiles, chunks);
    chunks = ceil_div(tiles, chunk);
    parts = chunks % threads && chunks < 4 * threads ? threads : 1;
  }
};

// The convolution of an input by transformed weights (points, panels of channels made, channels).
template <Kind kind, class Body>
struct Convolve {
  const Input& input;
  const Grid& grid;
  const Images& size;
  const Plan& plan;
  const float* weights;
  const Body& body;
  std::atomic<bool>& finite;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int64_t panel = GemmShape<float, bytes>::panel, depth = 128;
    const int64_t channels = input.size.channels, width = round_up(size.channels, panel);
    const int64_t part = round_up(ceil_div(size.channels, plan.parts), panel);
    const Place patches = Place::rows(plan.chunk, round_up(channels, lanes_of<bytes>));
    const Place products = Place::rows(plan.chunk, part);
    static thread_local Workspace of_patches, of_products;
    float *const left = of_patches.get(patches.numel()), *const right = of_products.get(products.numel());
    int64_t transformed = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item / plan.parts, from = item % plan.parts * part;
      const int64_t first = chunk * plan.chunk, last = std::min(first + plan.chunk, grid.tiles());
      const int64_t to = std::min(from + part, size.channels);
      if (from >= to) continue;
      if (chunk != transformed)
        within<bytes>(Patches<kind>{input, grid, first, last, left, patches}, 0, channels);
      transformed = chunk;
      for (int point = 0; point < points; ++point)
        for (int64_t k = 0; k < channels; k += depth)
          within<bytes>(Gemm<float>{last - first, to - from, std::min(depth, channels - k),
                                    left + point * patches.point + k, patches.tile, 1,
                                    weights + (point * width + from) * channels + k * panel,
                                    right + point * products.point, products.tile, k > 0, channels * panel});
      within<bytes>(Results<Body>{body, grid, size, chunk, first, last, right, products, finite}, from, to);
    }
  }
};

// Count, mean and squared deviations (3, channels) of all chunks' (Chan et al. 1979).
void merge_statistics(const Grid& grid, const Images& size, const Plan& plan, const float* of_chunks,
                      float* to) {
  const int64_t channels = size.channels, total = size.images * size.height * size.width;
  const auto count = [&](int64_t chunk) {
    int64_t pixels = 0;
    grid.for_each_row(chunk * plan.chunk, std::min((chunk + 1) * plan.chunk, grid.tiles()),
                      [&](int64_t, int64_t i, int64_t j, int64_t j_end, int64_t) {
                        pixels += std::min<int64_t>(2, size.height - 2 * i) *
                                  (std::min(2 * j_end, size.width) - 2 * j);
                      });
    return double(pixels);
  };
  std::vector<double> mean(channels), squares(channels);
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const double share = count(chunk) / total;
    for (int64_t c = 0; c < channels; ++c) mean[c] += share * of_chunks[2 * chunk * channels + c];
  }
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const double pixels = count(chunk);
    for (int64_t c = 0; c < channels; ++c) {
      const double apart = of_chunks[2 * chunk * channels + c] - mean[c];
      squares[c] += of_chunks[(2 * chunk + 1) * channels + c] + pixels * apart * apart;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    to[c] = float(total);
    to[channels + c] = float(mean[c]);
    to[2 * channels + c] = float(squares[c]);
  }
}

// Sums of (parts, columns) over parts.
void add_parts(const float* from, int64_t parts, int64_t columns, float* to) {
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += from[part * columns + c];
    to[c] = float(sum);
  }
}

// Whether all sums were finite.
template <class Body>
bool convolve(const Input& input, const Grid& grid, const Images& size, const Plan& plan,
              const float* weights, const Body& body) {
  std::atomic<bool> finite = true;
  const auto start = [&]<Kind kind>() {
    parallel(plan.chunks * plan.parts, 1,
             Convolve<kind, Body>{input, grid, size, plan, weights, body, finite});
  };
  switch (input.kind()) {
    case Kind::plain:
      start.template operator()<Kind::plain>();
      break;
    case Kind::normed:
      start.template operator()<Kind::normed>();
      break;
    case Kind::gated:
      start.template operator()<Kind::gated>();
  }
  return finite;
}

// G w G^T of weights at any strides, panels of `made` channels over `channels` others; an item is a panel of
// `group` of the others.
struct TransformWeights {
  static constexpr int64_t group = 16;
  const float* weight;
  int64_t made, channels, made_step, channel_step, row, column;
  float* to;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int64_t panel = GemmShape<float, bytes>::panel;
    const int64_t point = round_up(made, panel) * channels, groups = ceil_div(channels, group);
    alignas(64) float w[group][9][panel] = {};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / groups * panel, width = std::min(panel, made - first);
      const int64_t channel = item % groups * group, count = std::min(group, channels - channel);
      const float* const from = weight + first * made_step + channel * channel_step;
      for (int k = 0; k < 9; ++k) gather<bytes>(from + k / 3 * row + k % 3 * column, width, count, w, k);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t l = 0; l < panel; l += lanes_of<bytes>)
          one<bytes>(w[c], l, to + (first / panel * channels + channel + c) * panel + l, point);
    }
  }

 private:
  // One of the nine weights, of a panel and a group of channels.
  template <int bytes, int64_t panel>
  NNFAST_INLINE void gather(const float* from, int64_t width, int64_t count, float (&w)[group][9][panel],
                            int k) const {
    using V = Floats<bytes>;
    constexpr int lanes = lanes_of<bytes>;
    if (width < panel || count < group || (made_step != 1 && channel_step != 1)) {
      for (int64_t c = 0; c < count; ++c)
        for (int64_t l = 0; l < panel; ++l)
          w[c][k][l] = l < width ? from[l * made_step + c * channel_step] : 0.0f;
    } else if (made_step == 1) {
      for (int64_t c = 0; c < group; ++c) std::memcpy(w[c][k], from + c * channel_step, sizeof(w[c][k]));
    } else {
      for (int64_t l = 0; l < panel; l += lanes)
        for (int64_t c = 0; c < group; c += lanes) {
          V square[lanes];
          for (int i = 0; i < lanes; ++i) square[i] = cpu::load<V>(from + (l + i) * made_step + c);
          transpose<lanes / 2>(square);
          for (int i = 0; i < lanes; ++i) cpu::store(w[c + i][k] + l, square[i]);
        }
    }
  }

  template <int bytes, int64_t panel>
  NNFAST_INLINE void one(const float (&w)[9][panel], int64_t l, float* out, int64_t point) const {
    using V = Floats<bytes>;
    V s[4][3];
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      const Span<bytes, true> span{};
      const V a = span.load(w[k] + l), b = span.load(w[3 + k] + l), c = span.load(w[6 + k] + l);
      s[0][k] = a;
      s[1][k] = (a + b + c) * 0.5f;
      s[2][k] = (a - b + c) * 0.5f;
      s[3][k] = c;
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const V a = s[r][0], b = s[r][1], c = s[r][2];
      store<bytes>(out + (4 * r) * point, a);
      store<bytes>(out + (4 * r + 1) * point, (a + b + c) * 0.5f);
      store<bytes>(out + (4 * r + 2) * point, (a - b + c) * 0.5f);
      store<bytes>(out + (4 * r + 3) * point, c);
    }
  }
};

// A dy A^T of the results' gradients, 2x2 of each tile [first, last), and their sums over channels.
template <Kind kind>
struct Gradients {
  const Input& input;
  const Grid& grid;
  int64_t first, last;
  float* to;
  Place place;
  float* sums;  // of the channels from `begin` on, added to; or null

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t padded = begin + round_up(end - begin, lanes_of<bytes>);
    for_each_vector<bytes>(
        begin, end, padded, [&](int64_t channel, auto span) __attribute__((always_inline)) {
          const Input::Reader<kind, bytes, decltype(span)::is_whole> read(input, channel, span);
          const auto sum = rows<bytes>(read, to + place.at(channel - begin));
          if (sums) span.store(sums + channel - begin, span.load(sums + channel - begin) + sum);
        });
  }

 private:
  template <int bytes, class Read>
  NNFAST_INLINE Floats<bytes> rows(const Read& read, float* out) const {
    using V = Floats<bytes>;
    V sum{};
    const int64_t height = input.size.height, width = input.size.width;
    grid.for_each_row(first, last,
                      [&](int64_t image, int64_t i, int64_t j, int64_t j_end, int64_t t)
                          __attribute__((always_inline)) {
                            const bool below = 2 * i + 1 < height;
                            float* at = out + t * place.tile;
                            int64_t pixel = (image * height + 2 * i) * width + 2 * j;
                            for (; j < j_end; ++j, pixel += 2, at += place.tile) {
                              const bool right = 2 * j + 1 < width;
                              V d[2][2] = {};
                              d[0][0] = read(pixel);
                              if (right) d[0][1] = read(pixel + 1);
                              if (below) d[1][0] = read(pixel + width);
                              if (below && right) d[1][1] = read(pixel + width + 1);
                              sum += (d[0][0] + d[0][1]) + (d[1][0] + d[1][1]);
                              V s[4][2];
#pragma GCC unroll 2
                              for (int k = 0; k < 2; ++k) {
                                s[0][k] = d[0][k];
                                s[1][k] = d[0][k] + d[1][k];
                                s[2][k] = d[0][k] - d[1][k];
                                s[3][k] = -d[1][k];
                              }
#pragma GCC unroll 4
                              for (int r = 0; r < 4; ++r) {
                                store<bytes>(at + (4 * r) * place.point, s[r][0]);
                                store<bytes>(at + (4 * r + 1) * place.point, s[r][0] + s[r][1]);
                                store<bytes>(at + (4 * r + 2) * place.point, s[r][0] - s[r][1]);
                                store<bytes>(at + (4 * r + 3) * place.point, -s[r][1]);
                              }
                            }
                          });
    return sum;
  }
};

// How a weight gradient is dealt out: parts of tiles, whose sums are added in order, where there are few
// channels; blocks of channels else.
struct WeightPlan {
  int64_t chunk, tiles_a_part, tile_parts, out_block, in_block, out_parts, in_parts;

  WeightPlan(int64_t tiles, int64_t channels, int64_t out_channels, int64_t panel) {
    constexpr int64_t cache = 1 << 18, fewest = 32, widest = 128;
    const int64_t threads = torch::stable::get_num_threads();
    out_parts = ceil_div(out_channels, widest);
    out_block = ceil_div(out_channels, out_parts);
    in_block = round_up(ceil_div(channels, ceil_div(channels, widest)), panel);
    in_parts = ceil_div(channels, in_block);
    chunk = std::max(cache / (points * 4 * (in_block + out_block)), fewest);
    tile_parts = std::clamp<int64_t>(threads / (out_parts * in_parts), 1, ceil_div(tiles, chunk));
    tiles_a_part = ceil_div(tiles, tile_parts);
    tile_parts = ceil_div(tiles, tiles_a_part);
    chunk = ceil_div(tiles_a_part, ceil_div(tiles_a_part, chunk));
  }
  int64_t items() const { return tile_parts * out_parts * in_parts; }
};

// Sums over tiles, (tile parts, points, channels made, channels in whole panels).
template <Kind grad_kind, Kind input_kind>
struct Correlate {
  const Input& grad;
  const Input& input;
  const Grid& grid;
  const WeightPlan& plan;
  float *sums, *bias;  // (tile parts, channels made): sums of gradients, or null
  int64_t width;       // channels in whole panels

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int64_t panel = GemmShape<float, bytes>::panel;
    const int64_t made = grad.size.channels, channels = input.size.channels;
    const Place left = Place::rows(plan.chunk, round_up(plan.out_block, lanes_of<bytes>));
    const Place right = Place::panels(plan.chunk, plan.in_block, panel);
    static thread_local Workspace of_gradients, of_patches;
    float *const gradients = of_gradients.get(left.numel()), *const patches = of_patches.get(right.numel());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / (plan.out_parts * plan.in_parts);
      const int64_t o = item / plan.in_parts % plan.out_parts * plan.out_block;
      const int64_t c = item % plan.in_parts * plan.in_block;
      const int64_t o_end = std::min(o + plan.out_block, made), c_end = std::min(c + plan.in_block, channels);
      const int64_t start = part * plan.tiles_a_part;
      const int64_t stop = std::min(start + plan.tiles_a_part, grid.tiles());
      if (o >= o_end) continue;
      for (int64_t first = start; first < stop; first += plan.chunk) {
        const int64_t last = std::min(first + plan.chunk, stop);
        float* const of_bias = bias && c == 0 ? bias + part * made + o : nullptr;
        within<bytes>(Gradients<grad_kind>{grad, grid, first, last, gradients, left, of_bias}, o, o_end);
        within<bytes>(Patches<input_kind>{input, grid, first, last, patches, right, c}, c, c_end);
        for (int64_t point = 0; point < points; ++point)
          within<bytes>(Gemm<float>{o_end - o, c_end - c, last - first, gradients + point * left.point, 1,
                                    left.tile, patches + point * right.point,
                                    sums + ((part * points + point) * made + o) * width + c, width,
                                    first > start, right.panel_step});
      }
    }
  }
};

// dw = G^T m G of the sums' parts, added in order; (made, 3, 3, channels) in memory.
struct FinishWeights {
  const float* sums;
  int64_t parts, made, channels, width;
  float* to;
  std::atomic<bool>& finite;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    using V = Floats<bytes>;
    V check{};
    const int64_t point = made * width;
    for (int64_t o = begin; o < end; ++o)
      for_each_vector<bytes>(0, channels, channels, [&](int64_t c, auto span) __attribute__((always_inline)) {
        V s[3][4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          V m[4] = {};
          for (int64_t part = 0; part < parts; ++part)
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r)
              m[r] += span.load(sums + ((part * points + 4 * r + k) * point + o * width + c));
          s[0][k] = m[0] + (m[1] + m[2]) * 0.5f;
          s[1][k] = (m[1] - m[2]) * 0.5f;
          s[2][k] = (m[1] + m[2]) * 0.5f + m[3];
        }
        float* const out = to + o * 9 * channels + c;
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
          const V w[3] = {s[r][0] + (s[r][1] + s[r][2]) * 0.5f, (s[r][1] - s[r][2]) * 0.5f,
                          (s[r][1] + s[r][2]) * 0.5f + s[r][3]};
#pragma GCC unroll 3
          for (int k = 0; k < 3; ++k) {
            check += w[k] * 0.0f;
            span.store(out + (3 * r + k) * channels, w[k]);
          }
        }
      });
    if (!all_zero<bytes>(check)) finite.store(false, std::memory_order_relaxed);
  }
};

int64_t panel_width() {
  switch (isa()) {
    case Isa::avx512:
      return GemmShape<float, 64>::panel;
    case Isa::avx2:
      return GemmShape<float, 32>::panel;
    default:
      return GemmShape<float, 16>::panel;
  }
}

// --- operators ---------------------------------------------------------------------------------------------

using Optional = std::optional<Tensor>;

constexpr const char *transform_name = "conv2d_act_winograd_weights", *forward_name = "conv2d_act_winograd",
                     *input_gradient_name = "conv2d_act_winograd_input_gradient",
                     *weight_gradient_name = "conv2d_act_winograd_weight_gradient";

const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* mutable_data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void check_float(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Float)
    fail(op, ": ", name, " has dtype ", describe(tensor.scalar_type()), "; it takes Float");
}

Images images_of(const char* op, const char* name, const Tensor& x) {
  check_float(op, name, x);
  if (x.dim() != 4 || !x.numel() || !is_channels_last(x))
    fail(op, ": ", name, " has shape ", describe(x.sizes()),
         "; it takes (N, C, H, W), not empty, channels last");
  return {x.size(0), x.size(2), x.size(3), x.size(1)};
}

// A tensor laid out as others are.
const float* checked(const char* op, const char* name, const Optional& tensor, const Images& size) {
  if (!tensor) return nullptr;
  const Images found = images_of(op, name, *tensor);
  if (found.images != size.images || found.channels != size.channels || found.height != size.height ||
      found.width != size.width)
    fail(op, ": ", name, " has shape ", describe(tensor->sizes()), "; it needs (", size.images, ", ",
         size.channels, ", ", size.height, ", ", size.width, ")");
  return data(*tensor);
}

const float* checked(const char* op, const char* name, const Optional& vector, int64_t channels) {
  if (!vector) return nullptr;
  check_float(op, name, *vector);
  if (vector->dim() != 1 || vector->size(0) != channels || !vector->is_contiguous())
    fail(op, ": ", name, " has shape ", describe(vector->sizes()), "; it needs (", channels,
         ",) and to be contiguous");
  return data(*vector);
}

AnyActivation<float> activation(const char* op, int64_t act, double slope) {
  check(act >= 0 && act <= int64_t(Activation::mish), op, ": act is ", act, "; it needs to be 0 to 4");
  return {Activation(act), float(slope)};
}

struct Norm {
  const Optional &center, &scale, &shift;
};

Input normed(const char* op, const Tensor& x, const Norm& norm, int64_t act, double slope) {
  const Images size = images_of(op, "x", x);
  check(norm.scale.has_value() == norm.shift.has_value(), op, ": scale and shift need each other");
  return {size,
          data(x),
          nullptr,
          checked(op, "center", norm.center, size.channels),
          checked(op, "scale", norm.scale, size.channels),
          checked(op, "shift", norm.shift, size.channels),
          activation(op, act, slope)};
}

Input gated(const char* op, const Tensor& grad, const Optional& y, int64_t act, double slope) {
  const Images size = images_of(op, "grad", grad);
  check(act <= int64_t(Activation::leaky_relu), op, ": act is ", act,
        "; y tells the derivatives of identity, relu and leaky_relu");
  return {size, data(grad), checked(op, "y", y, size), nullptr, nullptr, nullptr, activation(op, act, slope)};
}

Tensor empty_images(const Tensor& x, const Images& size) {
  return new_strided(
      x, {size.images, size.channels, size.height, size.width},
      {size.height * size.width * size.channels, 1, size.width * size.channels, size.channels});
}

Tensor empty(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

void check_padding(const char* op, int64_t height, int64_t width) {
  check(height >= 0 && height <= 2 && width >= 0 && width <= 2, op, ": padding is (", height, ", ", width,
        "); it takes 0 to 2");
}

bool is_raw(const Tensor& weight) { return weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3; }

int64_t transformed_numel(int64_t made, int64_t channels) {
  return points * round_up(made, panel_width()) * channels;
}

// Weights (O, C, 3, 3), at any strides, as the convolution takes them; or, `backward`, its input gradient.
void transform_into(const Tensor& weight, bool backward, float* to) {
  const int64_t made = weight.size(backward), channels = weight.size(!backward);
  int64_t row = weight.stride(2), column = weight.stride(3);
  const float* from = data(weight);
  if (backward) {  // by half a turn
    from += 2 * (row + column);
    row = -row;
    column = -column;
  }
  parallel(ceil_div(made, panel_width()) * ceil_div(channels, TransformWeights::group), 4,
           TransformWeights{from, made, channels, weight.stride(backward), weight.stride(!backward), row,
                            column, to});
}

Tensor transform(const Tensor& weight, bool backward) {
  check_float(transform_name, "weight", weight);
  if (!is_raw(weight))
    fail(transform_name, ": weight has shape ", describe(weight.sizes()), "; it takes (O, C, 3, 3)");
  const int64_t made = weight.size(backward), channels = weight.size(!backward), panel = panel_width();
  Tensor to = empty(weight, {points, ceil_div(made, panel), channels, panel});
  if (to.numel()) transform_into(weight, backward, mutable_data(to));
  return to;
}

// Transformed ones as they are; raw ones transformed into memory that is kept for the next call: first
// touches of fresh pages take several times the transform.
const float* transformed(const char* op, const Tensor& weights, bool backward, int64_t made,
                         int64_t channels) {
  check_float(op, "weights", weights);
  if (is_raw(weights) && weights.size(backward) == made && weights.size(!backward) == channels) {
    static thread_local Workspace memory;
    float* const to = memory.get(transformed_numel(made, channels));
    transform_into(weights, backward, to);
    return to;
  }
  const int64_t panel = panel_width();
  if (!weights.is_contiguous() || weights.dim() != 4 || weights.size(0) != points ||
      weights.size(1) != ceil_div(made, panel) || weights.size(2) != channels || weights.size(3) != panel)
    fail(op, ": weights have shape ", describe(weights.sizes()), "; they need to be, transformed or not, of ",
         channels, " channels and ", made, " made");
  return data(weights);
}

std::tuple<Tensor, Tensor, bool> forward(const Tensor& x, const Tensor& weights, int64_t made,
                                         const Optional& bias, const Optional& residual,
                                         const Optional& center, const Optional& scale, const Optional& shift,
                                         int64_t prologue, double prologue_slope, int64_t pad_height,
                                         int64_t pad_width, int64_t act, double slope, bool with_statistics) {
  check_padding(forward_name, pad_height, pad_width);
  const Input input = normed(forward_name, x, {center, scale, shift}, prologue, prologue_slope);
  const Images& from = input.size;
  const Images size{from.images, from.height + 2 * pad_height - 2, from.width + 2 * pad_width - 2, made};
  check(size.height > 0 && size.width > 0, forward_name, ": x is smaller than the kernel");
  const Grid grid(size, pad_height, pad_width);
  const Plan plan(grid.tiles(), from.channels, made);
  Tensor y = empty_images(x, size);
  const Scratch<float> statistics(with_statistics ? plan.chunks * 2 * made : 0);
  const Activate body{
      checked(forward_name, "bias", bias, made),    checked(forward_name, "residual", residual, size),
      activation(forward_name, act, slope),         mutable_data(y),
      with_statistics ? statistics.get() : nullptr, made};
  const bool finite =
      convolve(input, grid, size, plan, transformed(forward_name, weights, false, made, from.channels), body);
  if (!with_statistics) return {y, empty(x, {0}), finite};
  Tensor merged = empty(x, {3, 1, made});
  merge_statistics(grid, size, plan, statistics.get(), mutable_data(merged));
  return {y, merged, finite};
}

std::tuple<Tensor, Tensor, Tensor, bool> input_gradient(
    const Tensor& grad, const Optional& y, const Tensor& weights, const Optional& added, const Optional& x,
    const Optional& center, const Optional& scale, const Optional& shift, int64_t prologue,
    double prologue_slope, int64_t channels, int64_t height, int64_t width, int64_t pad_height,
    int64_t pad_width, int64_t act, double slope, bool scaled) {
  const char* const op = input_gradient_name;
  const Input input = gated(op, grad, y, act, slope);
  check_padding(op, pad_height, pad_width);
  const Images& from = input.size;
  const Images size{from.images, height, width, channels};
  check(from.height == height + 2 * pad_height - 2 && from.width == width + 2 * pad_width - 2, op,
        ": grad has shape ", describe(grad.sizes()), "; x of (", height, ", ", width, ") has other results");
  const bool norm = x && scale;
  const Input of_norm = norm ? normed(op, *x, {center, scale, shift}, prologue, prologue_slope) : Input{};
  checked(op, "x", x, size);
  const Grid grid(size, 2 - pad_height, 2 - pad_width);
  const Plan plan(grid.tiles(), from.channels, channels);
  Tensor dx = empty_images(grad, size);
  const Scratch<float> sums(norm ? plan.chunks * 2 * channels : 0);
  const Differentiate body{checked(op, "added", added, size),
                           of_norm.x,
                           of_norm.center,
                           of_norm.scale,
                           of_norm.shift,
                           of_norm.act,
                           scaled,
                           mutable_data(dx),
                           sums.get(),
                           channels};
  const bool finite =
      convolve(input, grid, size, plan, transformed(op, weights, true, channels, from.channels), body);
  if (!norm) return {dx, empty(grad, {0}), empty(grad, {0}), finite};
  std::vector<float> both(2 * channels);
  add_parts(sums.get(), plan.chunks, 2 * channels, both.data());
  Tensor sum = empty(grad, {channels}), along = empty(grad, {channels});
  std::copy_n(both.data(), channels, mutable_data(sum));
  std::copy_n(both.data() + channels, channels, mutable_data(along));
  return {dx, sum, along, finite};
}

std::tuple<Tensor, Tensor, bool> weight_gradient(const Tensor& grad, const Optional& y, const Tensor& x,
                                                 const Optional& center, const Optional& scale,
                                                 const Optional& shift, int64_t prologue,
                                                 double prologue_slope, int64_t pad_height, int64_t pad_width,
                                                 int64_t act, double slope, bool with_bias) {
  const char* const op = weight_gradient_name;
  const Input upstream = gated(op, grad, y, act, slope);
  const Input input = normed(op, x, {center, scale, shift}, prologue, prologue_slope);
  check_padding(op, pad_height, pad_width);
  const Images &size = upstream.size, &from = input.size;
  if (size.images != from.images || size.height != from.height + 2 * pad_height - 2 ||
      size.width != from.width + 2 * pad_width - 2)
    fail(op, ": grad has shape ", describe(grad.sizes()), "; x of ", describe(x.sizes()),
         " has other results");
  const Grid grid(size, pad_height, pad_width);
  const int64_t panel = panel_width(), made = size.channels, channels = from.channels;
  const int64_t wide = round_up(channels, panel);
  const WeightPlan plan(grid.tiles(), channels, made, panel);
  static thread_local Workspace of_sums;
  float* const sums = of_sums.get(plan.tile_parts * points * made * wide);
  std::vector<float> bias(with_bias ? plan.tile_parts * made : 0);
  const auto start = [&]<Kind grad_kind, Kind input_kind>() {
    parallel(plan.items(), 1,
             Correlate<grad_kind, input_kind>{upstream, input, grid, plan, sums,
                                              with_bias ? bias.data() : nullptr, wide});
  };
  const bool plain = upstream.kind() == Kind::plain;
  if (input.kind() == Kind::normed)
    plain ? start.template operator()<Kind::plain, Kind::normed>()
          : start.template operator()<Kind::gated, Kind::normed>();
  else
    plain ? start.template operator()<Kind::plain, Kind::plain>()
          : start.template operator()<Kind::gated, Kind::plain>();
  Tensor dweight = empty_images(x, {made, 3, 3, channels});
  std::atomic<bool> finite = true;
  parallel(made, 1,
           FinishWeights{sums, plan.tile_parts, made, channels, wide, mutable_data(dweight), finite});
  Tensor dbias = empty(x, {with_bias ? made : 0});
  if (with_bias) add_parts(bias.data(), plan.tile_parts, made, mutable_data(dbias));
  return {dweight, dbias, finite};
}

}  // namespace
}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  using namespace nnfast::cpu;
  m.impl(transform_name, TORCH_BOX(&transform));
  m.impl(forward_name, TORCH_BOX(&forward));
  m.impl(input_gradient_name, TORCH_BOX(&input_gradient));
  m.impl(weight_gradient_name, TORCH_BOX(&weight_gradient));
}
