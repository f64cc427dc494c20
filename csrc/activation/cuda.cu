// Swish and Mish on CUDA. A thread has `accesses` independent vectors of each input in flight, of 16 bytes
// where the pointers allow it: 2048 threads x 2 x 16 bytes = 64 KB a multiprocessor.
#include "activation/math.h"
#include "common/cuda.h"
#include "common/elementwise.h"

namespace nnfast::cuda {

constexpr int threads = 256, accesses = 2;

// out = forward(x), or backward(grad, x) where Backward.
template <class Fn, bool Backward, class T>
NNFAST_INLINE T apply(T grad, T x) {
  using S = Scalar<T>;
  using Math = typename S::Math;
  if constexpr (Backward)
    return S::store(Fn::template backward<Math>(S::load(grad), S::load(x)));
  else
    return S::store(Fn::template forward<Math>(S::load(x)));
}

// The thread whose vector would pass the end goes on element by element.
template <class Fn, bool Backward, int width, class T>
__global__ void __launch_bounds__(threads) elementwise(const T* grad, const T* x, T* out, int64_t n) {
  using V = Vector<T, width>;
  const int64_t start = (int64_t(blockIdx.x) * accesses * threads + threadIdx.x) * width;
  V grads[accesses] = {}, xs[accesses] = {};
  NNFAST_UNROLL
  for (int a = 0; a < accesses; ++a) {
    const int64_t i = start + a * threads * width;
    if (i + width <= n) {
      if constexpr (Backward) grads[a] = *reinterpret_cast<const V*>(grad + i);
      xs[a] = *reinterpret_cast<const V*>(x + i);
    }
  }
  NNFAST_UNROLL
  for (int a = 0; a < accesses; ++a) {
    int64_t i = start + a * threads * width;
    if (i + width <= n) {
      NNFAST_UNROLL
      for (int e = 0; e < width; ++e)
        xs[a].element[e] = apply<Fn, Backward>(grads[a].element[e], xs[a].element[e]);
      *reinterpret_cast<V*>(out + i) = xs[a];
    } else {
      for (; i < n; ++i) out[i] = apply<Fn, Backward>(Backward ? grad[i] : T{}, x[i]);
    }
  }
}

template <class Fn, bool Backward, class T>
void launch_elementwise(const T* grad, const T* x, T* out, int64_t n, int32_t device_index) {
  constexpr int vector = 16 / sizeof(T);
  const bool aligned = is_aligned(grad) && is_aligned(x) && is_aligned(out);
  const int64_t block = int64_t(threads) * accesses * (aligned ? vector : 1);
  const auto kernel = aligned ? elementwise<Fn, Backward, vector, T> : elementwise<Fn, Backward, 1, T>;
  launch(Fn::name, kernel, (n + block - 1) / block, threads, 0, device_index, grad, x, out, n);
}

struct Device {
  template <class Fn, class T>
  static void forward(const T* x, T* y, int64_t n, int32_t device_index) {
    launch_elementwise<Fn, false, T>(nullptr, x, y, n, device_index);
  }

  template <class Fn, class T>
  static void backward(const T* grad, const T* x, T* dx, int64_t n, int32_t device_index) {
    launch_elementwise<Fn, true>(grad, x, dx, n, device_index);
  }
};

}  // namespace nnfast::cuda

NNFAST_CUDA_LIBRARY(m) {
  nnfast::Elementwise<nnfast::cuda::Device, nnfast::Silu>::add_to(m);
  nnfast::Elementwise<nnfast::cuda::Device, nnfast::Mish>::add_to(m);
}
