// Runs CUDA kernels on the host, for tests: the threads of a block are fibers (ucontext) taken in turn,
// blocks run one after another. A barrier or shuffle that not all of its threads reach is an error, and so is
// one that never ends. Not emulated: memory order, asynchronous copies, tensor cores.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another, so one copy serves

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_emulation {

enum class Waiting { no, block, warp, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Waiting waiting;
  unsigned mask;       // of the warp barrier it waits at
  uint64_t exchanged;  // what it offers to a shuffle
};

constexpr size_t stack_bytes = 128 * 1024;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current;
inline const std::function<void()>* body;
inline std::exception_ptr thrown;
inline std::vector<unsigned char> dynamic_shared;

inline void enter() {
  try {
    (*body)();
  } catch (...) {
    thrown = std::current_exception();
  }
  fibers[current].waiting = Waiting::done;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void wait(Waiting at, unsigned mask = 0) {
  Fiber& fiber = fibers[current];
  fiber.waiting = at;
  fiber.mask = mask;
  swapcontext(&fiber.context, &scheduler);
}

// Lets go the threads whose barrier is complete; says whether there were any.
inline bool release() {
  const int threads = static_cast<int>(fibers.size());
  bool released = false, whole_block = true;
  for (const Fiber& fiber : fibers) whole_block &= fiber.waiting == Waiting::block;
  for (int first = 0; first < threads; ++first) {
    Fiber& fiber = fibers[first];
    if (fiber.waiting == Waiting::block && whole_block) {
      fiber.waiting = Waiting::no;
      released = true;
    }
    if (fiber.waiting != Waiting::warp) continue;
    const int warp = first / warpSize * warpSize;
    bool all = true;
    for (int lane = 0; lane < warpSize && warp + lane < threads; ++lane)
      if (fiber.mask >> lane & 1)
        all &= fibers[warp + lane].waiting == Waiting::warp && fibers[warp + lane].mask == fiber.mask;
    if (!all) continue;
    const unsigned mask = fiber.mask;
    for (int lane = 0; lane < warpSize && warp + lane < threads; ++lane)
      if (mask >> lane & 1) fibers[warp + lane].waiting = Waiting::no;
    released = true;
  }
  return released;
}

inline std::string describe_stuck(const char* name) {
  int count[4] = {};
  for (const Fiber& fiber : fibers) ++count[static_cast<int>(fiber.waiting)];
  return std::string(name) + ": divergent barrier in block " + std::to_string(blockIdx.x) + ": of " +
         std::to_string(fibers.size()) + " threads " + std::to_string(count[1]) + " wait at __syncthreads, " +
         std::to_string(count[2]) + " at a warp barrier or shuffle, " + std::to_string(count[3]) +
         " have finished";
}

inline void run_block(const char* name) {
  for (Fiber& fiber : fibers) {
    fiber.waiting = Waiting::no;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  do {
    for (current = 0; current < static_cast<int>(fibers.size()); ++current) {
      if (fibers[current].waiting != Waiting::no) continue;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
      if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
    }
  } while (release());
  for (const Fiber& fiber : fibers)
    if (fiber.waiting != Waiting::done) throw std::runtime_error(describe_stuck(name));
}

inline void launch(const char* name, int64_t blocks, int threads, size_t shared_bytes,
                   const std::function<void()>& kernel) {
  body = &kernel;
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  fibers.resize(threads);
  for (Fiber& fiber : fibers)
    if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<char[]>(stack_bytes);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    dynamic_shared.assign(shared_bytes, 0xff);
    run_block(name);
  }
}

// The value that lane `source` of this warp offers.
template <class T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& fiber = fibers[current];
  const int lane = current % warpSize, warp = current - lane;
  if (!(mask >> lane & 1)) throw std::runtime_error("a thread calls a shuffle whose mask leaves it out");
  std::memcpy(&fiber.exchanged, &value, sizeof(T));
  wait(Waiting::warp, mask);
  if (source >= 0 && source < warpSize && warp + source < static_cast<int>(fibers.size()))
    std::memcpy(&value, &fibers[warp + source].exchanged, sizeof(T));
  wait(Waiting::warp, mask);  // nobody offers something new before all have read
  return value;
}

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::wait(cuda_emulation::Waiting::block); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_emulation::wait(cuda_emulation::Waiting::warp, mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_emulation::exchange(mask, value, source % warpSize);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_emulation::exchange(mask, value, (threadIdx.x % warpSize) ^ lanes);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  return cuda_emulation::exchange(mask, value, threadIdx.x % warpSize + lanes);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  return cuda_emulation::exchange(mask, value, int(threadIdx.x % warpSize) - int(lanes));
}
