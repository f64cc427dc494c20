// What every op does with tensors before its loop starts: dtype dispatch, output layout, comparisons.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>

#include "common/check.h"
#include "common/scalar.h"

namespace nnfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline std::string describe(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

// Returns body(T{}) for the element type T that stands for x's dtype.
template <class Body>
auto dispatch(const char* op, const Tensor& x, const Body& body) {
  switch (const ScalarType dtype = x.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::Double:
      return body(double{});
    default:
      fail(op, ": x has dtype ", describe(dtype), "; it takes Float, Double, Half or BFloat16");
  }
}

// Autograd must not record what a kernel does inside.
class NoGrad {
 public:
  NoGrad() : enabled_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(enabled_); }
  NoGrad(const NoGrad&) = delete;

 private:
  bool enabled_;
};

inline Tensor copied(Tensor to, const Tensor& from) {
  NoGrad no_grad;
  torch::stable::copy_(to, from);
  return to;
}

// x fills one stretch of memory, without gaps or overlaps, in some order of its dimensions.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t filled = 1;
  for (bool grew = true; grew;) {
    grew = false;
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] > 1 && strides[i] == filled) {
        filled *= sizes[i];
        grew = true;
      }
  }
  return filled == x.numel();
}

// x of (N, C, ...) is stored without gaps in the order (N, ..., C).
inline bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  const auto next = [&](int64_t i) {
    const bool fits = sizes[i] == 1 || strides[i] == expected;
    expected *= sizes[i];
    return fits;
  };
  bool fits = next(1);
  for (int64_t i = x.dim() - 1; i >= 2; --i) fits &= next(i);
  return fits && next(0);
}

// A new tensor of x's dtype on x's device.
inline Tensor new_strided(const Tensor& x, const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
  int32_t dtype, device_type;
  AtenTensorHandle y;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, device_type, x.get_device_index(), &y));
  return Tensor(y);
}

// torch.empty_like(x). It keeps the strides of dense x, so that the dispatcher is not needed there.
inline Tensor new_like(const Tensor& x) {
  if (!is_dense(x)) return torch::stable::empty_like(x);
  int32_t dtype, device_type;
  AtenTensorHandle y;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype,
                                                         device_type, x.get_device_index(), &y));
  return Tensor(y);
}

// A contiguous float32 or float64 tensor on x's device, without the dispatcher's search by name.
inline Tensor new_floats(const Tensor& x, std::initializer_list<int64_t> sizes, bool wide) {
  int64_t strides[4], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
  int32_t device_type;
  AtenTensorHandle y;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      device_type, x.get_device_index(), &y));
  return Tensor(y);
}

// Element i of a's memory and element i of b's are the same element, for a and b of the same shape.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1 && a_strides[i] != b_strides[i]) return false;
  return true;
}

inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  const auto sizes = tensor.sizes(), expected = x.sizes();
  if (sizes.size() != expected.size() || !std::equal(sizes.begin(), sizes.end(), expected.begin()))
    fail(op, ": ", name, " has shape ", describe(sizes), "; x has ", describe(expected),
         ", and both must be equal");
  if (tensor.scalar_type() != x.scalar_type())
    fail(op, ": ", name, " has dtype ", describe(tensor.scalar_type()), "; x has ", describe(x.scalar_type()),
         ", and both must be equal");
  if (tensor.device() != x.device())
    fail(op, ": ", name, " and x are on different devices; they need to share one");
}

}  // namespace nnfast
