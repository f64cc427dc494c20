// The focal loss on CUDA. A contiguous row belongs to 8 or 32 threads or to a block, by its length, and is
// read in 16-byte vectors where they are aligned, else four elements at a time; a strided row belongs to one
// thread, neighbours side by side. Each direction reads a row once.
#include "common/elementwise_cuda.h"
#include "focal_loss/ops.h"

namespace nnfast::cuda {

template <class T>
using ComputeOf = typename Scalar<T>::Compute;

// The row's target, or -1 where it is to be ignored.
template <class T>
NNFAST_INLINE int64_t class_of(const SoftmaxRows<T>& rows, int64_t row) {
  const int64_t target = rows.target[row];
  if (target == rows.ignore_index) return -1;
  NNFAST_DEVICE_CHECK(rows.is_class(target),
                      "softmax_focal_loss: a target is neither a class of x nor ignore_index");
  return target;
}

// `lanes` threads that share a row: part of a warp, a warp, or the whole block.
template <class T, int lanes>
struct Team {
  using Compute = ComputeOf<T>;
  using Math = typename Scalar<T>::Math;

  static __device__ void add(RunningSum<Compute>& a, Compute maximum, Compute sum) {
    RunningSum<Compute> b{maximum, sum};
    const Compute most = max(a.maximum, maximum);
    a.template raise<Math>(most);
    b.template raise<Math>(most);
    a.sum += b.sum;
  }

  // Every thread returns the same.
  static __device__ RunningSum<Compute> reduce(RunningSum<Compute> mine) {
    constexpr int in_warp = lanes < 32 ? lanes : 32;
    NNFAST_UNROLL
    for (int apart = in_warp / 2; apart > 0; apart /= 2)
      add(mine, __shfl_xor_sync(~0u, mine.maximum, apart), __shfl_xor_sync(~0u, mine.sum, apart));
    if constexpr (lanes > 32) {
      __shared__ Compute maxima[lanes / 32], sums[lanes / 32];
      if (threadIdx.x % 32 == 0) {
        maxima[threadIdx.x / 32] = mine.maximum;
        sums[threadIdx.x / 32] = mine.sum;
      }
      __syncthreads();
      mine = {maxima[0], sums[0]};
      NNFAST_UNROLL
      for (int warp = 1; warp < lanes / 32; ++warp) add(mine, maxima[warp], sums[warp]);
    }
    return mine;
  }

  // Adds count elements, of classes `c`, `c + apart` and so on, but not the target's.
  template <int count>
  static __device__ void take(RunningSum<Compute>& running, const Compute (&x)[count], int64_t c,
                              int64_t target, int apart = 1) {
    Compute most = x[0];
    NNFAST_UNROLL
    for (int e = 1; e < count; ++e) most = max(x[e], most);
    running.template raise<Math>(most);
    NNFAST_UNROLL
    for (int e = 0; e < count; ++e)
      running.sum += c + e * apart == target ? Compute(0) : Math::exp(x[e] - running.maximum);
  }
};

template <class T, class Compute>
__device__ void write_row(const SoftmaxRows<T>& rows, const SoftmaxLoss<Compute>& to, int64_t row,
                          int64_t target, const RunningSum<Compute>& running) {
  Compute loss = 0, scale = 0, at_target = 0;
  if (target >= 0) {
    const Compute x = Scalar<T>::load(rows.x[rows.first(row) + target * rows.inner]);
    const TargetClass<Compute> at(x - running.maximum, running.sum);
    const Compute alpha = to.alpha ? to.alpha[target] : Compute(1);
    const Compute q_to_gamma = to.power.template of<Precise>(at.q);
    const Compute slope = at.slope(to.power, alpha, q_to_gamma);
    loss = alpha * q_to_gamma * at.cross_entropy;
    scale = slope * at.inverse;
    at_target = -slope * at.q;
  }
  to.loss[row] = loss;
  rows.shift()[row] = running.maximum;
  rows.scale()[row] = scale;
  rows.at_target()[row] = at_target;
}

// A row's gradient.
template <class T>
struct Slope {
  using Compute = ComputeOf<T>;
  int64_t target;
  Compute shift, scale, at_target;

  __device__ Slope(const SoftmaxRows<T>& rows, const Upstream<Compute>& upstream, int64_t row)
      : target(class_of(rows, row)) {
    const Compute grad = upstream.of(row);
    shift = rows.shift()[row];
    scale = rows.scale()[row] * grad;
    at_target = rows.at_target()[row] * grad;
  }

  __device__ T of(T x, int64_t c) const {
    using S = Scalar<T>;
    if (target < 0) return S::store(0);
    return S::store(c == target ? at_target : S::Math::exp(S::load(x) - shift) * scale);
  }
};

template <int lanes>
constexpr int block_of = lanes > threads ? lanes : threads;

// Threads of rows past the end take part in the shuffles, with nothing to add.
template <class T, int lanes, int width>
__global__ void __launch_bounds__(block_of<lanes>, 1024 / block_of<lanes>)
    forward_rows(SoftmaxRows<T> rows, SoftmaxLoss<ComputeOf<T>> to) {
  const int64_t row = int64_t(blockIdx.x) * (block_of<lanes> / lanes) + threadIdx.x / lanes;
  const int64_t target = row < rows.rows ? class_of(rows, row) : -1;
  RunningSum<ComputeOf<T>> running;
  if (row < rows.rows) {
    constexpr int count = width == 1 ? 4 : width, apart = width == 1 ? lanes : 1;
    const T* const x = rows.x + row * rows.classes;
    for (int64_t c = threadIdx.x % lanes * width; c < rows.classes; c += lanes * count) {
      ComputeOf<T> values[count];
      if constexpr (width == 1) {
        NNFAST_UNROLL
        for (int e = 0; e < count; ++e)
          values[e] = c + e * apart < rows.classes ? Scalar<T>::load(x[c + e * apart]) : -INFINITY;
      } else {
        const auto vector = *reinterpret_cast<const Vector<T, width>*>(x + c);
        NNFAST_UNROLL
        for (int e = 0; e < count; ++e) values[e] = Scalar<T>::load(vector.element[e]);
      }
      Team<T, lanes>::template take<count>(running, values, c, target, apart);
    }
  }
  running = Team<T, lanes>::reduce(running);
  if (row < rows.rows && threadIdx.x % lanes == 0) write_row(rows, to, row, target, running);
}

template <class T, int lanes, int width>
__global__ void __launch_bounds__(block_of<lanes>, 1024 / block_of<lanes>)
    backward_rows(SoftmaxRows<T> rows, Upstream<ComputeOf<T>> grad, T* dx) {
  using V = Vector<T, width>;
  const int64_t row = int64_t(blockIdx.x) * (block_of<lanes> / lanes) + threadIdx.x / lanes;
  if (row >= rows.rows) return;
  const int64_t first = row * rows.classes;
  const Slope<T> slope(rows, grad, row);
  for (int64_t c = threadIdx.x % lanes * width; c < rows.classes; c += lanes * width) {
    V vector = *reinterpret_cast<const V*>(rows.x + first + c);
    NNFAST_UNROLL
    for (int e = 0; e < width; ++e) vector.element[e] = slope.of(vector.element[e], c + e);
    *reinterpret_cast<V*>(dx + first + c) = vector;
  }
}

// One thread sums a strided row, 16 bytes of the arithmetic in flight.
template <class T>
__global__ void __launch_bounds__(threads, 4)
    forward_strided(SoftmaxRows<T> rows, SoftmaxLoss<ComputeOf<T>> to) {
  constexpr int count = 16 / sizeof(ComputeOf<T>);
  const int64_t row = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (row >= rows.rows) return;
  const int64_t target = class_of(rows, row);
  const T* const x = rows.x + rows.first(row);
  RunningSum<ComputeOf<T>> running;
  int64_t c = 0;
  for (; c + count <= rows.classes; c += count) {
    ComputeOf<T> values[count];
    NNFAST_UNROLL
    for (int e = 0; e < count; ++e) values[e] = Scalar<T>::load(x[(c + e) * rows.inner]);
    Team<T, 1>::template take<count>(running, values, c, target);
  }
  for (; c < rows.classes; ++c) {
    const ComputeOf<T> value[1] = {Scalar<T>::load(x[c * rows.inner])};
    Team<T, 1>::template take<1>(running, value, c, target);
  }
  write_row(rows, to, row, target, running);
}

template <class T>
__global__ void __launch_bounds__(threads, 4)
    backward_strided(SoftmaxRows<T> rows, Upstream<ComputeOf<T>> grad, T* dx) {
  const int64_t row = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (row >= rows.rows) return;
  const int64_t first = rows.first(row);
  const Slope<T> slope(rows, grad, row);
  for (int64_t c = 0; c < rows.classes; ++c)
    dx[first + c * rows.inner] = slope.of(rows.x[first + c * rows.inner], c);
}

struct FocalDevice : Device {
  template <class T>
  static void softmax_forward(const SoftmaxRows<T>& rows, const SoftmaxLoss<ComputeOf<T>>& to,
                              int32_t device_index) {
    run(rows, true, [&](auto lanes, auto width, int64_t blocks) {
      constexpr const char* name = "softmax_focal_loss";
      if constexpr (lanes == 1)
        launch(name, forward_strided<T>, blocks, threads, 0, device_index, rows, to);
      else
        launch(name, forward_rows<T, lanes, width>, blocks, block_of<lanes>, 0, device_index, rows, to);
    });
  }

  template <class T>
  static void softmax_backward(const SoftmaxRows<T>& rows, const Upstream<ComputeOf<T>>& grad, T* dx,
                               int32_t device_index) {
    run(rows, is_aligned(dx), [&](auto lanes, auto width, int64_t blocks) {
      constexpr const char* name = "softmax_focal_loss_backward";
      if constexpr (lanes == 1)
        launch(name, backward_strided<T>, blocks, threads, 0, device_index, rows, grad, dx);
      else
        launch(name, backward_rows<T, lanes, width>, blocks, block_of<lanes>, 0, device_index, rows, grad,
               dx);
    });
  }

 private:
  template <int value>
  using Constant = std::integral_constant<int, value>;

  // Calls body(threads a row, elements an access, blocks).
  template <class T, class Body>
  static void run(const SoftmaxRows<T>& rows, bool out_is_aligned, const Body& body) {
    constexpr int vector = 16 / sizeof(T);
    const auto blocks = [&](int64_t rows_a_block) { return (rows.rows + rows_a_block - 1) / rows_a_block; };
    const auto with_lanes = [&](auto lanes) {
      const int64_t count = blocks(block_of<lanes> / lanes);
      if (out_is_aligned && is_aligned(rows.x) && rows.classes % vector == 0)
        body(lanes, Constant<vector>{}, count);
      else
        body(lanes, Constant<1>{}, count);
    };
    if (rows.inner > 1) return body(Constant<1>{}, Constant<1>{}, blocks(threads));
    if (rows.classes <= 64) return with_lanes(Constant<8>{});
    if (rows.classes <= 2048) return with_lanes(Constant<32>{});
    if (rows.classes * sizeof(T) <= 32 << 10) return with_lanes(Constant<threads>{});
    with_lanes(Constant<1024>{});
  }
};

}  // namespace nnfast::cuda

NNFAST_CUDA_LIBRARY(m) { nnfast::FocalLoss<nnfast::cuda::FocalDevice>::add_to(m); }
