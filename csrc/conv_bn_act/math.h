// act(batch norm(x) [+ residual | + batch norm(residual)]), Ioffe and Szegedy 2015, and its gradients, for
// one element. T is the type of the arithmetic, a scalar or (on the CPU) a vector of Compute.
#pragma once

#include <cmath>

#include "activation/math.h"

namespace nnfast {

// A batch norm over `channels` channels: all (C,), weight and bias may be null; so is mean where there is
// none.
template <class Compute>
struct Norm {
  const Compute *mean, *var, *weight, *bias;
  Compute eps;

  // The host has time to round once, as torch does there; a kernel's every thread would pay for it.
#if defined(__CUDA_ARCH__)
  using Exact = Compute;
  NNFAST_INLINE Exact inv_std(int64_t c) const { return 1 / ::sqrt(var[c] + eps); }
#else
  using Exact = double;
  NNFAST_INLINE Exact inv_std(int64_t c) const { return 1 / std::sqrt(Exact(var[c]) + eps); }
#endif
  NNFAST_INLINE Exact scale(int64_t c) const { return weight ? inv_std(c) * weight[c] : inv_std(c); }
  NNFAST_INLINE Compute shift(int64_t c) const { return bias ? bias[c] : Compute(0); }
};

// The sums that the gradient of a norm needs; null where its statistics are frozen.
template <class Compute>
struct Sums {
  const Compute *dz, *dz_xhat;
};

// What a channel's elements share. `centered` = x - mean keeps its digits where the mean is large.
template <class Compute>
struct Affine {
  Compute mean, scale, shift;

  NNFAST_INLINE Affine(Compute mean, Compute scale, Compute shift) : mean(mean), scale(scale), shift(shift) {}
  NNFAST_INLINE Affine(const Norm<Compute>& norm, int64_t c)
      : mean(norm.mean[c]), scale(Compute(norm.scale(c))), shift(norm.shift(c)) {}
};

// dx = scale * dz + slope * (x - mean) + offset
template <class Compute>
struct Gradient {
  Compute slope = 0, offset = 0;

  Gradient() = default;
  NNFAST_INLINE Gradient(const Norm<Compute>& norm, const Sums<Compute>& sums, Compute count, int64_t c) {
    if (!sums.dz) return;
    const auto inv_std = norm.inv_std(c), factor = -norm.scale(c) / count;
    slope = Compute(factor * inv_std * sums.dz_xhat[c]);
    offset = Compute(factor * sums.dz[c]);
  }
};

// The same where x is centred. Where statistics are given x has no part in it, be it infinite.
template <class V>
NNFAST_INLINE V input_gradient(V scale, V dz, V slope, V centred, V offset) {
  return scale * dz + ((slope == 0 ? V{} : slope * centred) + offset);
}

}  // namespace nnfast
