// The focal loss on CUDA. A contiguous row belongs to 8 or 32 threads or to a block, by its length, and is
// read in 16-byte vectors where they are aligned; a strided row belongs to one thread, neighbours side by
// side. Contiguous rows are read once: the backward keeps them in shared memory where they fit (64k classes
// in bfloat16 on every architecture from sm_80 on), and reads longer ones again.
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

  // Adds count elements from x[0], x[stride] on, classes `c` on, but not the target's. `Known`: the maximum
  // stays what it is.
  template <int count, bool Known>
  static __device__ void take(RunningSum<Compute>& running, const Compute (&x)[count], int64_t c,
                              int64_t target) {
    if constexpr (!Known) {
      Compute most = x[0];
      NNFAST_UNROLL
      for (int e = 1; e < count; ++e) most = max(x[e], most);
      running.template raise<Math>(most);
    }
    NNFAST_UNROLL
    for (int e = 0; e < count; ++e)
      running.sum += c + e == target ? Compute(0) : Math::exp(x[e] - running.maximum);
  }
};

template <class T, class Compute>
__device__ void write_row(const SoftmaxRows<T>& rows, Compute* loss, int64_t row, int64_t target,
                          const RunningSum<Compute>& running) {
  if (target < 0) {
    loss[row] = 0;
    rows.log_sum_exp[row] = running.maximum + Precise::log(running.sum);
    return;
  }
  const Compute x = Scalar<T>::load(rows.x[rows.first(row) + target * rows.inner]);
  const TargetClass<Compute> at(x - running.maximum, running.sum);
  loss[row] = at.loss(rows.power, rows.alpha ? rows.alpha[target] : Compute(1));
  rows.log_sum_exp[row] = running.maximum + Precise::log(at.sum);
}

// What a row's gradient needs: exp(x_j - shift) * scale at every class but the target, at_target there.
template <class T>
struct Slope {
  using Compute = ComputeOf<T>;
  Compute shift, scale, at_target;
  int64_t target;

  // Normalised anew: log_sum_exp is rounded, and p with it by as much as |log_sum_exp| is large.
  __device__ Slope(const SoftmaxRows<T>& rows, const Compute* grad, int64_t row, int64_t target,
                   Compute shift, Compute others)
      : shift(shift), scale(0), at_target(0), target(target) {
    if (target < 0) return;
    const Compute x = Scalar<T>::load(rows.x[rows.first(row) + target * rows.inner]);
    const TargetClass<Compute> at(x - shift, others);
    const Compute k = grad[row] * at.slope(rows.power, rows.alpha ? rows.alpha[target] : Compute(1));
    scale = k / at.sum;
    at_target = -k * at.q;
  }

  __device__ T of(T x, int64_t c) const {
    using S = Scalar<T>;
    if (target < 0) return S::store(0);
    return S::store(c == target ? at_target : S::Math::exp(S::load(x) - shift) * scale);
  }
};

template <int lanes>
constexpr int block_of = lanes > threads ? lanes : threads;

// The vectors of x that this thread has read: `slots` of them in shared memory, or with none where they came
// from. No thread reads another's, so there is nothing to wait for.
template <class T, int lanes, int width>
struct Kept {
  using V = Vector<T, width>;
  static constexpr int block = block_of<lanes>;
  const T* row;
  int slots;

  static int slots_of(int64_t classes) { return int((classes + lanes * width - 1) / (lanes * width)); }
  static int64_t bytes(int64_t slots) { return slots * block * int64_t(sizeof(V)); }

  __device__ V load(int64_t c) const {
    const V vector = *reinterpret_cast<const V*>(row + c);
    if (slots) slot(c) = vector;
    return vector;
  }

  __device__ V again(int64_t c) const { return slots ? slot(c) : *reinterpret_cast<const V*>(row + c); }

 private:
  static __device__ V& slot(int64_t c) {
    return dynamic_shared<V>()[int(c) / (lanes * width) * block + int(threadIdx.x)];
  }
};

// Threads of rows past the end take part in the shuffles, with nothing to add.
template <class T, int lanes, int width, bool Known>
__device__ RunningSum<ComputeOf<T>> sum_others(const SoftmaxRows<T>& rows, int64_t row, int64_t target,
                                               RunningSum<ComputeOf<T>> running,
                                               const Kept<T, lanes, width>& kept) {
  if (row < rows.rows) {
    for (int64_t c = threadIdx.x % lanes * width; c < rows.classes; c += lanes * width) {
      const auto vector = kept.load(c);
      ComputeOf<T> values[width];
      NNFAST_UNROLL
      for (int e = 0; e < width; ++e) values[e] = Scalar<T>::load(vector.element[e]);
      Team<T, lanes>::template take<width, Known>(running, values, c, target);
    }
  }
  return Team<T, lanes>::reduce(running);
}

template <class T, int lanes, int width>
__global__ void __launch_bounds__(block_of<lanes>, 1024 / block_of<lanes>)
    forward_rows(SoftmaxRows<T> rows, ComputeOf<T>* loss) {
  const int64_t row = int64_t(blockIdx.x) * (block_of<lanes> / lanes) + threadIdx.x / lanes;
  const int64_t target = row < rows.rows ? class_of(rows, row) : -1;
  const Kept<T, lanes, width> x{rows.x + row * rows.classes, 0};
  const auto running = sum_others<T, lanes, width, false>(rows, row, target, {}, x);
  if (row < rows.rows && threadIdx.x % lanes == 0) write_row(rows, loss, row, target, running);
}

template <class T, int lanes, int width>
__global__ void __launch_bounds__(block_of<lanes>, 1024 / block_of<lanes>)
    backward_rows(SoftmaxRows<T> rows, const ComputeOf<T>* grad, T* dx, int slots) {
  using V = Vector<T, width>;
  const int64_t row = int64_t(blockIdx.x) * (block_of<lanes> / lanes) + threadIdx.x / lanes;
  const int64_t target = row < rows.rows ? class_of(rows, row) : -1;
  const ComputeOf<T> shift = row < rows.rows ? rows.log_sum_exp[row] : ComputeOf<T>(0);
  const int64_t first = row * rows.classes;
  const Kept<T, lanes, width> x{rows.x + first, slots};
  const auto running = sum_others<T, lanes, width, true>(rows, row, target, {shift, 0}, x);
  if (row >= rows.rows) return;
  const Slope<T> slope(rows, grad, row, target, shift, running.sum);
  for (int64_t c = threadIdx.x % lanes * width; c < rows.classes; c += lanes * width) {
    V vector = x.again(c);
    NNFAST_UNROLL
    for (int e = 0; e < width; ++e) vector.element[e] = slope.of(vector.element[e], c + e);
    *reinterpret_cast<V*>(dx + first + c) = vector;
  }
}

// One thread sums a strided row, 16 bytes of the arithmetic in flight.
template <class T, bool Known>
__device__ void sum_strided(const SoftmaxRows<T>& rows, int64_t row, int64_t target,
                            RunningSum<ComputeOf<T>>& running) {
  constexpr int count = 16 / sizeof(ComputeOf<T>);
  const T* const x = rows.x + rows.first(row);
  int64_t c = 0;
  for (; c + count <= rows.classes; c += count) {
    ComputeOf<T> values[count];
    NNFAST_UNROLL
    for (int e = 0; e < count; ++e) values[e] = Scalar<T>::load(x[(c + e) * rows.inner]);
    Team<T, 1>::template take<count, Known>(running, values, c, target);
  }
  for (; c < rows.classes; ++c) {
    const ComputeOf<T> value[1] = {Scalar<T>::load(x[c * rows.inner])};
    Team<T, 1>::template take<1, Known>(running, value, c, target);
  }
}

template <class T>
__global__ void __launch_bounds__(threads, 4) forward_strided(SoftmaxRows<T> rows, ComputeOf<T>* loss) {
  const int64_t row = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (row >= rows.rows) return;
  const int64_t target = class_of(rows, row);
  RunningSum<ComputeOf<T>> running;
  sum_strided<T, false>(rows, row, target, running);
  write_row(rows, loss, row, target, running);
}

template <class T>
__global__ void __launch_bounds__(threads, 4)
    backward_strided(SoftmaxRows<T> rows, const ComputeOf<T>* grad, T* dx) {
  const int64_t row = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (row >= rows.rows) return;
  const int64_t target = class_of(rows, row), first = rows.first(row);
  RunningSum<ComputeOf<T>> running{rows.log_sum_exp[row], 0};
  sum_strided<T, true>(rows, row, target, running);
  const Slope<T> slope(rows, grad, row, target, running.maximum, running.sum);
  for (int64_t c = 0; c < rows.classes; ++c)
    dx[first + c * rows.inner] = slope.of(rows.x[first + c * rows.inner], c);
}

struct FocalDevice : Device {
  template <class T>
  static void softmax_forward(const SoftmaxRows<T>& rows, ComputeOf<T>* loss, int32_t device_index) {
    run(rows, true, [&](auto lanes, auto width, int64_t blocks) {
      constexpr const char* name = "softmax_focal_loss";
      if constexpr (lanes == 1)
        launch(name, forward_strided<T>, blocks, threads, 0, device_index, rows, loss);
      else
        launch(name, forward_rows<T, lanes, width>, blocks, block_of<lanes>, 0, device_index, rows, loss);
    });
  }

  template <class T>
  static void softmax_backward(const SoftmaxRows<T>& rows, const ComputeOf<T>* grad, T* dx,
                               int32_t device_index) {
    run(rows, is_aligned(dx), [&](auto lanes, auto width, int64_t blocks) {
      constexpr const char* name = "softmax_focal_loss_backward";
      if constexpr (lanes == 1) {
        launch(name, backward_strided<T>, blocks, threads, 0, device_index, rows, grad, dx);
      } else {
        using Row = Kept<T, lanes, width>;
        const int slots = Row::slots_of(rows.classes);
        constexpr int64_t own = 2048;  // at most what the kernel itself and CUDA take
        const bool fits = Row::bytes(slots) + own <= most_shared_bytes(device_index);
        launch(name, backward_rows<T, lanes, width>, blocks, block_of<lanes>, fits ? Row::bytes(slots) : 0,
               device_index, rows, grad, dx, fits ? slots : 0);
      }
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
    with_lanes(Constant<1024>{});  // few such rows are on chip at once, so each has more threads
  }
};

}  // namespace nnfast::cuda

NNFAST_CUDA_LIBRARY(m) { nnfast::FocalLoss<nnfast::cuda::FocalDevice>::add_to(m); }
