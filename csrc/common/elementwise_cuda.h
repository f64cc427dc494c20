// Elementwise functions over dense memory on CUDA. A thread has `accesses` independent vectors of each input
// in flight, of 16 bytes where the pointers allow it: 2048 threads x 2 x 16 bytes = 64 KB a multiprocessor.
// Three inputs make one access of each enough, and leave registers for what is computed.
#pragma once

#include <utility>

#include "common/cuda.h"
#include "common/elementwise.h"

namespace nnfast::cuda {

constexpr int threads = 256;

template <size_t inputs>
constexpr int accesses_of = inputs < 3 ? 2 : 1;

template <class T, size_t inputs>
struct Inputs {
  const T* in[inputs];
};

template <class Fn, class T, size_t... each>
NNFAST_INLINE T apply(const Fn& fn, const T (&x)[sizeof...(each)], std::index_sequence<each...>) {
  using S = Scalar<T>;
  return S::store(fn.template apply<typename S::Math>(S::load(x[each])...));
}

// The thread whose vector would pass the end goes on element by element.
template <class Fn, int width, class T, size_t inputs>
__global__ void __launch_bounds__(threads, 4) elementwise(Fn fn, Inputs<T, inputs> from, T* out, int64_t n) {
  using V = Vector<T, width>;
  using Each = std::make_index_sequence<inputs>;
  constexpr int accesses = accesses_of<inputs>;
  const int64_t start = (int64_t(blockIdx.x) * accesses * threads + threadIdx.x) * width;
  const Fn ready = prepared(fn);
  V x[accesses][inputs] = {};
  NNFAST_UNROLL
  for (int a = 0; a < accesses; ++a) {
    const int64_t i = start + a * threads * width;
    if (i + width <= n) {
      NNFAST_UNROLL
      for (size_t k = 0; k < inputs; ++k) x[a][k] = *reinterpret_cast<const V*>(from.in[k] + i);
    }
  }
  NNFAST_UNROLL
  for (int a = 0; a < accesses; ++a) {
    int64_t i = start + a * threads * width;
    T one[inputs];
    if (i + width <= n) {
      V result;
      NNFAST_UNROLL
      for (int e = 0; e < width; ++e) {
        NNFAST_UNROLL
        for (size_t k = 0; k < inputs; ++k) one[k] = x[a][k].element[e];
        result.element[e] = apply(ready, one, Each{});
      }
      *reinterpret_cast<V*>(out + i) = result;
    } else {
      for (; i < n; ++i) {
        NNFAST_UNROLL
        for (size_t k = 0; k < inputs; ++k) one[k] = from.in[k][i];
        out[i] = apply(ready, one, Each{});
      }
    }
  }
}

struct Device {
  template <class Fn, class T, size_t inputs>
  static void map(const char* name, const Fn& fn, const T* const (&in)[inputs], T* out, int64_t n,
                  int32_t device_index) {
    constexpr int vector = 16 / sizeof(T);
    Inputs<T, inputs> from;
    bool aligned = is_aligned(out);
    for (size_t k = 0; k < inputs; ++k) {
      from.in[k] = in[k];
      aligned &= is_aligned(in[k]);
    }
    const int64_t block = int64_t(threads) * accesses_of<inputs> * (aligned ? vector : 1);
    const auto kernel = aligned ? elementwise<Fn, vector, T, inputs> : elementwise<Fn, 1, T, inputs>;
    launch(name, kernel, (n + block - 1) / block, threads, 0, device_index, fn, from, out, n);
  }
};

}  // namespace nnfast::cuda
