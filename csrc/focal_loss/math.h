// The focal loss, Lin et al. 2017, eq. 4 and 5: alpha_t (1 - p_t)^gamma (-log p_t), over the softmax and over
// the sigmoid, with their gradients. q is 1 - p_t, never computed as that difference. T is the type of the
// arithmetic, a scalar or (on the CPU) a vector of Compute.
#pragma once

#include "common/elementary.h"
#include "common/macros.h"

namespace nnfast {

// q^gamma for gamma >= 0: the whole part by multiplication, the rest through exp and log. 0^0 = 1.
template <class Compute>
struct Power {
  Compute gamma, fraction;
  int whole;

  explicit Power(double exponent) : gamma(Compute(exponent)), whole(exponent < 64 ? int(exponent) : 0) {
    fraction = Compute(exponent - whole);
  }

  template <class Math, class T>
  NNFAST_INLINE T of(T q) const {
    if (whole == 2 && fraction == 0) return q * q;
    T result = T{} + 1, square = q;
    for (int n = whole; n > 0; n >>= 1) {
      if (n & 1) result = result * square;
      square = square * square;
    }
    if (fraction != 0) result = result * Math::exp(fraction * Math::log(q));
    return result;
  }
};

// A softmax row seen from its target t. Of any shift: `distance` = x_t - shift, `others` = the sum of
// exp(x_j - shift) over j != t.
template <class T>
struct TargetClass {
  T sum, inverse, p, q, cross_entropy;  // sum: over all j; inverse: 1 / sum

  NNFAST_INLINE TargetClass(T distance, T others) {
    const T mine = Precise::exp(distance);
    sum = others + mine;
    inverse = 1 / sum;
    p = mine * inverse;
    q = others / sum;  // its error is the loss's, gamma times
    // -log p_t = log(1 + others / mine) keeps its digits where it is small; `mine` may be 0 elsewhere.
    cross_entropy = Precise::log_of_sum(mine, others) - (mine > others ? T{} : distance);
  }

  // k in dloss/dx_j = k (p_j - delta_jt). Towards q = 0 the ratio of cross entropy and q goes to 1, and
  // towards p_t = 0 the product of p_t and cross entropy to 0.
  template <class Compute>
  NNFAST_INLINE T slope(const Power<Compute>& power, T alpha, T q_to_gamma) const {
    if (power.gamma == 0) return alpha;
    if (power.gamma == 2) return alpha * q * (q + 2 * (p == Compute(0) ? T{} : p * cross_entropy));
    const T ratio = q == Compute(0) ? T{} + 1 : cross_entropy / q;
    return alpha * q_to_gamma * (1 + power.gamma * (p == Compute(0) ? T{} : p * ratio));
  }
};

// Maximum and sum of exp(x_j - maximum) over a row, as its parts come in. The lowest finite number to start
// from keeps -inf - -inf out.
template <class T>
struct RunningSum {
  using Element = typename Lanes<T>::Element;
  T maximum = T{} + std::numeric_limits<Element>::lowest(), sum = {};

  template <class Math>
  NNFAST_INLINE void raise(T to) {
    const T raised = max(to, maximum);
    sum = sum * Math::exp(maximum - raised);
    maximum = raised;
  }
};

// torchvision.ops.sigmoid_focal_loss: soft targets t, and p_t = p t + (1 - p) (1 - t).
template <class Compute>
struct SigmoidFocalLoss {
  Power<Compute> power;
  Compute positive, negative;  // what multiplies t and 1 - t

  SigmoidFocalLoss(double alpha, double gamma)
      : power(gamma),
        positive(Compute(alpha < 0 ? 1 : alpha)),
        negative(Compute(alpha < 0 ? 1 : 1 - alpha)) {}

  template <class Math, class T>
  NNFAST_INLINE T forward(T x, T t) const {
    const Terms<T> terms = get<Math>(x, t);
    return (positive * t + negative * (1 - t)) * power.template of<Math>(terms.q) * terms.cross_entropy;
  }

  template <class Math, class T>
  NNFAST_INLINE T backward(T grad, T x, T t) const {
    const Terms<T> terms = get<Math>(x, t);
    T slope = terms.false_positive - terms.false_negative;
    if (power.gamma != 0) {
      // q' / q = p (1 - p) (1 - 2t) / q; where q = 0, so is the smaller of p and 1 - p.
      const T ratio = terms.q == Compute(0) ? terms.large : Math::divide(terms.large * terms.small, terms.q);
      slope = slope + power.gamma * ratio * (1 - 2 * t) * terms.cross_entropy;
    }
    return grad * (positive * t + negative * (1 - t)) * power.template of<Math>(terms.q) * slope;
  }

 private:
  template <class T>
  struct Terms {
    T large, small;                    // sigmoid of |x| and of -|x|
    T false_positive, false_negative;  // p (1 - t) and (1 - p) t
    T q, cross_entropy;
  };

  template <class Math, class T>
  static NNFAST_INLINE Terms<T> get(T x, T t) {
    const T e = Math::template exp<true>(x < Compute(0) ? x : -x);
    const T large = Math::divide(T{} + 1, 1 + e), small = e * large;
    const T false_positive = (x < Compute(0) ? small : large) * (1 - t);
    const T false_negative = (x < Compute(0) ? large : small) * t;
    const T cross_entropy = (1 - t) * x - (min(x, T{}) - Math::log1p_unit(e));
    return {large, small, false_positive, false_negative, false_positive + false_negative, cross_entropy};
  }
};

}  // namespace nnfast
