// Swish (SiLU) x / (1 + e^-x), Elfwing et al. 2017 / Ramachandran et al. 2017, and Mish x tanh(log(1 + e^x)),
// Misra 2019, with their gradients. `Math` supplies exp and divide; T is the type of the arithmetic,
// a scalar or (on the CPU) a vector.
#pragma once

#include "common/elementary.h"
#include "common/macros.h"

namespace nnfast {

struct Silu {
  static constexpr const char* name = "silu";

  template <class Math, class T>
  static NNFAST_INLINE T forward(T x) {
    return Math::divide(x, 1 + Math::exp(-x));
  }

  template <class Math, class T>
  static NNFAST_INLINE T backward(T grad, T x) {
    const T sigmoid = Math::divide(T{} + 1, 1 + Math::exp(-x));
    return grad * sigmoid * (1 + x * (1 - sigmoid));
  }
};

// With n = e^x and w = n (n + 2): tanh(log(1 + n)) = w / (w + 2). At x = 20 that is 1 in every type, so e^x
// stops there and w cannot overflow. The order of min's arguments keeps NaN.
struct Mish {
  static constexpr const char* name = "mish";

  template <class Math, class T>
  static NNFAST_INLINE T forward(T x) {
    const T n = Math::exp(min(T{} + 20, x));
    const T w = n * (n + 2);
    return x * Math::divide(w, w + 2);
  }

  template <class Math, class T>
  static NNFAST_INLINE T backward(T grad, T x) {
    const T clamped = min(T{} + 20, x);
    const T n = Math::exp(clamped);
    const T w = n * (n + 2);
    const T r = Math::divide(T{} + 1, w + 2);
    return grad * (r * (w + 0 * x + 4 * (clamped * n) * (n + 1) * r));  // 0 x: NaN at infinity, as in torch
  }
};

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

}  // namespace nnfast
