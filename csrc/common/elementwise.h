// The ops NAME, NAME_ and NAME_backward of a scalar function Fn (see activation/math.h) on a Device that
// offers
//   Device::forward<Fn>(const T* x, T* y, n, device_index)
//   Device::backward<Fn>(const T* grad, const T* x, T* dx, n, device_index)
// over n elements of dense memory, where an output may be the same memory as an input.
#pragma once

#include <string>

#include "common/tensor.h"

namespace nnfast {

template <class Device, class Fn>
struct Elementwise {
  static Tensor forward(const Tensor& x) {
    return dispatch(Fn::name, x, [&](auto element) {
      Tensor y = new_like(x);
      run(same_layout(x, y) ? x : copied(y, x), y, element);
      return y;
    });
  }

  static void forward_(const Tensor& x) {
    dispatch(Fn::name, x, [&](auto element) {
      if (is_dense(x)) return run(x, x, element);
      const Tensor y = copied(new_like(x), x);
      run(y, y, element);
      copied(x, y);
    });
  }

  static Tensor backward(const Tensor& grad, const Tensor& x) {
    check_like(Fn::name, "grad", grad, x);
    return dispatch(Fn::name, x, [&](auto element) {
      using T = decltype(element);
      Tensor dx = new_like(x);
      const bool x_fits = same_layout(x, dx);
      const Tensor input = x_fits ? x : copied(dx, x);
      const Tensor upstream = same_layout(grad, dx) ? grad : copied(x_fits ? dx : new_like(dx), grad);
      Device::template backward<Fn>(static_cast<const T*>(upstream.const_data_ptr()),
                                    static_cast<const T*>(input.const_data_ptr()),
                                    static_cast<T*>(dx.mutable_data_ptr()), x.numel(), x.get_device_index());
      return dx;
    });
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    const std::string name = Fn::name;
    library.impl(name.c_str(), TORCH_BOX(&forward));
    library.impl((name + "_").c_str(), TORCH_BOX(&forward_));
    library.impl((name + "_backward").c_str(), TORCH_BOX(&backward));
  }

 private:
  template <class T>
  static void run(const Tensor& x, const Tensor& y, T) {
    T* const out = static_cast<T*>(y.mutable_data_ptr());  // first: it may move copy-on-write memory
    Device::template forward<Fn>(static_cast<const T*>(x.const_data_ptr()), out, x.numel(),
                                 x.get_device_index());
  }
};

}  // namespace nnfast
