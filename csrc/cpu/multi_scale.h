// Multi-scale context fusion: t = P (a . u) + bias, y = F t + fusion_bias; u_i = depthwise convolutions of x of three
// taps along each axis, dilated by 1, 2 and 4 and padded with zeros; a: a share per sample and scale. Where positions
// are many, the product of F and P is cheaper than applying both: it is handed over as P, and F is null.
// S is what x [B, C, spatial] is stored as; everything else is of the type it is computed in.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

constexpr int kScales = 3;
constexpr int64_t kDilations[kScales] = {1, 2, 4};

template <class T>
struct ScaleWeights {
  int axes;                     // 1, 2 or 3: 3^axes taps a scale
  const T* taps[kScales];       // [C, 3^axes] each
  const T* pointwise[kScales];  // P of each scale [middle, C], in rows `pointwise_stride` apart
  int64_t pointwise_stride;
  const T* share;        // [B, 3]
  const T* bias;         // [B, middle]
  const T* fusion;       // F [outputs, middle]; null: y = t
  const T* fusion_bias;  // [outputs]
  int64_t middle, outputs;
};

template <class T>
struct ScaleGradient {
  T* taps[kScales];
  T* pointwise[kScales];
  int64_t pointwise_stride;
  T* share;
  T* bias;
  T* fusion;
  T* fusion_bias;
};

#define BTINET_DECLARE_MULTI_SCALE                                                                           \
  /* `between`: where t goes; its data is null where nobody wants it. */                                     \
  template <class S>                                                                                         \
  void multi_scale(const View<const S>& x, const ScaleWeights<Compute<S>>& weights, const View<S>& out,      \
                   const View<S>& between, int threads);                                                     \
  /* `out`: gradient of x. `between`: t, needed with a fusion. The biases are not read. */                   \
  template <class S>                                                                                         \
  void multi_scale_backward(const View<const S>& x, const View<const S>& grad, const View<const S>& between, \
                            const ScaleWeights<Compute<S>>& weights, const View<S>& out,                     \
                            const ScaleGradient<Compute<S>>& gradient, int threads);

BTINET_DECLARE_MULTI_SCALE

#define BTINET_INSTANTIATE_MULTI_SCALE(S)                                                                             \
  template void multi_scale<S>(const View<const S>&, const ScaleWeights<Compute<S>>&, const View<S>&, const View<S>&, \
                               int);                                                                                  \
  template void multi_scale_backward<S>(const View<const S>&, const View<const S>&, const View<const S>&,             \
                                        const ScaleWeights<Compute<S>>&, const View<S>&,                              \
                                        const ScaleGradient<Compute<S>>&, int);

}  // namespace btinet
