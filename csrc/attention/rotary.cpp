// Rotary embedding on the CPU (Su et al. 2021, arXiv:2104.09864): one read and one write.
#include <algorithm>

#include "common/lanes.h"
#include "common/tensor.h"

namespace nnfast::cpu {
namespace {

// As many elements as a vector of their arithmetic's type has lanes, in their order.
template <class T, int bytes>
struct InOrder {
  using V = typename VectorOf<typename Scalar<T>::Compute, bytes>::type;
  using Bits = typename Lanes<V>::Bits;
  using Narrow = typename VectorOf<uint16_t, bytes / 2>::type;

  static NNFAST_INLINE V from(const T* x) {
    if constexpr (std::is_same_v<T, BFloat16>)
      return host::bfloat16_to_float<V>(__builtin_convertvector(load<Narrow>(x), Bits));
    else
      return Pack<T, bytes>::load(x).part[0];
  }

  static NNFAST_INLINE void to(T* y, V value) {
    if constexpr (std::is_same_v<T, BFloat16>)
      store(y, __builtin_convertvector(host::round_to_bfloat16<Bits>(value) >> 16, Narrow));
    else
      Pack<T, bytes>{{value}}.template store<false>(y);
  }
};

// A tensor (.., .., .., D), its first three dimensions in the order in which rows are gone through.
template <class T>
struct Rows {
  T* data;
  int64_t strides[3], element;

  NNFAST_INLINE T* at(const int64_t (&place)[3]) const {
    return data + place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2];
  }
};

// Of every row the first 2 * half elements turn in pairs, and what is left is copied. begin, end: rows
template <class T>
struct Rotary {
  using Compute = typename Scalar<T>::Compute;
  Rows<const T> x;
  Rows<const Compute> cos, sin;
  Rows<T> y;
  int64_t sizes[3], head, half;
  bool interleaved;

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    const Rotary self = *this;  // in registers, since what is stored may overlap *this
    int64_t place[] = {begin / (sizes[1] * sizes[2]), begin / sizes[2] % sizes[1], begin % sizes[2]};
    for (int64_t row = begin; row < end; ++row) {
      self.template turn<bytes>(self.x.at(place), self.cos.at(place), self.sin.at(place), self.y.at(place));
      for (int d = 2; ++place[d] == self.sizes[d] && d > 0; --d) place[d] = 0;
    }
  }

 private:
  template <int bytes>
  NNFAST_INLINE void turn(const T* from, const Compute* c, const Compute* s, T* to) const {
    constexpr int lanes = bytes / sizeof(Compute);
    const bool dense = x.element == 1 && y.element == 1;
    int64_t i = 0;
    if (dense && cos.element == 1 && sin.element == 1)
      for (; i + lanes <= half; i += lanes)
        interleaved ? neighbours<bytes>(from + 2 * i, c + i, s + i, to + 2 * i)
                    : halves<bytes>(from + i, c + i, s + i, to + i);
    for (; i < half; ++i) {
      const int64_t first = interleaved ? 2 * i : i, second = interleaved ? first + 1 : i + half;
      const Compute a = Scalar<T>::load(from[first * x.element]),
                    b = Scalar<T>::load(from[second * x.element]);
      const Compute by_cos = c[i * cos.element], by_sin = s[i * sin.element];
      to[first * y.element] = Scalar<T>::store(a * by_cos - b * by_sin);
      to[second * y.element] = Scalar<T>::store(b * by_cos + a * by_sin);
    }
    if (dense)
      std::copy(from + 2 * half, from + head, to + 2 * half);
    else
      for (i = 2 * half; i < head; ++i) to[i * y.element] = from[i * x.element];
  }

  template <int bytes>
  NNFAST_INLINE void halves(const T* from, const Compute* c, const Compute* s, T* to) const {
    using Some = InOrder<T, bytes>;
    using V = typename Some::V;
    const V a = Some::from(from), b = Some::from(from + half), by_cos = load<V>(c), by_sin = load<V>(s);
    Some::to(to, a * by_cos - b * by_sin);
    Some::to(to + half, b * by_cos + a * by_sin);
  }

  template <int bytes>
  NNFAST_INLINE void neighbours(const T* from, const Compute* c, const Compute* s, T* to) const {
    using Some = InOrder<T, bytes>;
    using V = typename Some::V;
    using Bits = typename Some::Bits;
    constexpr int lanes = bytes / sizeof(Compute);
    const Bits lane = iota<Bits>(), of_second = (lane & 1) * lanes;
    const V low = Some::from(from), high = Some::from(from + lanes);
    const V a = __builtin_shuffle(low, high, lane * 2), b = __builtin_shuffle(low, high, lane * 2 + 1);
    const V by_cos = load<V>(c), by_sin = load<V>(s);
    const V first = a * by_cos - b * by_sin, second = b * by_cos + a * by_sin;
    Some::to(to, __builtin_shuffle(first, second, (lane >> 1) + of_second));
    Some::to(to + lanes, __builtin_shuffle(first, second, (lane >> 1) + lanes / 2 + of_second));
  }
};

template <class T>
Rows<T> rows(T* data, const Tensor& x, const int (&order)[3]) {
  Rows<T> result{data, {}, x.stride(3)};
  for (int i = 0; i < 3; ++i) result.strides[i] = x.size(order[i]) == 1 ? 0 : x.stride(order[i]);
  return result;
}

void check_angles(const char* name, const Tensor& angles, const Tensor& x, ScalarType dtype) {
  check(angles.scalar_type() == dtype, "rotary: ", name, " has dtype ", describe(angles.scalar_type()),
        "; it needs ", describe(dtype));
  bool fits = angles.dim() == 4 && 2 * angles.size(3) <= x.size(3);
  for (int i = 0; fits && i < 3; ++i) fits = angles.size(i) == 1 || angles.size(i) == x.size(i);
  check(fits, "rotary: ", name, " has shape ", describe(angles.sizes()), "; it does not fit x, ",
        describe(x.sizes()));
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  check(x.dim() == 4, "rotary: x has shape ", describe(x.sizes()), "; it needs (N, H, L, D)");
  return dispatch("rotary", x, [&](auto element) {
    using T = decltype(element);
    using Compute = typename Scalar<T>::Compute;
    const ScalarType dtype = sizeof(Compute) == 8 ? ScalarType::Double : ScalarType::Float;
    check_angles("cos", cos, x, dtype);
    check_angles("sin", sin, x, dtype);
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
                         x.size(3),
                         cos.size(3),
                         interleaved};
    parallel(x.numel() / x.size(3), std::max<int64_t>(32768 / x.size(3), 1), loop);
    return y;
  });
}

}  // namespace
}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) { m.impl("rotary", TORCH_BOX(&nnfast::cpu::rotary)); }
