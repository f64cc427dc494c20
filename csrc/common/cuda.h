// CUDA kernels: 16-byte accesses and the one seam through which every kernel is launched. With
// NNFAST_EMULATE_CUDA the same sources compile as host C++, where tests/emulation/cuda_emulation.h runs them.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"
#include "common/scalar.h"

// NNFAST_DEVICE_CHECK ends the kernel with the message, a string literal, where the condition does not hold.
#if defined(NNFAST_EMULATE_CUDA)
#include "cuda_emulation.h"
#define NNFAST_DEVICE_CHECK(condition, message) nnfast::check(condition, message)
#define NNFAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(nnfast_emulated, CPU, m)
#else
#undef NDEBUG
#include <cuda_runtime.h>

#include <cassert>
#define NNFAST_DEVICE_CHECK(condition, message) assert((condition) && message)
#define NNFAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(nnfast, CUDA, m)

#include "common/stream.h"
#endif

namespace nnfast::cuda {

template <class T, int width>
struct alignas(width * sizeof(T)) Vector {
  T element[width];
};

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The dynamic shared memory of the block.
template <class T>
__device__ T* dynamic_shared() {
#if defined(NNFAST_EMULATE_CUDA)
  return reinterpret_cast<T*>(cuda_emulation::dynamic_shared.data());
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

// Runs kernel(args...) on the device's current stream. Dynamic shared memory is `shared_bytes`.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
            int32_t device_index, Args... args) {
  if (blocks == 0) return;
  check(blocks <= 0x7fffffff, name, ": ", blocks, " blocks are more than a grid can have");
#if defined(NNFAST_EMULATE_CUDA)
  static_cast<void>(device_index);
  cuda_emulation::launch(name, blocks, threads, shared_bytes, [&] { kernel(static_cast<Params>(args)...); });
#else
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(current_stream(device_index));
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10)  // more has to be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (error != cudaSuccess) fail("launch of ", name, " failed: ", cudaGetErrorString(error));
#endif
}

}  // namespace nnfast::cuda
