// Swish and Mish on the CPU.
#include "common/cpu.h"

#include "activation/math.h"
#include "common/elementwise.h"

namespace nnfast::cpu {

// out[i] = f(inputs[i]...): whole vectors, and what is left at the ends through a padded copy.
template <class Fn, class T, int inputs>
struct Loop {
  const T* in[inputs];
  T* out;
  bool stream;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    if constexpr (bytes >= 32) {
      constexpr int alignment = Pack<T, bytes>::lanes * sizeof(T);
      const int64_t ahead = (-reinterpret_cast<intptr_t>(out + begin) & (alignment - 1)) / sizeof(T);
      if (stream && begin + ahead < end) {
        part<bytes>(begin, begin + ahead);
        vectors<bytes, true>(begin + ahead, end);
        asm volatile("sfence" ::: "memory");
        return;
      }
    }
    vectors<bytes, false>(begin, end);
  }

 private:
  template <int bytes, bool stream>
  NNFAST_INLINE void vectors(int64_t i, int64_t end) const {
    constexpr int lanes = Pack<T, bytes>::lanes;
    for (; i + lanes <= end; i += lanes) one<bytes, stream>(in[0] + i, in[inputs - 1] + i, out + i);
    part<bytes>(i, end);
  }

  // Less than a vector.
  template <int bytes>
  NNFAST_INLINE void part(int64_t i, int64_t end) const {
    constexpr int lanes = Pack<T, bytes>::lanes;
    if (i == end) return;
    T first[lanes] = {}, last[lanes] = {};
    std::memcpy(first, in[0] + i, (end - i) * sizeof(T));
    std::memcpy(last, in[inputs - 1] + i, (end - i) * sizeof(T));
    one<bytes, false>(first, last, first);
    std::memcpy(out + i, first, (end - i) * sizeof(T));
  }

  template <int bytes, bool stream>
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
    a.template store<stream>(out);
  }
};

struct Device {
  static constexpr int64_t grain = 32768;

  template <class Fn, class T>
  static void forward(const T* x, T* y, int64_t n, int32_t) {
    const bool stream = x != y && worth_streaming(2 * n * sizeof(T));
    parallel(n, grain, Loop<Fn, T, 1>{{x}, y, stream});
  }

  template <class Fn, class T>
  static void backward(const T* grad, const T* x, T* dx, int64_t n, int32_t) {
    const bool stream = x != dx && grad != dx && worth_streaming(3 * n * sizeof(T));
    parallel(n, grain, Loop<Fn, T, 2>{{grad, x}, dx, stream});
  }
};

}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  nnfast::Elementwise<nnfast::cpu::Device, nnfast::Silu>::add_to(m);
  nnfast::Elementwise<nnfast::cpu::Device, nnfast::Mish>::add_to(m);
}
