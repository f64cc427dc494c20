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

}  // namespace nnfast
