// Depthwise convolution of images: one kernel for each channel, padded with zeros, with strides and dilation; and its
// gradients. S is what x [B, C, H, W] is stored as; everything else is of the type it is computed in.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

// Along y and along x.
struct Geometry {
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];
};

#define BTINET_DECLARE_DEPTHWISE                                                                                   \
  /* `taps` [C, kernel y, kernel x]; `bias` [C] or null. */                                                        \
  template <class S>                                                                                               \
  void depthwise(const View<const S>& x, const Geometry& geometry, const Compute<S>* taps, const Compute<S>* bias, \
                 const View<S>& out, int threads);                                                                 \
  /* `out`: gradient of x. */                                                                                      \
  template <class S>                                                                                               \
  void depthwise_backward(const View<const S>& x, const View<const S>& grad, const Geometry& geometry,             \
                          const Compute<S>* taps, const View<S>& out, Compute<S>* d_taps, int threads);

BTINET_DECLARE_DEPTHWISE

#define BTINET_INSTANTIATE_DEPTHWISE(S)                                                                               \
  template void depthwise<S>(const View<const S>&, const Geometry&, const Compute<S>*, const Compute<S>*,             \
                             const View<S>&, int);                                                                    \
  template void depthwise_backward<S>(const View<const S>&, const View<const S>&, const Geometry&, const Compute<S>*, \
                                      const View<S>&, Compute<S>*, int);

}  // namespace btinet
