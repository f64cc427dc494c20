// Elementwise functions over dense memory on the CPU.
#pragma once

#include <algorithm>
#include <utility>

#include "common/cpu.h"
#include "common/elementwise.h"

namespace nnfast::cpu {

// out[i] = fn(in[0][i], ...): whole vectors, and what is left at the ends through a padded copy.
template <class Fn, class T, size_t inputs>
struct Map {
  Fn fn;
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
  using Each = std::make_index_sequence<inputs>;

  template <int bytes, bool stream>
  NNFAST_INLINE void vectors(int64_t i, int64_t end) const {
    constexpr int lanes = Pack<T, bytes>::lanes;
    const Map map = *this;  // in registers, since what is stored may overlap *this
    for (; i + lanes <= end; i += lanes) {
      const T* from[inputs];
      for (size_t k = 0; k < inputs; ++k) from[k] = map.in[k] + i;
      map.template one<bytes, stream>(from, map.out + i, Each{});
    }
    part<bytes>(i, end);
  }

  // Less than a vector.
  template <int bytes>
  NNFAST_INLINE void part(int64_t i, int64_t end) const {
    constexpr int lanes = Pack<T, bytes>::lanes;
    if (i == end) return;
    T padded[inputs][lanes] = {};
    const T* from[inputs];
    for (size_t k = 0; k < inputs; ++k) {
      std::memcpy(padded[k], in[k] + i, (end - i) * sizeof(T));
      from[k] = padded[k];
    }
    one<bytes, false>(from, padded[0], Each{});
    std::memcpy(out + i, padded[0], (end - i) * sizeof(T));
  }

  template <int bytes, bool stream, size_t... each>
  NNFAST_INLINE void one(const T* const (&from)[inputs], T* to, std::index_sequence<each...>) const {
    using P = Pack<T, bytes>;
    const P packs[] = {P::load(from[each])...};
    P result;
    for (int i = 0; i < P::parts; ++i)
      result.part[i] = fn.template apply<typename Scalar<T>::Math>(packs[each].part[i]...);
    result.template store<stream>(to);
  }
};

struct Device {
  static constexpr int64_t grain = 32768;

  template <class Fn, class T, size_t inputs>
  static void map(const char*, const Fn& fn, const T* const (&in)[inputs], T* out, int64_t n, int32_t) {
    const bool in_place = std::find(in, in + inputs, out) != in + inputs;
    Map<Fn, T, inputs> loop{
        prepared(fn), {}, out, !in_place && worth_streaming((inputs + 1) * n * sizeof(T))};
    std::copy_n(in, inputs, loop.in);
    if (!in_place) expect_writes(out, n * sizeof(T));
    parallel(n, grain, loop);
  }
};

}  // namespace nnfast::cpu
