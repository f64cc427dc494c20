// The focal loss's operators on a Device that offers, besides map (common/elementwise.h),
//   Device::softmax_forward(SoftmaxRows<T>, SoftmaxLoss, device_index)
//   Device::softmax_backward(SoftmaxRows<T>, Upstream, dx, device_index)
// where slopes in SoftmaxRows are written by the forward and read by the backward.
#pragma once

#include <optional>
#include <tuple>

#include "common/elementwise.h"
#include "focal_loss/math.h"

namespace nnfast {

// x: (rows / inner, classes, inner), the rest one value a row, all contiguous.
template <class T>
struct SoftmaxRows {
  using Compute = typename Scalar<T>::Compute;
  const T* x;
  const int64_t* target;
  Compute* slopes;  // (3, rows): shift, scale, at_target
  int64_t ignore_index, classes, inner, rows;

  // For an upstream gradient of one, that of x_j is exp(x_j - shift) * scale, and at_target at the target.
  // Neither comes from a log-sum-exp: that is rounded, and p with it by as much as it is large.
  NNFAST_INLINE Compute* shift() const { return slopes; }
  NNFAST_INLINE Compute* scale() const { return slopes + rows; }
  NNFAST_INLINE Compute* at_target() const { return slopes + 2 * rows; }

  NNFAST_INLINE bool is_class(int64_t target) const { return target >= 0 && target < classes; }

  // Element (row, class 0).
  NNFAST_INLINE int64_t first(int64_t row) const {
    return inner == 1 ? row * classes : row / inner * classes * inner + row % inner;
  }
};

// What the forward computes for each row.
template <class Compute>
struct SoftmaxLoss {
  Compute* loss;
  const Compute* alpha;  // (classes,) or null
  Power<Compute> power;
};

// A gradient for each row; step 0 is the same one for all, as a sum's or a mean's.
template <class Compute>
struct Upstream {
  const Compute* grad;
  int64_t step;

  NNFAST_INLINE Compute of(int64_t row) const { return grad[row * step]; }
};

template <class Device>
struct FocalLoss {
  using Alpha = std::optional<Tensor>;
  static constexpr const char *softmax_name = "softmax_focal_loss", *sigmoid_name = "sigmoid_focal_loss";

  static std::tuple<Tensor, Tensor> softmax(const Tensor& x, const Tensor& target, const Alpha& alpha,
                                            double gamma, int64_t ignore_index) {
    return dispatch(softmax_name, x, [&](auto element) {
      using T = decltype(element);
      const Arguments<T> arguments(x, target);
      using Compute = typename Scalar<T>::Compute;
      const Alpha weights = arguments.per_class("alpha", alpha);
      check_gamma(softmax_name, gamma);
      const auto dtype = std::make_optional(arguments.dtype);
      Tensor loss = torch::stable::new_empty(x, target.sizes(), dtype);
      Tensor slopes = arguments.new_slopes();
      const SoftmaxLoss<Compute> to{static_cast<Compute*>(loss.mutable_data_ptr()),
                                    Arguments<T>::values(weights), Power<Compute>(gamma)};
      Device::softmax_forward(arguments.rows(slopes.mutable_data_ptr(), ignore_index), to,
                              x.get_device_index());
      return std::make_tuple(loss, slopes);
    });
  }

  static Tensor softmax_backward(const Tensor& grad, const Tensor& x, const Tensor& target,
                                 const Tensor& slopes, int64_t ignore_index) {
    return dispatch(softmax_name, x, [&](auto element) {
      using T = decltype(element);
      using Compute = typename Scalar<T>::Compute;
      const Arguments<T> arguments(x, target);
      arguments.check_rows("grad", grad);
      arguments.check_slopes(slopes);
      const bool one_for_all =
          (grad.size(0) == 1 || grad.stride(0) == 0) && (grad.size(1) == 1 || grad.stride(1) == 0);
      const Tensor upstream = one_for_all ? grad : contiguous(grad), saved = contiguous(slopes);
      Tensor dx = torch::stable::new_empty(x, x.sizes());
      // Only read: const_data_ptr, so that copy-on-write memory stays shared.
      const auto rows = arguments.rows(const_cast<void*>(saved.const_data_ptr()), ignore_index);
      Device::softmax_backward(
          rows,
          Upstream<Compute>{static_cast<const Compute*>(upstream.const_data_ptr()), one_for_all ? 0 : 1},
          static_cast<T*>(dx.mutable_data_ptr()), x.get_device_index());
      return dx;
    });
  }

  static Tensor sigmoid(const Tensor& x, const Tensor& target, double alpha, double gamma) {
    check_gamma(sigmoid_name, gamma);
    check_like(sigmoid_name, "target", target, x);
    return dispatch(sigmoid_name, x, [&](auto element) {
      using T = decltype(element);
      using Fn = SigmoidFocalLoss<typename Scalar<T>::Compute>;
      return map<Device, T>(sigmoid_name, Forward<Fn>{Fn(alpha, gamma)}, x, {&x, &target});
    });
  }

  static Tensor sigmoid_backward(const Tensor& grad, const Tensor& x, const Tensor& target, double alpha,
                                 double gamma) {
    check_gamma(sigmoid_name, gamma);
    check_like(sigmoid_name, "target", target, x);
    check_like(sigmoid_name, "grad", grad, x);
    return dispatch(sigmoid_name, x, [&](auto element) {
      using T = decltype(element);
      using Fn = SigmoidFocalLoss<typename Scalar<T>::Compute>;
      return map_backward<Device, T>(sigmoid_name, Fn(alpha, gamma), grad, x, {&x, &target});
    });
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl("softmax_focal_loss", TORCH_BOX(&softmax));
    library.impl("softmax_focal_loss_backward", TORCH_BOX(&softmax_backward));
    library.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid));
    library.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_backward));
  }

 protected:
  static void check_gamma(const char* name, double gamma) {
    check(gamma >= 0, name, ": gamma is ", gamma, "; it needs to be at least 0");
  }

  static Tensor contiguous(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    NoGrad no_grad;
    return torch::stable::contiguous(tensor);
  }

  // What both directions are given, checked and contiguous. With `flat`, also (N, C) and targets (N,).
  template <class T>
  struct Arguments {
    using Compute = typename Scalar<T>::Compute;
    static constexpr ScalarType dtype =
        std::is_same_v<Compute, double> ? ScalarType::Double : ScalarType::Float;
    Tensor x, target;

    Arguments(const Tensor& given, const Tensor& classes, bool flat = false) : x(given), target(classes) {
      if (!(flat && x.dim() == 2))
        check(x.dim() == 3, softmax_name, ": x has ", x.dim(), " dimensions; it takes 3: (N, C, S)");
      check_rows("target", target, ScalarType::Long);
      x = contiguous(x);
      target = contiguous(target);
    }

    int64_t inner() const { return x.dim() == 2 ? 1 : x.size(2); }

    Tensor new_slopes() const {
      constexpr bool wide = sizeof(Compute) == 8;
      return x.dim() == 2 ? new_floats(x, {3, x.size(0)}, wide)
                          : new_floats(x, {3, x.size(0), x.size(2)}, wide);
    }

    void check_slopes(const Tensor& slopes) const {
      if (x.dim() == 2)
        check_tensor("slopes", slopes, {3, x.size(0)});
      else
        check_tensor("slopes", slopes, {3, x.size(0), x.size(2)});
    }

    // A value for each row.
    void check_rows(const char* name, const Tensor& tensor, ScalarType expected = dtype) const {
      if (x.dim() == 2)
        check_tensor(name, tensor, {x.size(0)}, expected);
      else
        check_tensor(name, tensor, {x.size(0), x.size(2)}, expected);
    }

    SoftmaxRows<T> rows(void* slopes, int64_t ignore_index) const {
      return {static_cast<const T*>(x.const_data_ptr()),
              static_cast<const int64_t*>(target.const_data_ptr()),
              static_cast<Compute*>(slopes),
              ignore_index,
              x.size(1),
              inner(),
              target.numel()};
    }

    // A value for each class, or none.
    Alpha per_class(const char* name, const Alpha& given) const {
      if (!given) return given;
      check_tensor(name, *given, {x.size(1)});
      return contiguous(*given);
    }

    static const Compute* values(const Alpha& given) {
      return given ? static_cast<const Compute*>(given->const_data_ptr()) : nullptr;
    }

    void check_tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                      ScalarType expected = dtype) const {
      const auto sizes = tensor.sizes();
      if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()))
        fail(softmax_name, ": ", name, " has shape ", describe(sizes), "; x with ", describe(x.sizes()),
             " needs ", describe(torch::headeronly::IntHeaderOnlyArrayRef(shape)));
      if (tensor.scalar_type() != expected)
        fail(softmax_name, ": ", name, " has dtype ", describe(tensor.scalar_type()), "; it takes ",
             describe(expected));
      if (tensor.device() != x.device())
        fail(softmax_name, ": ", name, " and x are on different devices; they need to share one");
    }
  };
};

}  // namespace nnfast
