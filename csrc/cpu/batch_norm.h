// Batch normalisation and the activation after it in two passes each way: out = act((x - mean) invstd weight + bias).
// The normalised tensor is not kept; the backward recomputes it from x.
// S is what x [B, C, spatial] is stored as; everything else is of the type it is computed in.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

enum class Activation : int { identity, relu, silu };

template <class T>
struct NormWeights {
  const T* weight;  // [C]; null: 1
  const T* bias;    // [C]; null: 0
  double eps;
  Activation act;
};

// Of each channel, over the batch and all positions.
template <class T>
struct Moments {
  T* mean;
  T* variance;  // without correction
};

#define BTINET_DECLARE_BATCH_NORM                                                                                     \
  /* `moments` are those of x, found here, where `training`, else given. */                                           \
  template <class S>                                                                                                  \
  void batch_norm(const View<const S>& x, const NormWeights<Compute<S>>& weights, bool training,                      \
                  const Moments<Compute<S>>& moments, const View<S>& out, int threads);                               \
  /* `out`: gradient of x, through the moments too where `training`. */                                               \
  template <class S>                                                                                                  \
  void batch_norm_backward(const View<const S>& x, const View<const S>& grad, const NormWeights<Compute<S>>& weights, \
                           bool training, const Moments<const Compute<S>>& moments, const View<S>& out,               \
                           Compute<S>* d_weight, Compute<S>* d_bias, int threads);

BTINET_DECLARE_BATCH_NORM

#define BTINET_INSTANTIATE_BATCH_NORM(S)                                                                              \
  template void batch_norm<S>(const View<const S>&, const NormWeights<Compute<S>>&, bool, const Moments<Compute<S>>&, \
                              const View<S>&, int);                                                                   \
  template void batch_norm_backward<S>(const View<const S>&, const View<const S>&, const NormWeights<Compute<S>>&,    \
                                       bool, const Moments<const Compute<S>>&, const View<S>&, Compute<S>*,           \
                                       Compute<S>*, int);

}  // namespace btinet
