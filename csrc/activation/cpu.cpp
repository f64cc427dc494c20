// Swish and Mish on the CPU.
#include "activation/math.h"
#include "common/elementwise.h"
#include "common/elementwise_cpu.h"

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  nnfast::Elementwise<nnfast::cpu::Device, nnfast::Silu>::add_to(m);
  nnfast::Elementwise<nnfast::cpu::Device, nnfast::Mish>::add_to(m);
}
