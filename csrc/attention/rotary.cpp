// Rotary embedding on the CPU (Su et al. 2021, arXiv:2104.09864): one read and one write.
#include <algorithm>

#include "attention/turn.h"
#include "common/tensor.h"

namespace nnfast::cpu {
namespace {

// A tensor (.., .., .., D), its first three dimensions in the order in which rows are gone through.
template <class T>
struct Rows {
  T* data;
  int64_t strides[3], element;

  NNFAST_INLINE T* at(const int64_t (&place)[3]) const {
    return data + place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2];
  }
};

// begin, end: rows
template <class T>
struct Rotary {
  using Compute = typename Scalar<T>::Compute;
  Rows<const T> x;
  Rows<const Compute> cos, sin;
  Rows<T> y;
  int64_t sizes[3];
  Turn<T> turn;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const Rotary self = *this;  // in registers, since what is stored may overlap *this
    int64_t place[] = {begin / (sizes[1] * sizes[2]), begin / sizes[2] % sizes[1], begin % sizes[2]};
    for (int64_t row = begin; row < end; ++row) {
      self.turn.template run<bytes>(self.x.at(place), self.x.element, self.cos.at(place), self.sin.at(place),
                                    self.y.at(place), self.y.element);
      for (int d = 2; ++place[d] == self.sizes[d] && d > 0; --d) place[d] = 0;
    }
  }
};

template <class T>
Rows<T> rows(T* data, const Tensor& x, const int (&order)[3]) {
  Rows<T> result{data, {}, x.stride(3)};
  for (int i = 0; i < 3; ++i) result.strides[i] = x.size(order[i]) == 1 ? 0 : x.stride(order[i]);
  return result;
}

Tensor rotary(const Tensor& x, const Tensor& of_cos, const Tensor& of_sin, bool interleaved) {
  check(x.dim() == 4, "rotary: x has shape ", describe(x.sizes()), "; it needs (N, H, L, D)");
  return dispatch("rotary", x, [&](auto element) {
    using T = decltype(element);
    using Compute = typename Scalar<T>::Compute;
    const Tensor cos = angles("rotary", "cos", x, of_cos, x.size(2));
    const Tensor sin = angles("rotary", "sin", x, of_sin, x.size(2));
    check(cos.size(3) == sin.size(3), "rotary: cos has ", cos.size(3), " angles, sin ", sin.size(3));
    Tensor y = new_like(x);
    if (!x.numel()) return y;
    T* const to = static_cast<T*>(y.mutable_data_ptr());
    expect_writes(to, y.numel() * sizeof(T));
    int order[] = {0, 1, 2};  // as they lie in memory
    std::stable_sort(order, order + 3, [&](int i, int j) { return y.stride(i) > y.stride(j); });
    const Rotary<T> loop{rows(static_cast<const T*>(x.const_data_ptr()), x, order),
                         rows(static_cast<const Compute*>(cos.const_data_ptr()), cos, order),
                         rows(static_cast<const Compute*>(sin.const_data_ptr()), sin, order),
                         rows(to, y, order),
                         {x.size(order[0]), x.size(order[1]), x.size(order[2])},
                         {x.size(3), cos.size(3), interleaved}};
    parallel(x.numel() / x.size(3), std::max<int64_t>(32768 / x.size(3), 1), loop);
    return y;
  });
}

}  // namespace
}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) { m.impl("rotary", TORCH_BOX(&nnfast::cpu::rotary)); }
