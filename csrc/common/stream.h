// The current CUDA stream, from torch's CUDA library as it is loaded. Its function can't be linked to: a CPU
// build of torch has no such library, and Python loads that of a CUDA build for torch alone.
#pragma once

#include <dlfcn.h>

#include <cstdint>

#include "common/check.h"

namespace nnfast::cuda {

inline void* current_stream(int32_t device_index) {
  using Function = int32_t (*)(int32_t, void**);
  constexpr const char *library = "libtorch_cuda.so", *name = "aoti_torch_get_current_cuda_stream";
  static const auto function = [] {
    void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(dlsym(loaded ? loaded : RTLD_DEFAULT, name));
  }();
  check(function, name, " is not in ", library,
        "; torch is without CUDA, or its libraries are named otherwise");
  void* stream = nullptr;
  check(function(device_index, &stream) == 0, name, " failed for device ", device_index);
  return stream;
}

}  // namespace nnfast::cuda
