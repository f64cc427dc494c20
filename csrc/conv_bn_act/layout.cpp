// Images from contiguous into channels last on the CPU, and back: what blocks that run inside in the other
// order begin and end with.
#include "common/lanes.h"
#include "common/tensor.h"

namespace nnfast::cpu {
namespace {

// For every image (channels, pixels) into (pixels, channels), or back; an item is as many channels of an
// image as a vector has lanes.
struct Relayout {
  const float* from;
  float* to;
  int64_t channels, pixels;
  bool last;  // into channels last

  template <int bytes>
  static constexpr int lanes = bytes / sizeof(float);

  template <int bytes>
  NNFAST_INLINE void run(int64_t begin, int64_t end) const {
    using V = typename VectorOf<float, bytes>::type;
    constexpr int n = lanes<bytes>;
    const int64_t blocks = (channels + n - 1) / n;
    const int64_t from_row = last ? pixels : channels, to_row = last ? channels : pixels;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / blocks * channels * pixels, channel = item % blocks * n;
      const float* const x = from + image + channel * (last ? pixels : 1);
      float* const y = to + image + channel * (last ? 1 : pixels);
      const int64_t width = std::min<int64_t>(n, channels - channel);
      int64_t p = 0;
      for (; width == n && p + n <= pixels; p += n) {
        V square[n];
        for (int i = 0; i < n; ++i) square[i] = load<V>(x + i * from_row + p * (last ? 1 : from_row));
        transpose<n / 2>(square);
        for (int i = 0; i < n; ++i) store(y + i * to_row + p * (last ? to_row : 1), square[i]);
      }
      for (; p < pixels; ++p)
        for (int64_t c = 0; c < width; ++c)
          y[last ? p * channels + c : c * pixels + p] = x[last ? c * pixels + p : p * channels + c];
    }
  }
};

Tensor image_layout(const Tensor& x, bool channels_last) {
  const bool fits = x.dim() == 4 && (channels_last ? x.is_contiguous() : is_channels_last(x));
  if (!fits || x.scalar_type() != ScalarType::Float)
    fail("image_layout: x has dtype ", describe(x.scalar_type()), " and shape ", describe(x.sizes()),
         "; it takes Float of (N, C, H, W), ", channels_last ? "contiguous" : "channels last");
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const int64_t strides[] = {channels * pixels, channels_last ? 1 : pixels,
                             x.size(3) * (channels_last ? channels : 1), channels_last ? channels : 1};
  Tensor y = new_strided(x, {images, channels, x.size(2), x.size(3)}, strides);
  if (!y.numel()) return y;
  constexpr int narrowest = Relayout::lanes<16>;
  const int lanes = isa() == Isa::avx512 ? 16 : isa() == Isa::avx2 ? 8 : narrowest;
  parallel(images * ((channels + lanes - 1) / lanes), 1,
           Relayout{static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()),
                    channels, pixels, channels_last});
  return y;
}

}  // namespace
}  // namespace nnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(nnfast, CPU, m) { m.impl("image_layout", TORCH_BOX(&nnfast::cpu::image_layout)); }
