// Swish and Mish on the CPU.
#include "common/cpu.h"

#include "activation/math.h"
#include "common/elementwise.h"

namespace nnfast::cpu {

// out[i] = f(inputs[i]...): whole vectors, then the rest through a padded copy.
template <class Fn, class T, int inputs>
struct Loop {
  const T* in[inputs];
  T* out;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = Pack<T, bytes>::lanes;
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) one<bytes>(in[0] + i, in[inputs - 1] + i, out + i);
    if (i == end) return;
    T first[lanes] = {}, last[lanes] = {};
    std::memcpy(first, in[0] + i, (end - i) * sizeof(T));
    std::memcpy(last, in[inputs - 1] + i, (end - i) * sizeof(T));
    one<bytes>(first, last, first);
    std::memcpy(out + i, first, (end - i) * sizeof(T));
  }

  template <int bytes>
  static NNFAST_INLINE void one(const T* first, const T* last, T* out) {
    using P = Pack<T, bytes>;
    using Math = typename Scalar<T>::Math;
    P a = P::load(first);
    const P b = P::load(last);
    for (int i = 0; i < P::parts; ++i) {
      if constexpr (inputs == 1)
        a.part[i] = Fn::template forward<Math>(a.part[i]);
      else
        a.part[i] = Fn::template backward<Math>(a.part[i], b.part[i]);
    }
    a.store(out);
  }
};

struct Device {
  static constexpr int64_t grain = 32768;

  template <class Fn, class T>
  static void forward(const T* x, T* y, int64_t n, int32_t) {
    parallel(n, grain, Loop<Fn, T, 1>{{x}, y});
  }

  template <class Fn, class T>
  static void backward(const T* grad, const T* x, T* dx, int64_t n, int32_t) {
    parallel(n, grain, Loop<Fn, T, 2>{{grad, x}, dx});
  }
};

}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  nnfast::Elementwise<nnfast::cpu::Device, nnfast::Silu>::add_to(m);
  nnfast::Elementwise<nnfast::cpu::Device, nnfast::Mish>::add_to(m);
}
