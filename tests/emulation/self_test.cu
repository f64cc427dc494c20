// What the emulation itself must do: a block reduction through shuffles, a barrier and shared memory is
// right, and a barrier that some threads of the block do not reach is an error.
#include "common/cuda.h"
#include "common/tensor.h"

namespace {

using nnfast::Tensor;

// total[block] = sum of the block's x.
__global__ void block_sum(const double* x, double* total, bool dynamic) {
  __shared__ double fixed[32];
  double* const partial = dynamic ? nnfast::cuda::dynamic_shared<double>() : fixed;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  double sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  sum = lane < warps ? partial[lane] : 0.0;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
  sum = __shfl_sync(~0u, sum, 0);
  if (threadIdx.x == 0) total[blockIdx.x] = sum;
}

__global__ void divergent_barrier(bool leave) {
  if (threadIdx.x % 2 == 0) return __syncthreads();
  if (!leave) __syncwarp();
}

// x: (blocks, threads) -> (blocks, 1)
Tensor sum_blocks(const Tensor& x, bool dynamic) {
  Tensor view = x;
  const Tensor total = torch::stable::clone(torch::stable::narrow(view, 1, 0, 1));
  const int threads = static_cast<int>(x.size(1));
  nnfast::cuda::launch("block_sum", block_sum, x.size(0), threads, 32 * sizeof(double), 0,
                       static_cast<const double*>(x.const_data_ptr()),
                       static_cast<double*>(total.mutable_data_ptr()), dynamic);
  return total;
}

void diverge(const Tensor&, bool leave) {
  nnfast::cuda::launch("divergent_barrier", divergent_barrier, 1, 64, 0, 0, leave);
}

}  // namespace

NNFAST_CUDA_LIBRARY(m) {
  m.impl("sum_blocks", TORCH_BOX(&sum_blocks));
  m.impl("diverge", TORCH_BOX(&diverge));
}
