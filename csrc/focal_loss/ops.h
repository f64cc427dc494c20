// The focal loss's operators on a Device that offers, besides map (common/elementwise.h),
//   Device::softmax_forward(SoftmaxRows<T>, loss, device_index)
//   Device::softmax_backward(SoftmaxRows<T>, grad, dx, device_index)
// where log_sum_exp in SoftmaxRows is written by the forward and read by the backward.
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
  const Compute* alpha;  // (classes,) or null
  Compute* log_sum_exp;
  Power<Compute> power;
  int64_t ignore_index, classes, inner, rows;

  NNFAST_INLINE bool is_class(int64_t target) const { return target >= 0 && target < classes; }

  // Element (row, class 0).
  NNFAST_INLINE int64_t first(int64_t row) const {
    return inner == 1 ? row * classes : row / inner * classes * inner + row % inner;
  }
};

template <class Device>
struct FocalLoss {
  using Alpha = std::optional<Tensor>;
  static constexpr const char *softmax_name = "softmax_focal_loss", *sigmoid_name = "sigmoid_focal_loss";

  static std::tuple<Tensor, Tensor> softmax(const Tensor& x, const Tensor& target, const Alpha& alpha,
                                            double gamma, int64_t ignore_index) {
    return dispatch(softmax_name, x, [&](auto element) {
      using T = decltype(element);
      const Arguments<T> arguments(x, target, alpha);
      const auto dtype = std::make_optional(arguments.dtype);
      Tensor loss = torch::stable::new_empty(x, target.sizes(), dtype);
      Tensor log_sum_exp = torch::stable::new_empty(x, target.sizes(), dtype);
      const auto rows = arguments.rows(log_sum_exp.mutable_data_ptr(), gamma, ignore_index);
      Device::softmax_forward(rows, arguments.data(loss), x.get_device_index());
      return std::make_tuple(loss, log_sum_exp);
    });
  }

  static Tensor softmax_backward(const Tensor& grad, const Tensor& x, const Tensor& target,
                                 const Alpha& alpha, const Tensor& log_sum_exp, double gamma,
                                 int64_t ignore_index) {
    return dispatch(softmax_name, x, [&](auto element) {
      using T = decltype(element);
      const Arguments<T> arguments(x, target, alpha);
      const Tensor upstream = arguments.one_a_row("grad", grad);
      const Tensor saved = arguments.one_a_row("log_sum_exp", log_sum_exp);
      Tensor dx = torch::stable::new_empty(x, x.sizes());
      // Only read: const_data_ptr, so that copy-on-write memory stays shared.
      const auto rows = arguments.rows(const_cast<void*>(saved.const_data_ptr()), gamma, ignore_index);
      Device::softmax_backward(rows, arguments.data(upstream), static_cast<T*>(dx.mutable_data_ptr()),
                               x.get_device_index());
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

 private:
  static void check_gamma(const char* name, double gamma) {
    check(gamma >= 0, name, ": gamma is ", gamma, "; it needs to be at least 0");
  }

  static Tensor contiguous(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    NoGrad no_grad;
    return torch::stable::contiguous(tensor);
  }

  // What both directions are given, checked and contiguous.
  template <class T>
  struct Arguments {
    using Compute = typename Scalar<T>::Compute;
    static constexpr ScalarType dtype =
        std::is_same_v<Compute, double> ? ScalarType::Double : ScalarType::Float;
    Tensor x, target;
    Alpha alpha;

    Arguments(const Tensor& given, const Tensor& classes, const Alpha& weights) : x(given), target(classes) {
      check(x.dim() == 3, softmax_name, ": x has ", x.dim(), " dimensions; it takes 3: (N, C, S)");
      check_tensor("target", target, ScalarType::Long, {x.size(0), x.size(2)});
      if (weights) {
        check_tensor("alpha", *weights, dtype, {x.size(1)});
        alpha = contiguous(*weights);
      }
      x = contiguous(x);
      target = contiguous(target);
    }

    SoftmaxRows<T> rows(void* log_sum_exp, double gamma, int64_t ignore_index) const {
      check_gamma(softmax_name, gamma);
      return {static_cast<const T*>(x.const_data_ptr()),
              static_cast<const int64_t*>(target.const_data_ptr()),
              alpha ? static_cast<const Compute*>(alpha->const_data_ptr()) : nullptr,
              static_cast<Compute*>(log_sum_exp),
              Power<Compute>(gamma),
              ignore_index,
              x.size(1),
              x.size(2),
              target.numel()};
    }

    Tensor one_a_row(const char* name, const Tensor& tensor) const {
      check_tensor(name, tensor, dtype, {x.size(0), x.size(2)});
      return contiguous(tensor);
    }

    static Compute* data(Tensor& out) { return static_cast<Compute*>(out.mutable_data_ptr()); }
    static const Compute* data(const Tensor& in) { return static_cast<const Compute*>(in.const_data_ptr()); }

   private:
    void check_tensor(const char* name, const Tensor& tensor, ScalarType expected,
                      std::initializer_list<int64_t> shape) const {
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
