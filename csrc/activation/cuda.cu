// Swish and Mish on CUDA.
#include "activation/math.h"
#include "common/elementwise.h"
#include "common/elementwise_cuda.h"

NNFAST_CUDA_LIBRARY(m) {
  nnfast::Elementwise<nnfast::cuda::Device, nnfast::Silu>::add_to(m);
  nnfast::Elementwise<nnfast::cuda::Device, nnfast::Mish>::add_to(m);
}
