// The operators of fused batch norms on a Device that offers
//   Device::stats(x, layout, mean, var, device_index)
//   Device::update(running, value, offset, n, factor, momentum, device_index)
//   Device::forward(problem, y, mask, device_index)
//   Device::sums(problem, grad, mask, sums, dz, device_index)
//   Device::backward(problem, grad, mask, sums, residual_sums, count, dx, dresidual, device_index)
#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "conv_bn_act/math.h"

namespace nnfast {

// Memory as rows and columns: (images * pixels, channels) with channels last, else
// (images * channels, pixels).
struct Layout {
  int64_t images, channels, pixels;
  bool channels_last;

  NNFAST_INLINE int64_t rows() const { return images * (channels_last ? pixels : channels); }
  NNFAST_INLINE int64_t columns() const { return channels_last ? channels : pixels; }
  NNFAST_INLINE int64_t numel() const { return images * channels * pixels; }
  NNFAST_INLINE int64_t mask_bytes() const { return (columns() + 7) / 8; }  // of a row
};

// act(norm(x) + residual_norm(residual)); residual and its norm's mean may be null.
template <class T>
struct Problem {
  using Compute = typename Scalar<T>::Compute;
  Layout layout;
  const T *x, *residual;
  Norm<Compute> norm, residual_norm;
  AnyActivation<Compute> act;
};

template <class Device>
struct BatchNormAct {
  using Optional = std::optional<Tensor>;
  static constexpr const char *stats_name = "batch_norm_stats", *update_name = "batch_norm_update_",
                              *forward_name = "batch_norm_act", *sums_name = "batch_norm_act_sums",
                              *backward_name = "batch_norm_act_backward";

  static std::tuple<Tensor, Tensor> stats(const Tensor& x) {
    return dispatch(stats_name, x, [&](auto element) {
      using T = decltype(element);
      const Dense dense(stats_name, x);
      Tensor mean = channels<T>(x), var = channels<T>(x);
      Device::stats(dense.template data<T>(), dense.layout, mutable_data<Compute<T>>(mean),
                    mutable_data<Compute<T>>(var), x);
      return std::make_tuple(mean, var);
    });
  }

  static void update(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean,
                     const Tensor& var, const Optional& offset, double correction, double momentum) {
    const ScalarType dtype = mean.scalar_type();
    if (dtype != ScalarType::Float && dtype != ScalarType::Double)
      fail(update_name, ": mean has dtype ", describe(dtype), "; it takes Float or Double");
    if (mean.dim() != 1 || !mean.is_contiguous())
      fail(update_name, ": mean has shape ", describe(mean.sizes()), "; it needs to be (C,) and contiguous");
    check_channels(update_name, "var", var, mean, mean.size(0), dtype);
    if (offset) check_channels(update_name, "offset", *offset, mean, mean.size(0), dtype);
    check_channels(update_name, "running_mean", running_mean, mean, mean.size(0), running_mean.scalar_type());
    check_channels(update_name, "running_var", running_var, mean, mean.size(0), running_var.scalar_type());
    for (const Tensor* running : {&running_mean, &running_var}) {
      const ScalarType type = running->scalar_type();
      if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half &&
          type != ScalarType::Double)
        fail(update_name, ": running_mean and running_var take Float, Double, Half or BFloat16, got ",
             describe(type));
    }
    const auto update_one = [&](const Tensor& running, const Tensor& value, const Tensor* offset,
                                double factor) {
      dispatch(update_name, running, [&](auto element) {
        using T = decltype(element);
        const auto typed = [&](auto compute) {
          using C = decltype(compute);
          Device::update(mutable_data<T>(running), data<C>(value), offset ? data<C>(*offset) : nullptr,
                         mean.numel(), C(factor), C(momentum), mean.get_device_index());
        };
        if (dtype == ScalarType::Double) return typed(double{});
        typed(float{});
      });
    };
    update_one(running_mean, mean, offset ? &*offset : nullptr, 1);
    update_one(running_var, var, nullptr, correction);
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& mean, const Tensor& var,
                                            const Optional& weight, const Optional& bias, double eps,
                                            const Optional& residual, const Optional& residual_mean,
                                            const Optional& residual_var, const Optional& residual_weight,
                                            const Optional& residual_bias, double residual_eps, int64_t act,
                                            double slope, bool with_mask) {
    return dispatch(forward_name, x, [&](auto element) {
      using T = decltype(element);
      const Arguments<T> arguments(
          forward_name, x, {mean, var, weight, bias, eps}, residual,
          {residual_mean, residual_var, residual_weight, residual_bias, residual_eps}, act, slope);
      check(!with_mask || arguments.problem.act.has_gate(), forward_name,
            ": with_mask is for relu and leaky_relu, act is ", act);
      const Layout& layout = arguments.problem.layout;
      Tensor y = new_like(arguments.x.tensor);
      Tensor mask = with_mask ? empty(x, {layout.rows(), layout.mask_bytes()}, ScalarType::Byte)
                              : empty(x, {0}, ScalarType::Byte);
      if (layout.numel())
        Device::forward(arguments.problem, mutable_data<T>(y),
                        with_mask ? mutable_data<uint8_t>(mask) : nullptr, x.get_device_index());
      return std::make_tuple(y, mask);
    });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> sums(
      const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight,
      const Optional& bias, double eps, const Optional& residual, const Optional& residual_mean,
      const Optional& residual_var, const Optional& residual_weight, const Optional& residual_bias,
      double residual_eps, const Optional& mask, int64_t act, double slope, bool with_dz) {
    return dispatch(sums_name, x, [&](auto element) {
      using T = decltype(element);
      const Arguments<T> arguments(
          sums_name, x, {mean, var, weight, bias, eps}, residual,
          {residual_mean, residual_var, residual_weight, residual_bias, residual_eps}, act, slope);
      const Tensor upstream = arguments.x.like(sums_name, "grad", grad);
      const bool normed = arguments.problem.residual_norm.mean;
      Tensor sum_dz = channels<T>(x), sum_dz_xhat = channels<T>(x);
      Tensor sum_dz_residual_xhat = normed ? channels<T>(x) : empty(x, {0}, dtype_of<Compute<T>>);
      Tensor dz = with_dz ? new_like(arguments.x.tensor) : empty(x, {0}, x.scalar_type());
      Compute<T>* const out[] = {mutable_data<Compute<T>>(sum_dz), mutable_data<Compute<T>>(sum_dz_xhat),
                                 normed ? mutable_data<Compute<T>>(sum_dz_residual_xhat) : nullptr};
      Device::sums(arguments.problem, data<T>(upstream), arguments.bits(sums_name, mask), out,
                   with_dz ? mutable_data<T>(dz) : nullptr, x);
      return std::make_tuple(sum_dz, sum_dz_xhat, sum_dz_residual_xhat, dz);
    });
  }

  static std::tuple<Tensor, Tensor> backward(
      const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight,
      const Optional& bias, double eps, const Optional& residual, const Optional& residual_mean,
      const Optional& residual_var, const Optional& residual_weight, const Optional& residual_bias,
      double residual_eps, const Optional& mask, int64_t act, double slope, const Optional& sum_dz,
      const Optional& sum_dz_xhat, const Optional& sum_dz_residual_xhat, double count) {
    return dispatch(backward_name, x, [&](auto element) {
      using T = decltype(element);
      const Arguments<T> arguments(
          backward_name, x, {mean, var, weight, bias, eps}, residual,
          {residual_mean, residual_var, residual_weight, residual_bias, residual_eps}, act, slope);
      const Problem<T>& problem = arguments.problem;
      const Tensor upstream = arguments.x.like(backward_name, "grad", grad);
      const bool normed = problem.residual_norm.mean;
      check(sum_dz.has_value() == sum_dz_xhat.has_value() &&
                (!normed || sum_dz.has_value() == sum_dz_residual_xhat.has_value()),
            backward_name, ": it needs sum_dz, sum_dz_xhat and (with the residual's norm) ",
            "sum_dz_residual_xhat, or none of them");
      const auto sum = [&](const char* name, const Optional& tensor) {
        return tensor ? arguments.channel_data(backward_name, name, *tensor) : nullptr;
      };
      const Compute<T>* const sum_of_dz = sum("sum_dz", sum_dz);
      const Sums<Compute<T>> sums{sum_of_dz, sum("sum_dz_xhat", sum_dz_xhat)};
      const Sums<Compute<T>> residual_sums{
          sum_of_dz, normed ? sum("sum_dz_residual_xhat", sum_dz_residual_xhat) : nullptr};
      Tensor dx = new_like(arguments.x.tensor);
      Tensor dresidual = normed ? new_like(arguments.x.tensor) : empty(x, {0}, x.scalar_type());
      const uint8_t* const bits = arguments.bits(backward_name, mask);
      if (problem.layout.numel())
        Device::backward(problem, data<T>(upstream), bits, sums, residual_sums, Compute<T>(count),
                         mutable_data<T>(dx), normed ? mutable_data<T>(dresidual) : nullptr,
                         x.get_device_index());
      return std::make_tuple(dx, dresidual);
    });
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl(stats_name, TORCH_BOX(&stats));
    library.impl(update_name, TORCH_BOX(&update));
    library.impl(forward_name, TORCH_BOX(&forward));
    library.impl(sums_name, TORCH_BOX(&sums));
    library.impl(backward_name, TORCH_BOX(&backward));
  }

 private:
  template <class T>
  using Compute = typename Scalar<T>::Compute;

  template <class C>
  static constexpr ScalarType dtype_of = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;

  template <class T>
  static const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  template <class T>
  static T* mutable_data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  static Tensor empty(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(x, sizes, dtype);
  }

  template <class T>
  static Tensor channels(const Tensor& x) {
    return empty(x, {x.size(1)}, dtype_of<Compute<T>>);
  }

  static void check_channels(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                             int64_t channels, ScalarType dtype) {
    if (tensor.dim() != 1 || tensor.size(0) != channels)
      fail(op, ": ", name, " has shape ", describe(tensor.sizes()), "; it needs (", channels, ",)");
    if (tensor.scalar_type() != dtype)
      fail(op, ": ", name, " has dtype ", describe(tensor.scalar_type()), "; it needs ", describe(dtype));
    if (!tensor.is_contiguous()) fail(op, ": ", name, " is not contiguous; it needs to be");
    if (tensor.device() != x.device())
      fail(op, ": ", name, " and x are on different devices; they need to share one");
  }

  // x in one of the two layouts: itself, or a contiguous copy.
  struct Dense {
    Tensor tensor;
    Layout layout;

    Dense(const char* op, const Tensor& x) : tensor(x) {
      check(x.dim() >= 2, op, ": x has ", x.dim(), " dimensions; it needs at least 2: (N, C, ...)");
      layout = {x.size(0), x.size(1), 1, false};
      for (int64_t i = 2; i < x.dim(); ++i) layout.pixels *= x.size(i);
      if (!x.is_contiguous() && !is_channels_last(x)) {
        NoGrad no_grad;
        tensor = torch::stable::contiguous(x);
      }
      layout.channels_last = layout.pixels == 1 || !tensor.is_contiguous();
    }

    template <class T>
    const T* data() const {
      return BatchNormAct::data<T>(tensor);
    }

    // The tensor with x's layout.
    Tensor like(const char* op, const char* name, const Tensor& other) const {
      check_like(op, name, other, tensor);
      return same_layout(other, tensor) ? other : copied(new_like(tensor), other);
    }
  };

  struct NormArguments {
    const Optional mean, var, weight, bias;
    double eps;
  };

  // What all but the statistics are given, checked.
  template <class T>
  struct Arguments {
    Dense x;
    Tensor residual;  // holds what problem.residual points to
    Problem<T> problem;

    Arguments(const char* op, const Tensor& given, const NormArguments& norm, const Optional& other,
              const NormArguments& residual_norm, int64_t act, double slope)
        : x(op, given) {
      check(act >= 0 && act <= int64_t(Activation::mish), op, ": act is ", act, "; it needs to be 0 to 4");
      problem.layout = x.layout;
      problem.x = x.template data<T>();
      problem.residual = nullptr;
      problem.act = {Activation(act), Compute<T>(slope)};
      problem.norm = checked(op, norm, {"mean", "var", "weight", "bias"});
      problem.residual_norm =
          checked(op, residual_norm, {"residual_mean", "residual_var", "residual_weight", "residual_bias"});
      check(other || !residual_norm.mean, op, ": residual_mean needs a residual");
      if (!other) return;
      residual = x.like(op, "residual", *other);
      problem.residual = data<T>(residual);
    }

    const Compute<T>* channel_data(const char* op, const char* name, const Tensor& tensor) const {
      check_channels(op, name, tensor, x.tensor, x.layout.channels, dtype_of<Compute<T>>);
      return data<Compute<T>>(tensor);
    }

    const uint8_t* bits(const char* op, const Optional& mask) const {
      if (!mask) return nullptr;
      check(problem.act.has_gate(), op, ": mask is for relu and leaky_relu, act is ",
            int64_t(problem.act.which));
      if (mask->scalar_type() != ScalarType::Byte || mask->dim() != 2 || !mask->is_contiguous() ||
          mask->size(0) != x.layout.rows() || mask->size(1) != x.layout.mask_bytes())
        fail(op, ": mask has shape ", describe(mask->sizes()), " and dtype ", describe(mask->scalar_type()),
             "; it needs (", x.layout.rows(), ", ", x.layout.mask_bytes(), ") and Byte, contiguous");
      check(mask->device() == x.tensor.device(), op,
            ": mask and x are on different devices; they need to share one");
      return data<uint8_t>(*mask);
    }

   private:
    Norm<Compute<T>> checked(const char* op, const NormArguments& norm, const char* const (&names)[4]) const {
      if (!norm.mean) return {};
      check(norm.var.has_value(), op, ": ", names[0], " needs ", names[1]);
      const auto get = [&](const char* name, const Optional& tensor) {
        return tensor ? channel_data(op, name, *tensor) : nullptr;
      };
      return {get(names[0], norm.mean), get(names[1], norm.var), get(names[2], norm.weight),
              get(names[3], norm.bias), Compute<T>(norm.eps)};
    }
  };
};

}  // namespace nnfast
