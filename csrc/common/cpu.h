// Loops on the CPU: one body over vectors of 16, 32 or 64 bytes, compiled for generic x86-64 (or whatever
// else this is), AVX2 and AVX-512, picked once at run time and spread over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "common/check.h"
#include "common/macros.h"
#include "common/scalar.h"

namespace nnfast::cpu {

template <class Element, int bytes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(bytes)));
};

// What Scalar<T> is to one element, for the `lanes` elements that fill `bytes` in the type of the arithmetic.
template <class T, int bytes>
struct Pack {
  using Compute = typename VectorOf<typename Scalar<T>::Compute, bytes>::type;
  using Math = typename Scalar<T>::Math;
  static constexpr int lanes = bytes / sizeof(typename Scalar<T>::Compute);

  static NNFAST_INLINE Compute load(const T* from) {
    if constexpr (sizeof(T) == 2) {
      typename VectorOf<uint16_t, bytes / 2>::type narrow;
      std::memcpy(&narrow, from, sizeof(narrow));
      if constexpr (std::is_same_v<T, BFloat16>) {
        return host::bfloat16_to_float<Compute>(__builtin_convertvector(narrow, Bits));
      } else if constexpr (bytes >= 32) {
        Compute value;  // F16C, by hand: intrinsics would tie this template to one instruction set
        asm("vcvtph2ps %1, %0" : "=v"(value) : "v"(narrow));
        return value;
      } else {
        return host::half_to_float<Compute>(__builtin_convertvector(narrow, Bits));
      }
    } else {
      Compute value;
      std::memcpy(&value, from, sizeof(value));
      return value;
    }
  }

  static NNFAST_INLINE void store(T* to, Compute value) {
    if constexpr (sizeof(T) == 2) {
      using Narrow = typename VectorOf<uint16_t, bytes / 2>::type;
      Narrow narrow;
      if constexpr (std::is_same_v<T, BFloat16>)
        narrow = __builtin_convertvector(host::float_to_bfloat16<Bits>(value), Narrow);
      else if constexpr (bytes >= 32)
        asm("vcvtps2ph $0, %1, %0" : "=v"(narrow) : "v"(value));
      else
        narrow = __builtin_convertvector(host::float_to_half<Bits>(value), Narrow);
      std::memcpy(to, &narrow, sizeof(narrow));
    } else {
      std::memcpy(to, &value, sizeof(value));
    }
  }

 private:
  using Bits = typename Lanes<Compute>::Bits;
};

enum class Isa { generic, avx2, avx512 };

// The widest instruction set of this machine, capped by NNFAST_CPU_ISA.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* variable = std::getenv("NNFAST_CPU_ISA");
    const std::string_view cap = variable ? variable : "avx512";
    check(cap == "generic" || cap == "avx2" || cap == "avx512", "NNFAST_CPU_ISA is '", cap,
          "'; it takes generic, avx2 or avx512");
#if defined(__x86_64__)
    if (cap == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    if (cap != "generic" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      return Isa::avx2;
#endif
    return Isa::generic;
  }();
  return chosen;
}

#if defined(__x86_64__)
template <class Loop>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) void run_avx512(const Loop& loop,
                                                                                            int64_t begin,
                                                                                            int64_t end) {
  loop.template run<64>(begin, end);
}

template <class Loop>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(const Loop& loop, int64_t begin, int64_t end) {
  loop.template run<32>(begin, end);
}
#endif

// Calls loop.run<bytes>(begin, end) on parts of [0, n) in parallel. run is NNFAST_INLINE.
template <class Loop>
void parallel(int64_t n, int64_t grain, const Loop& loop) {
  const Isa chosen = isa();  // here: torch drops the message of what is thrown inside parallel_for
  auto run = [&loop, chosen](int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (chosen == Isa::avx512) return run_avx512(loop, begin, end);
    if (chosen == Isa::avx2) return run_avx2(loop, begin, end);
#else
    static_cast<void>(chosen);
#endif
    loop.template run<16>(begin, end);
  };
  if (n <= grain) return run(0, n);
  torch::stable::parallel_for(0, n, grain, run);
}

}  // namespace nnfast::cpu
