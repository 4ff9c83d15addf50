// Separable convolutions: t = P (a . u) + bias; u_i = depthwise convolutions of x of three taps along each axis,
// dilated and padded with zeros, of one scale or several; a: a share per sample and scale. Multi-scale context fusion
// goes on with y = F t + fusion_bias. Where positions are many, the product of F and P is cheaper than applying both:
// it is handed over as P, and F is null. S is what x [B, C, spatial] is stored as; everything else is of the type it is
// computed in.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

constexpr int kMostScales = 3;

template <class T>
struct ScaleWeights {
  int axes;  // 1, 2 or 3: 3^axes taps a scale
  int scales;
  int64_t dilations[kMostScales];   // in rising order
  const T* taps[kMostScales];       // [C, 3^axes] each
  const T* pointwise[kMostScales];  // P of each scale [middle, C], in rows `pointwise_stride` apart
  int64_t pointwise_stride;
  const T* share;        // [B, scales]; null: one
  const T* bias;         // [B, middle]; without shares [middle]
  const T* fusion;       // F [outputs, middle]; null: y = t
  const T* fusion_bias;  // [outputs]
  int64_t middle, outputs;

  int64_t reach() const { return dilations[scales - 1]; }
  const T* bias_of(int64_t sample) const { return share ? bias + sample * middle : bias; }
};

// What becomes of t before it is stored, where there is no fusion.
template <class T>
struct Finish {
  bool relu;
  const T *factor, *addend;  // [outputs], after the ReLU; null: none
  T *mean, *variance;        // [outputs], of what is stored, over all samples and positions; null: not wanted
};

// What the gradient passes before it reaches t: factor . grad + slope . value + addend, and 0 where value <= 0.
template <class S>
struct Arriving {
  View<const S> value;                       // what the forward stored; its data is null where neither is needed
  const Compute<S>*factor, *slope, *addend;  // [outputs]; null: the gradient as it is
  bool relu;
};

template <class T>
struct ScaleGradient {
  T* taps[kMostScales];
  T* pointwise[kMostScales];
  int64_t pointwise_stride;
  T* share;  // null: not wanted
  T* bias;
  T* fusion;
  T* fusion_bias;
};

#define BTINET_DECLARE_MULTI_SCALE                                                                                    \
  /* `between`: where t goes; its data is null where nobody wants it. */                                              \
  template <class S>                                                                                                  \
  void multi_scale(const View<const S>& x, const ScaleWeights<Compute<S>>& weights, const View<S>& out,               \
                   const View<S>& between, const Finish<Compute<S>>& finish, int threads);                            \
  /* `out`: gradient of x. `between`: t, needed with a fusion. The biases are not read. */                            \
  template <class S>                                                                                                  \
  void multi_scale_backward(const View<const S>& x, const View<const S>& grad, const View<const S>& between,          \
                            const Arriving<S>& arriving, const ScaleWeights<Compute<S>>& weights, const View<S>& out, \
                            const ScaleGradient<Compute<S>>& gradient, int threads);

BTINET_DECLARE_MULTI_SCALE

#define BTINET_INSTANTIATE_MULTI_SCALE(S)                                                                             \
  template void multi_scale<S>(const View<const S>&, const ScaleWeights<Compute<S>>&, const View<S>&, const View<S>&, \
                               const Finish<Compute<S>>&, int);                                                       \
  template void multi_scale_backward<S>(const View<const S>&, const View<const S>&, const View<const S>&,             \
                                        const Arriving<S>&, const ScaleWeights<Compute<S>>&, const View<S>&,          \
                                        const ScaleGradient<Compute<S>>&, int);

}  // namespace btinet
