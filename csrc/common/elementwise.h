// Elementwise ops on a Device that offers
//   Device::map(name, fn, in, out, n, device_index)
// out[i] = fn.apply<Math>(in[0][i], in[1][i], ...) for n elements of dense memory, where out may be one of
// the inputs. And the ops NAME, NAME_ and NAME_backward of a scalar function Fn (see activation/math.h).
#pragma once

#include <algorithm>
#include <string>

#include "common/tensor.h"

namespace nnfast {

// f's forward and backward as something that Device::map applies.
template <class F>
struct Forward {
  F f;

  template <class Math, class... T>
  NNFAST_INLINE auto apply(T... inputs) const {
    return f.template forward<Math>(inputs...);
  }
};

template <class F>
struct Backward {
  F f;

  template <class Math, class... T>
  NNFAST_INLINE auto apply(T... inputs) const {
    return f.template backward<Math>(inputs...);
  }
};

// The same where the gradient from above is one value for all elements; `prepared` reads it, where the loop
// runs.
template <class F, class T>
struct BackwardOfOne {
  F f;
  const T* from;
  typename Scalar<T>::Compute grad = 0;

  NNFAST_INLINE BackwardOfOne prepared() const { return {f, from, Scalar<T>::load(*from)}; }

  template <class Math, class First, class... Rest>
  NNFAST_INLINE auto apply(First x, Rest... rest) const {
    return f.template backward<Math>(First{} + grad, x, rest...);
  }
};

// What a loop applies: `fn`, after it has read what it needs from the loop's side.
template <class Fn>
NNFAST_INLINE Fn prepared(const Fn& fn) {
  if constexpr (requires { fn.prepared(); })
    return fn.prepared();
  else
    return fn;
}

// Every element is one and the same, as in what expand makes of a scalar.
inline bool is_one_value(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1 && strides[i] != 0) return false;
  return x.numel() > 1;
}

// fn(inputs...) as a new tensor like x. All have one shape and the dtype that T stands for.
template <class Device, class T, class Fn, size_t inputs>
Tensor map(const char* name, const Fn& fn, const Tensor& x, const Tensor* const (&from)[inputs]) {
  const Tensor out = new_like(x);
  Tensor copies[inputs];
  bool out_is_free = true;  // to hold the first input that needs another layout
  const T* in[inputs];
  for (size_t i = 0; i < inputs; ++i) {
    const bool fits = same_layout(*from[i], out);
    copies[i] = fits ? *from[i] : copied(out_is_free ? out : new_like(out), *from[i]);
    out_is_free &= fits;
    in[i] = static_cast<const T*>(copies[i].const_data_ptr());
  }
  Device::map(name, fn, in, static_cast<T*>(out.mutable_data_ptr()), x.numel(), x.get_device_index());
  return out;
}

// f's backward from grad and what else it takes, x first.
template <class Device, class T, class F, size_t inputs>
Tensor map_backward(const char* name, const F& f, const Tensor& grad, const Tensor& x,
                    const Tensor* const (&from)[inputs]) {
  if (is_one_value(grad))
    return map<Device, T>(name, BackwardOfOne<F, T>{f, static_cast<const T*>(grad.const_data_ptr())}, x,
                          from);
  const Tensor* all[inputs + 1] = {&grad};
  std::copy_n(from, inputs, all + 1);
  return map<Device, T>(name, Backward<F>{f}, x, all);
}

template <class Device, class Fn>
struct Elementwise {
  static Tensor forward(const Tensor& x) {
    return dispatch(Fn::name, x, [&](auto element) {
      return map<Device, decltype(element)>(Fn::name, Forward<Fn>{}, x, {&x});
    });
  }

  static void forward_(const Tensor& x) {
    dispatch(Fn::name, x, [&](auto element) {
      if (is_dense(x)) return in_place(x, element);
      const Tensor y = copied(new_like(x), x);
      in_place(y, element);
      copied(x, y);
    });
  }

  static Tensor backward(const Tensor& grad, const Tensor& x) {
    check_like(Fn::name, "grad", grad, x);
    return dispatch(Fn::name, x, [&](auto element) {
      return map_backward<Device, decltype(element)>(Fn::name, Fn{}, grad, x, {&x});
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
  static void in_place(const Tensor& x, T) {
    T* const out = static_cast<T*>(x.mutable_data_ptr());
    const T* const in[] = {out};
    Device::map(Fn::name, Forward<Fn>{}, in, out, x.numel(), x.get_device_index());
  }
};

}  // namespace nnfast
