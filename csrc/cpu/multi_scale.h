// Multi-scale context fusion: y = M (a . u) + bias, u_i = depthwise convolutions of x of three taps along each axis,
// dilated by 1, 2 and 4 and padded with zeros; a: a share per sample and scale; M: the product of the fusion's and the
// pointwise weights. S is what x [B, C, spatial] is stored as; everything else is of the type it is computed in.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

constexpr int kScales = 3;
constexpr int64_t kDilations[kScales] = {1, 2, 4};

template <class T>
struct ScaleWeights {
  int axes;                // 1, 2 or 3: 3^axes taps a scale
  const T* taps[kScales];  // [C, 3^axes] each
  const T* share;          // [B, 3]
  const T* merged;         // [outputs, 3, C]
  const T* bias;           // [B, outputs]
  int64_t outputs;
};

template <class T>
struct ScaleGradient {
  T* taps[kScales];
  T* share;
  T* merged;
  T* bias;
};

#define BTINET_DECLARE_MULTI_SCALE                                                                                    \
  template <class S>                                                                                                  \
  void multi_scale(const View<const S>& x, const ScaleWeights<Compute<S>>& weights, const View<S>& out, int threads); \
  /* `out`: gradient of x. */                                                                                         \
  template <class S>                                                                                                  \
  void multi_scale_backward(const View<const S>& x, const View<const S>& grad,                                        \
                            const ScaleWeights<Compute<S>>& weights, const View<S>& out,                              \
                            const ScaleGradient<Compute<S>>& gradient, int threads);

BTINET_DECLARE_MULTI_SCALE

#define BTINET_INSTANTIATE_MULTI_SCALE(S)                                                                            \
  template void multi_scale<S>(const View<const S>&, const ScaleWeights<Compute<S>>&, const View<S>&, int);          \
  template void multi_scale_backward<S>(const View<const S>&, const View<const S>&, const ScaleWeights<Compute<S>>&, \
                                        const View<S>&, const ScaleGradient<Compute<S>>&, int);

}  // namespace btinet
