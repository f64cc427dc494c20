// act(batch norm(x) [+ residual | + batch norm(residual)]), Ioffe and Szegedy 2015, and its gradients, for
// one element. T is the type of the arithmetic, a scalar or (on the CPU) a vector of Compute.
#pragma once

#include <cmath>

#include "activation/math.h"

namespace nnfast {

enum class Activation : int64_t { identity, relu, leaky_relu, silu, mish };

// Picked at run time: a branch that all elements share costs less than a loop for each activation would.
template <class Compute>
struct AnyActivation {
  Activation which;
  Compute slope;

  template <class Math, class T>
  NNFAST_INLINE T forward(T z) const {
    switch (which) {
      case Activation::relu:
        return max(T{}, z);  // NaN passes
      case Activation::leaky_relu:
        return z > T{} ? z : z * slope;
      case Activation::silu:
        return Silu::forward<Math>(z);
      case Activation::mish:
        return Mish::forward<Math>(z);
      default:
        return z;
    }
  }

  template <class Math, class T>
  NNFAST_INLINE T backward(T grad, T z) const {
    switch (which) {
      case Activation::relu:
        return z <= T{} ? T{} : grad;
      case Activation::leaky_relu:
        return z > T{} ? grad : grad * slope;
      case Activation::silu:
        return Silu::backward<Math>(grad, z);
      case Activation::mish:
        return Mish::backward<Math>(grad, z);
      default:
        return grad;
    }
  }

  // Relu and leaky relu need one bit of z. As in torch the former is open at NaN.
  NNFAST_INLINE bool has_gate() const { return which == Activation::relu || which == Activation::leaky_relu; }

  template <class T>
  NNFAST_INLINE auto is_open(T z) const {
    return (z > T{}) | ((z != z) & -int(which == Activation::relu));
  }

  template <class T, class Open>
  NNFAST_INLINE T gated(T grad, Open open) const {
    if (which == Activation::relu) return open != 0 ? grad : T{};
    return open != 0 ? grad : grad * slope;
  }
};

// A batch norm over `channels` channels: all (C,), weight and bias may be null; so is mean where there is
// none.
template <class Compute>
struct Norm {
  const Compute *mean, *var, *weight, *bias;
  Compute eps;

  NNFAST_INLINE Compute inv_std(int64_t c) const {
#if defined(__CUDA_ARCH__)
    return 1 / ::sqrt(var[c] + eps);
#else
    return 1 / std::sqrt(var[c] + eps);
#endif
  }
  NNFAST_INLINE Compute scale(int64_t c) const { return weight ? inv_std(c) * weight[c] : inv_std(c); }
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
      : mean(norm.mean[c]), scale(norm.scale(c)), shift(norm.shift(c)) {}
};

// dx = scale * dz + slope * (x - mean) + offset
template <class Compute>
struct Gradient {
  Compute slope = 0, offset = 0;

  Gradient() = default;
  NNFAST_INLINE Gradient(const Norm<Compute>& norm, const Sums<Compute>& sums, Compute count, int64_t c) {
    if (!sums.dz) return;
    const Compute inv_std = norm.inv_std(c), factor = -norm.scale(c) / count;
    slope = factor * inv_std * sums.dz_xhat[c];
    offset = factor * sums.dz[c];
  }
};

}  // namespace nnfast
