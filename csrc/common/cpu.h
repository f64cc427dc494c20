// Loops on the CPU: one body over vectors of 16, 32 or 64 bytes, compiled for generic x86-64 (or whatever
// else this is), AVX2 and AVX-512, picked once at run time and spread over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#include "common/check.h"
#include "common/macros.h"
#include "common/scalar.h"

namespace nnfast::cpu {

template <class Element, int bytes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(bytes)));
};

// `lanes` elements of type T, converted to vectors of `bytes` bytes in the type of the arithmetic. BFloat16
// comes in pairs: the even and the odd elements of the same bytes, so that a shift or a mask converts and
// nothing is shuffled.
template <class T, int bytes>
struct Pack {
  using Compute = typename VectorOf<typename Scalar<T>::Compute, bytes>::type;
  using Bits = typename Lanes<Compute>::Bits;
  static constexpr int parts = std::is_same_v<T, BFloat16> ? 2 : 1;
  static constexpr int lanes = parts * bytes / sizeof(typename Scalar<T>::Compute);
  Compute part[parts];

  static NNFAST_INLINE Pack load(const T* from) {
    Pack pack;
    typename VectorOf<uint8_t, lanes * sizeof(T)>::type memory;
    std::memcpy(&memory, from, sizeof(memory));
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Bits both = __builtin_bit_cast(Bits, memory);
      pack.part[0] = __builtin_bit_cast(Compute, both << 16);
      pack.part[1] = __builtin_bit_cast(Compute, both & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, Half> && bytes >= 32) {
      // F16C by hand: its intrinsics would tie this template to one instruction set.
      asm("vcvtph2ps %1, %0" : "=v"(pack.part[0]) : "v"(memory));
    } else if constexpr (std::is_same_v<T, Half>) {
      const auto narrow = __builtin_bit_cast(typename VectorOf<uint16_t, sizeof(memory)>::type, memory);
      pack.part[0] = host::half_to_float<Compute>(__builtin_convertvector(narrow, Bits));
    } else {
      pack.part[0] = __builtin_bit_cast(Compute, memory);
    }
    return pack;
  }

  // With `stream`, past the caches; `to` must be a multiple of `bytes` then.
  template <bool stream>
  NNFAST_INLINE void store(T* to) const {
    typename VectorOf<uint8_t, lanes * sizeof(T)>::type memory;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Bits even = host::round_to_bfloat16<Bits>(part[0]), odd = host::round_to_bfloat16<Bits>(part[1]);
      memory = __builtin_bit_cast(decltype(memory), even >> 16 | (odd & 0xffff0000u));
    } else if constexpr (std::is_same_v<T, Half> && bytes >= 32) {
      asm("vcvtps2ph $0, %1, %0" : "=v"(memory) : "v"(part[0]));
    } else if constexpr (std::is_same_v<T, Half>) {
      using Narrow = typename VectorOf<uint16_t, sizeof(memory)>::type;
      memory = __builtin_bit_cast(decltype(memory),
                                  __builtin_convertvector(host::float_to_half<Bits>(part[0]), Narrow));
    } else {
      memory = __builtin_bit_cast(decltype(memory), part[0]);
    }
    if constexpr (stream)
      asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<decltype(memory)*>(to)) : "v"(memory));
    else
      std::memcpy(to, &memory, sizeof(memory));
  }
};

// Memory for vectors.
template <class Element>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<Element*>(operator new(n * sizeof(Element), std::align_val_t(64)))) {}
  NNFAST_INLINE Element* get() const { return data_.get(); }
  NNFAST_INLINE operator Element*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(Element* data) const { operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<Element, Free> data_;
};

// Whether results that a loop over `bytes` of input and output writes are better streamed past the caches:
// they save reading what is overwritten, but whoever reads them next finds them in no cache. Larger than that
// they would not be there anyway.
inline bool worth_streaming(int64_t bytes) {
  constexpr int64_t cache = 40 << 20, threads_per_cache = 8;
  return bytes > cache && bytes > cache * ((torch::stable::get_num_threads() - 1) / threads_per_cache + 1);
}

// Asks for huge pages behind a new output: first touches of 4 KB pages, one fault each, can take most of a
// backward's time. From 32 MB on malloc maps new memory for every output; less is mostly memory that was
// touched before, where pages would be made huge for nothing.
inline void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t page = 4096, mapped = 32 << 20;
  if (bytes < mapped) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#endif
}

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
