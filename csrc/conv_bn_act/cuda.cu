// Batch norm, residual and activation on CUDA. A block is `across` threads along the columns by threads /
// across along the rows; it stays in its columns where those are channels, else in its rows, and so computes
// the coefficients of its channels once, into shared memory. Sums go to partials, which a second kernel
// merges in a fixed order.
#include "common/cuda.h"
#include "conv_bn_act/ops.h"

namespace nnfast::cuda {

constexpr int threads = 256, merge_threads = 1024;
constexpr int least_across = 8, most_channels = 256;  // of a block

template <class T>
using ComputeOf = typename Scalar<T>::Compute;

// How blocks lie on the rows and columns of memory.
struct Grid {
  Layout layout;
  int across, passes;
  int64_t along,
      chunks;  // blocks along what a channel keeps (tiles of columns, groups of rows), and across it

  Grid(const Layout& layout, int width, int most_passes) : layout(layout), across(least_across) {
    const int most = layout.channels_last ? 32 : threads;
    while (across < most && int64_t(across) * width < layout.columns()) across *= 2;
    const int64_t down = threads / across, step = int64_t(across) * width;
    along = layout.channels_last ? ceil(layout.columns(), step) : ceil(layout.rows(), down);
    const int64_t all = layout.channels_last ? ceil(layout.rows(), down) : ceil(layout.columns(), step);
    constexpr int64_t wanted = 132 * 8;  // blocks: two waves of an H200
    passes = int(std::clamp<int64_t>(all * along / wanted, 1, most_passes));
    chunks = ceil(all, passes);
  }

  int64_t blocks() const { return along * chunks; }
  // Partial sums of a channel.
  NNFAST_INLINE int64_t parts() const { return layout.channels_last ? chunks : layout.images * chunks; }
  static int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

// A thread's vectors: the k-th starts at (row, column).
template <int width>
struct Walk {
  int tx, ty;
  int64_t chunk, row, column, row_step, column_step, first;  // first: the block's column or row

  __device__ explicit Walk(const Grid& grid) {
    tx = threadIdx.x % grid.across;
    ty = threadIdx.x / grid.across;
    const int down = threads / grid.across;
    chunk = blockIdx.x / grid.along;
    const int64_t at = blockIdx.x % grid.along, apart = int64_t(grid.across) * width;
    if (grid.layout.channels_last) {
      first = at * apart;
      row = chunk * grid.passes * down + ty;
      column = first + tx * width;
      row_step = down;
      column_step = 0;
    } else {
      first = at * down;
      row = first + ty;
      column = chunk * grid.passes * apart + tx * width;
      row_step = 0;
      column_step = apart;
    }
  }

  __device__ bool inside(const Layout& layout) const {
    return row < layout.rows() && column < layout.columns();
  }
  __device__ int64_t offset(const Layout& layout) const { return row * layout.columns() + column; }
  __device__ void next() {
    row += row_step;
    column += column_step;
  }
};

template <class T>
using Kept = ComputeOf<T>[most_channels];

// What a gradient adds to z's five coefficients: slope and offset, and those of the residual's.
template <class T>
struct GradientInputs {
  Sums<ComputeOf<T>> sums, residual_sums;
  ComputeOf<T> count;
};

constexpr int z_tables = 5, all_tables = 9;

template <class T, int width, int tables>
__device__ void fill(const Problem<T>& problem, const Grid& grid, const Walk<width>& walk,
                     const GradientInputs<T>& gradient, Kept<T> (&table)[tables]) {
  using C = ComputeOf<T>;
  const Layout& layout = grid.layout;
  const int count = layout.channels_last ? grid.across * width : threads / grid.across;
  for (int i = threadIdx.x; i < count; i += threads) {
    const int64_t at = walk.first + i;
    if (at >= (layout.channels_last ? layout.channels : layout.rows())) break;
    const int64_t c = at % layout.channels;
    const Affine<C> affine(problem.norm, c);
    const bool normed = problem.residual_norm.mean;
    const Affine<C> other = normed ? Affine<C>(problem.residual_norm, c) : Affine<C>(0, 1, 0);
    table[0][i] = affine.mean;
    table[1][i] = affine.scale;
    table[2][i] = affine.shift + other.shift;
    table[3][i] = other.mean;
    table[4][i] = other.scale;
    if constexpr (tables == all_tables) {
      const Gradient<C> of_x(problem.norm, gradient.sums, gradient.count, c);
      const Gradient<C> of_residual =
          normed ? Gradient<C>(problem.residual_norm, gradient.residual_sums, gradient.count, c)
                 : Gradient<C>();
      table[5][i] = of_x.slope;
      table[6][i] = of_x.offset;
      table[7][i] = of_residual.slope;
      table[8][i] = of_residual.offset;
    }
  }
  __syncthreads();
}

template <class T, int width>
__device__ Vector<T, width> load(const T* from, int64_t at) {
  return *reinterpret_cast<const Vector<T, width>*>(from + at);
}

template <class T, int width>
__device__ void store(T* to, int64_t at, const Vector<T, width>& value) {
  *reinterpret_cast<Vector<T, width>*>(to + at) = value;
}

template <class T, int tables>
__device__ ComputeOf<T> z_of(const Kept<T> (&table)[tables], int i, T x, T residual) {
  using S = Scalar<T>;
  return (S::load(x) - table[0][i]) * table[1][i] + table[2][i] +
         (S::load(residual) - table[3][i]) * table[4][i];
}

// The bits of 8 / width neighbours, or-ed into a byte.
template <int width>
__device__ uint32_t byte_of(uint32_t bits, int tx) {
  if constexpr (width < 8) {
    bits <<= tx % (8 / width) * width;
    NNFAST_UNROLL
    for (int apart = 1; apart < 8 / width; apart *= 2) bits |= __shfl_xor_sync(~0u, bits, apart);
  }
  return bits;
}

template <class T, int width>
__global__ void __launch_bounds__(threads, 4) forward(Problem<T> problem, Grid grid, T* y, uint8_t* mask) {
  using S = Scalar<T>;
  __shared__ Kept<T> table[z_tables];
  Walk<width> walk(grid);
  fill(problem, grid, walk, {}, table);
  const Layout& layout = grid.layout;
  const int first = layout.channels_last ? walk.tx * width : walk.ty, step = layout.channels_last;
  for (int k = 0; k < grid.passes; ++k, walk.next()) {
    const bool inside = walk.inside(layout);
    uint32_t bits = 0;
    if (inside) {
      const int64_t at = walk.offset(layout);
      const auto x = load<T, width>(problem.x, at);
      Vector<T, width> residual = {}, result;
      if (problem.residual) residual = load<T, width>(problem.residual, at);
      NNFAST_UNROLL
      for (int e = 0; e < width; ++e) {
        const auto z = z_of<T>(table, first + e * step, x.element[e], residual.element[e]);
        bits |= uint32_t(problem.act.is_open(z) != 0) << e;
        result.element[e] = S::store(problem.act.template forward<typename S::Math>(z));
      }
      store<T, width>(y, at, result);
    }
    if (mask) {
      bits = byte_of<width>(bits, walk.tx);
      if (inside && walk.column % 8 == 0)
        mask[walk.row * layout.mask_bytes() + walk.column / 8] = uint8_t(bits);
    }
  }
}

// What dz of a vector is made of.
template <class T, int width>
struct Incoming {
  Vector<T, width> grad;
  uint32_t bits;  // of the mask

  __device__ Incoming(const Layout& layout, const Walk<width>& walk, const T* from, const uint8_t* mask)
      : grad(load<T, width>(from, walk.offset(layout))), bits(0) {
    if (mask) bits = mask[walk.row * layout.mask_bytes() + walk.column / 8] >> walk.column % 8;
  }

  template <int tables>
  __device__ ComputeOf<T> dz(const Problem<T>& problem, bool masked, const Kept<T> (&table)[tables], int i,
                             int e, T x, T residual) const {
    using S = Scalar<T>;
    const ComputeOf<T> value = S::load(grad.element[e]);
    if (masked) return problem.act.gated(value, bits >> e & 1);
    return problem.act.template backward<typename S::Math>(value, z_of<T>(table, i, x, residual));
  }
};

template <class T, int width>
__global__ void __launch_bounds__(threads, 4)
    backward(Problem<T> problem, Grid grid, const T* grad, const uint8_t* mask, GradientInputs<T> inputs,
             T* dx, T* dresidual) {
  using S = Scalar<T>;
  __shared__ Kept<T> table[all_tables];
  Walk<width> walk(grid);
  fill(problem, grid, walk, inputs, table);
  const Layout& layout = grid.layout;
  const int first = layout.channels_last ? walk.tx * width : walk.ty, step = layout.channels_last;
  for (int k = 0; k < grid.passes && walk.inside(layout); ++k, walk.next()) {
    const int64_t at = walk.offset(layout);
    const auto x = load<T, width>(problem.x, at);
    Vector<T, width> residual = {}, result;
    if (problem.residual) residual = load<T, width>(problem.residual, at);
    const Incoming<T, width> incoming(layout, walk, grad, mask);
    ComputeOf<T> dz[width];
    NNFAST_UNROLL
    for (int e = 0; e < width; ++e) {
      const int i = first + e * step;
      dz[e] = incoming.dz(problem, mask, table, i, e, x.element[e], residual.element[e]);
      result.element[e] = S::store(
          input_gradient(table[1][i], dz[e], table[5][i], S::load(x.element[e]) - table[0][i], table[6][i]));
    }
    store<T, width>(dx, at, result);
    if (!dresidual) continue;
    NNFAST_UNROLL
    for (int e = 0; e < width; ++e) {
      const int i = first + e * step;
      result.element[e] = S::store(input_gradient(table[4][i], dz[e], table[7][i],
                                                  S::load(residual.element[e]) - table[3][i], table[8][i]));
    }
    store<T, width>(dresidual, at, result);
  }
}

// Mean and sum of squared deviations of `count` values, merged by Chan et al. 1983.
template <class Compute>
struct Moments {
  static constexpr int size = 3;
  Compute value[size] = {};  // count, mean, m2

  __device__ void add(const Moments& other) {
    const Compute total = value[0] + other.value[0];
    if (other.value[0] == 0) return;
    const Compute share = other.value[0] / total, delta = other.value[1] - value[1];
    value[2] += other.value[2] + delta * delta * share * value[0];
    value[1] += delta * share;
    value[0] = total;
  }
};

template <class Compute, bool residual>
struct Totals {
  static constexpr int size = 2 + residual;  // of dz, of dz (x - mean), of dz (residual - mean)
  Compute value[size] = {};

  __device__ void add(const Totals& other) {
    NNFAST_UNROLL
    for (int s = 0; s < size; ++s) value[s] += other.value[s];
  }
};

// The block's sums, each thread's of its columns, into partial: (size, parts, channels).
template <class Sum, int width, class Compute>
__device__ void write_partials(const Grid& grid, const Walk<width>& walk, Sum (&mine)[width],
                               Compute* partial) {
  __shared__ Compute shared[Sum::size][threads];
  const Layout& layout = grid.layout;
  const int64_t stride = grid.parts() * layout.channels;
  const auto put = [&](int64_t part, int64_t c, const Sum& sum) {
    for (int s = 0; s < Sum::size; ++s) partial[s * stride + part * layout.channels + c] = sum.value[s];
  };
  const auto get = [&](int thread) {
    Sum sum;
    for (int s = 0; s < Sum::size; ++s) sum.value[s] = shared[s][thread];
    return sum;
  };
  if (layout.channels_last) {
    NNFAST_UNROLL
    for (int e = 0; e < width; ++e) {
      for (int s = 0; s < Sum::size; ++s) shared[s][threadIdx.x] = mine[e].value[s];
      __syncthreads();
      if (walk.ty == 0 && walk.column + e < layout.columns()) {
        for (int other = threadIdx.x + grid.across; other < threads; other += grid.across)
          mine[e].add(get(other));
        put(walk.chunk, walk.column + e, mine[e]);
      }
      __syncthreads();
    }
    return;
  }
  NNFAST_UNROLL
  for (int e = 1; e < width; ++e) mine[0].add(mine[e]);
  const int in_warp = grid.across < 32 ? grid.across : 32;
  for (int apart = in_warp / 2; apart > 0; apart /= 2) {
    Sum other;
    for (int s = 0; s < Sum::size; ++s) other.value[s] = __shfl_xor_sync(~0u, mine[0].value[s], apart);
    mine[0].add(other);
  }
  for (int s = 0; s < Sum::size; ++s) shared[s][threadIdx.x] = mine[0].value[s];
  __syncthreads();
  if (walk.tx == 0 && walk.row < layout.rows()) {
    for (int other = 32; other < grid.across; other += 32) mine[0].add(get(threadIdx.x + other));
    put(walk.row / layout.channels * grid.chunks + walk.chunk, walk.row % layout.channels, mine[0]);
  }
}

// A value of the channel: what is left of the mean without it has digits to spare. Finite.
template <class T>
__device__ ComputeOf<T> shift_of(const T* x, const Layout& layout, int64_t c) {
  if (c >= layout.channels) return 0;
  const ComputeOf<T> shift = Scalar<T>::load(x[layout.channels_last ? c : c * layout.pixels]);
  return shift - shift == 0 ? shift : 0;
}

template <class T, int width>
__global__ void __launch_bounds__(threads, 4) reduce_moments(const T* x, Grid grid, ComputeOf<T>* partial) {
  using C = ComputeOf<T>;
  Walk<width> walk(grid);
  Moments<C> mine[width];
  C count = 0, shift[width];
  NNFAST_UNROLL
  for (int e = 0; e < width; ++e) {
    const int64_t c = grid.layout.channels_last ? walk.column + e : walk.row % grid.layout.channels;
    shift[e] = shift_of(x, grid.layout, c);
  }
  for (int k = 0; k < grid.passes && walk.inside(grid.layout); ++k, walk.next()) {
    const auto vector = load<T, width>(x, walk.offset(grid.layout));
    count += 1;
    const C share = 1 / count;
    NNFAST_UNROLL
    for (int e = 0; e < width; ++e) {
      const C value = Scalar<T>::load(vector.element[e]) - shift[e], delta = value - mine[e].value[1];
      mine[e].value[1] += delta * share;
      mine[e].value[2] += delta * (value - mine[e].value[1]);
    }
  }
  NNFAST_UNROLL
  for (int e = 0; e < width; ++e) mine[e].value[0] = count;
  write_partials(grid, Walk<width>(grid), mine, partial);
}

template <class T, int width, bool with_residual>
__global__ void __launch_bounds__(threads, 4)
    reduce_gradients(Problem<T> problem, Grid grid, const T* grad, const uint8_t* mask, T* to,
                     ComputeOf<T>* partial) {
  using C = ComputeOf<T>;
  __shared__ Kept<T> table[z_tables];
  Walk<width> walk(grid);
  fill(problem, grid, walk, {}, table);
  const Layout& layout = grid.layout;
  const int first = layout.channels_last ? walk.tx * width : walk.ty, step = layout.channels_last;
  Totals<C, with_residual> mine[width];
  for (int k = 0; k < grid.passes && walk.inside(layout); ++k, walk.next()) {
    const int64_t at = walk.offset(layout);
    const auto x = load<T, width>(problem.x, at);
    Vector<T, width> residual = {};
    if constexpr (with_residual) residual = load<T, width>(problem.residual, at);
    const Incoming<T, width> incoming(layout, walk, grad, mask);
    Vector<T, width> result;
    NNFAST_UNROLL
    for (int e = 0; e < width; ++e) {
      const int i = first + e * step;
      const C dz = incoming.dz(problem, mask, table, i, e, x.element[e], residual.element[e]);
      mine[e].value[0] += dz;
      mine[e].value[1] += dz * (Scalar<T>::load(x.element[e]) - table[0][i]);
      if constexpr (with_residual)
        mine[e].value[2] += dz * (Scalar<T>::load(residual.element[e]) - table[3][i]);
      result.element[e] = Scalar<T>::store(dz);
    }
    if (to) store<T, width>(to, at, result);
  }
  write_partials(grid, Walk<width>(grid), mine, partial);
}

// One channel a column of 32 threads, each of which takes every 32nd part; finish(c, sum) writes.
template <class Sum, class Compute, class Finish>
__device__ void merge(const Compute* partial, int64_t parts, int64_t channels, const Finish& finish) {
  __shared__ Compute shared[Sum::size][merge_threads];
  const int64_t c = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  Sum mine;
  if (c < channels)
    for (int64_t part = threadIdx.x / 32; part < parts; part += 32) {
      Sum other;
      for (int s = 0; s < Sum::size; ++s) other.value[s] = partial[(s * parts + part) * channels + c];
      mine.add(other);
    }
  for (int s = 0; s < Sum::size; ++s) shared[s][threadIdx.x] = mine.value[s];
  __syncthreads();
  if (threadIdx.x >= 32 || c >= channels) return;
  for (int thread = threadIdx.x + 32; thread < merge_threads; thread += 32) {
    Sum other;
    for (int s = 0; s < Sum::size; ++s) other.value[s] = shared[s][thread];
    mine.add(other);
  }
  finish(c, mine);
}

template <class T>
__global__ void __launch_bounds__(merge_threads, 1)
    merge_moments(const T* x, Layout layout, const ComputeOf<T>* partial, int64_t parts, ComputeOf<T>* mean,
                  ComputeOf<T>* var) {
  using C = ComputeOf<T>;
  merge<Moments<C>>(partial, parts, layout.channels, [&](int64_t c, const Moments<C>& moments) {
    var[c] = moments.value[2] / moments.value[0];  // of nothing: NaN
    mean[c] = moments.value[0] > 0 ? moments.value[1] + shift_of(x, layout, c) : var[c];
  });
}

template <class Compute>
struct SumOutputs {
  Compute* out[3];
};

template <class Compute, bool with_residual>
__global__ void __launch_bounds__(merge_threads, 1)
    merge_gradients(const Compute* partial, int64_t parts, int64_t channels, Norm<Compute> norm,
                    Norm<Compute> residual_norm, SumOutputs<Compute> to) {
  using Sum = Totals<Compute, with_residual>;
  merge<Sum>(partial, parts, channels, [&](int64_t c, const Sum& totals) {
    to.out[0][c] = totals.value[0];
    to.out[1][c] = totals.value[1] * norm.inv_std(c);
    if constexpr (with_residual)
      if (to.out[2]) to.out[2][c] = totals.value[2] * residual_norm.inv_std(c);
  });
}

template <class T, class Compute>
__global__ void __launch_bounds__(threads, 4)
    update_strided(T* running, const Compute* value, const Compute* offset, int64_t n, Compute factor,
                   Compute momentum) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= n) return;
  const Compute now = value[i] * factor + (offset ? offset[i] : Compute(0));
  running[i] = Scalar<T>::store((1 - momentum) * Compute(Scalar<T>::load(running[i])) + momentum * now);
}

struct BatchNormDevice {
  static constexpr const char* sums_name = "batch_norm_act_sums";

  template <class T, class Compute>
  static void stats(const T* x, const Layout& layout, Compute* mean, Compute* var, const Tensor& like) {
    with_width<T>(layout, {x}, [&](auto width) {
      const Grid grid(layout, width, 64);
      const Tensor partial = partials<Compute>(grid, like);
      launch("batch_norm_stats", reduce_moments<T, width>, grid.blocks(), threads, 0, like.get_device_index(),
             x, grid, data<Compute>(partial));
      launch("batch_norm_stats", merge_moments<T>, Grid::ceil(layout.channels, 32), merge_threads, 0,
             like.get_device_index(), x, layout, data<Compute>(partial), grid.parts(), mean, var);
    });
  }

  template <class T, class Compute>
  static void update(T* running, const Compute* value, const Compute* offset, int64_t n, Compute factor,
                     Compute momentum, int32_t device_index) {
    launch("batch_norm_update_", update_strided<T, Compute>, Grid::ceil(n, threads), threads, 0, device_index,
           running, value, offset, n, factor, momentum);
  }

  template <class T>
  static void forward(const Problem<T>& problem, T* y, uint8_t* mask, int32_t device_index) {
    with_width<T>(problem.layout, {problem.x, problem.residual, y}, [&](auto width) {
      const Grid grid(problem.layout, width, 16);
      launch("batch_norm_act", cuda::forward<T, width>, grid.blocks(), threads, 0, device_index, problem,
             grid, y, mask);
    });
  }

  template <class T, class Compute>
  static void sums(const Problem<T>& given, const T* grad, const uint8_t* mask, Compute* const (&out)[3],
                   T* dz, const Tensor& like) {
    const Problem<T> problem = without_idle_residual(given, mask);
    const Layout& layout = problem.layout;
    with_width<T>(layout, {problem.x, problem.residual, grad, dz}, [&](auto width) {
      const auto run = [&](auto with_residual) {
        // More sums than these, or three of double, do not fit the registers.
        constexpr bool narrow = with_residual && sizeof(Compute) == 8;
        constexpr int elements = narrow ? 1 : width > 4 ? 4 : width;
        const Grid grid(layout, elements, 64);
        const Tensor partial = partials<Compute>(grid, like);
        launch(sums_name, reduce_gradients<T, elements, with_residual>, grid.blocks(), threads, 0,
               like.get_device_index(), problem, grid, grad, mask, dz, data<Compute>(partial));
        launch(sums_name, merge_gradients<Compute, with_residual>, Grid::ceil(layout.channels, 32),
               merge_threads, 0, like.get_device_index(), data<Compute>(partial), grid.parts(),
               layout.channels, problem.norm, problem.residual_norm,
               SumOutputs<Compute>{out[0], out[1], out[2]});
      };
      problem.residual ? run(std::true_type{}) : run(std::false_type{});
    });
  }

  template <class T, class Compute>
  static void backward(const Problem<T>& given, const T* grad, const uint8_t* mask, const Sums<Compute>& sums,
                       const Sums<Compute>& residual_sums, Compute count, T* dx, T* dresidual,
                       int32_t device_index) {
    const Problem<T> problem = without_idle_residual(given, mask);
    with_width<T>(problem.layout, {problem.x, problem.residual, grad, dx, dresidual}, [&](auto width) {
      const Grid grid(problem.layout, width, 16);
      launch("batch_norm_act_backward", cuda::backward<T, width>, grid.blocks(), threads, 0, device_index,
             problem, grid, grad, mask, GradientInputs<T>{sums, residual_sums, count}, dx, dresidual);
    });
  }

 private:
  template <class T, class Body>
  static void with_width(const Layout& layout, std::initializer_list<const T*> pointers, const Body& body) {
    constexpr int vector = 16 / sizeof(T);
    bool wide = layout.columns() % vector == 0;
    for (const T* pointer : pointers) wide &= is_aligned(pointer);
    if (wide) return body(std::integral_constant<int, vector>{});
    body(std::integral_constant<int, 1>{});
  }

  // A residual that no gradient depends on need not be read.
  template <class T>
  static Problem<T> without_idle_residual(Problem<T> problem, const uint8_t* mask) {
    if (!problem.residual_norm.mean && (mask || problem.act.which == Activation::identity))
      problem.residual = nullptr;
    return problem;
  }

  template <class Compute>
  static Tensor partials(const Grid& grid, const Tensor& like) {
    constexpr bool wide = std::is_same_v<Compute, double>;
    return torch::stable::new_empty(like, {3, grid.parts(), grid.layout.channels},
                                    wide ? ScalarType::Double : ScalarType::Float);
  }

  template <class Compute>
  static Compute* data(const Tensor& tensor) {
    return static_cast<Compute*>(tensor.mutable_data_ptr());
  }
};

}  // namespace nnfast::cuda

NNFAST_CUDA_LIBRARY(m) { nnfast::BatchNormAct<nnfast::cuda::BatchNormDevice>::add_to(m); }
