// A transposed 3x3 convolution of stride 2 that doubles the size, aligned as TensorFlow's padding "same":
// out[2i + a, 2j + b] = bias + sum over dy, dx of weight[a + 2 dy, b + 2 dx] x[i - dy, j - dx]: 4, 2, 2 and 1 taps for
// (a, b) = (0, 0), (0, 1), (1, 0), (1, 1); x is zero outside.
// S is what x [B, C, height, width] and out [B, O, 2 height, 2 width] are stored as; weights are of the type they are
// computed in.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

constexpr int kUpsamplingTaps = 9;  // tap (ky, kx) is number 3 ky + kx

// weight[c, o, tap] lies at data[9 O c + o * output_stride + tap * tap_stride]; one of the strides is 1.
template <class T>
struct UpsamplingWeight {
  T* data;
  int64_t output_stride, tap_stride;
};

#define BTINET_DECLARE_UPSAMPLING                                                                    \
  template <class S>                                                                                 \
  void upsample_twice(const View<const S>& x, const UpsamplingWeight<const Compute<S>>& weight,      \
                      const Compute<S>* bias, const View<S>& out, int threads);                      \
  template <class S>                                                                                 \
  void upsample_twice_backward(const View<const S>& d_out, const View<const S>& x,                   \
                               const UpsamplingWeight<const Compute<S>>& weight, const View<S>& d_x, \
                               const UpsamplingWeight<Compute<S>>& d_weight, Compute<S>* d_bias, int threads);

BTINET_DECLARE_UPSAMPLING

#define BTINET_INSTANTIATE_UPSAMPLING(S)                                                                              \
  template void upsample_twice<S>(const View<const S>&, const UpsamplingWeight<const Compute<S>>&, const Compute<S>*, \
                                  const View<S>&, int);                                                               \
  template void upsample_twice_backward<S>(const View<const S>&, const View<const S>&,                                \
                                           const UpsamplingWeight<const Compute<S>>&, const View<S>&,                 \
                                           const UpsamplingWeight<Compute<S>>&, Compute<S>*, int);

}  // namespace btinet
