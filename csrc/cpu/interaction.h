// The passes of the task interaction over the dense tensor D = seg [B, C, spatial]; N = number of positions. S is what
// its values are stored as: float, double or bfloat16; vectors are of the type they are computed in.
// Vectors are dense row-major. A null pointer for an optional output or gradient means "not wanted" / "zero".
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

// ReLU(W D + w0), pooled over the positions: by their mean, or by a softmax of the logit v . ReLU(W D + w0).
template <class T>
struct Context {
  int64_t hidden;        // 0: no context
  const T* weight;       // W  [hidden, C]
  const T* bias;         // w0 [hidden]
  const T* pool_weight;  // v  [hidden]; null: mean
};

template <class T>
struct Statistics {
  T* mean;         // [B, C]
  T* variance;     // [B, C], population variance
  T* edges;        // [B], (sum of |forward differences| over all axes) / (C N)
  T* pooled;       // [B, hidden]
  T* log_sum_exp;  // [B], of the pooling logits
  std::conditional_t<std::is_const_v<T>, const uint8_t, uint8_t>* active;  // [B, N, ceil(hidden / 8)], ReLU bits
};

template <class T>
struct StatisticsGradient {
  const T* mean;
  const T* variance;
  const T* edges;
  const T* pooled;
};

template <class T>
struct ContextGradient {
  T* weight;
  T* bias;
  T* pool_weight;
};

#define BTINET_DECLARE_INTERACTION_PASSES                                                                          \
  /* Pass 1: reads D once. `active` is written with average pooling only. */                                       \
  template <class S>                                                                                               \
  void statistics(const View<const S>& seg, const Context<Compute<S>>& context, const Statistics<Compute<S>>& out, \
                  int threads);                                                                                    \
  /* Pass 2: out = D * scale[b, c]. */                                                                             \
  template <class S>                                                                                               \
  void scale_channels(const View<const S>& seg, const Compute<S>* scale, const View<S>& out, int threads);         \
  /* out = base + weight[b] (enhanced - base). */                                                                  \
  template <class S>                                                                                               \
  void interpolate(const View<const S>& base, const View<const S>& enhanced, const Compute<S>* weight,             \
                   const View<S>& out, int threads);                                                               \
  /* Backward pass A: out[b, c] = sum over positions of grad * D. */                                               \
  template <class S>                                                                                               \
  void channel_dot(const View<const S>& grad, const View<const S>& seg, Compute<S>* out, int threads);             \
  /* Backward pass B: out = grad * scale + the gradient that reaches D through its statistics. */                  \
  template <class S>                                                                                               \
  void statistics_backward(const View<const S>& seg, const View<const S>& grad, const Compute<S>* scale,           \
                           const Context<Compute<S>>& context, const Statistics<const Compute<S>>& saved,          \
                           const StatisticsGradient<Compute<S>>& gradient, const View<S>& out,                     \
                           const ContextGradient<Compute<S>>& context_gradient, int threads);

BTINET_DECLARE_INTERACTION_PASSES

#define BTINET_INSTANTIATE_INTERACTION_PASSES(S)                                                                     \
  template void statistics<S>(const View<const S>&, const Context<Compute<S>>&, const Statistics<Compute<S>>&, int); \
  template void scale_channels<S>(const View<const S>&, const Compute<S>*, const View<S>&, int);                     \
  template void interpolate<S>(const View<const S>&, const View<const S>&, const Compute<S>*, const View<S>&, int);  \
  template void channel_dot<S>(const View<const S>&, const View<const S>&, Compute<S>*, int);                        \
  template void statistics_backward<S>(const View<const S>&, const View<const S>&, const Compute<S>*,                \
                                       const Context<Compute<S>>&, const Statistics<const Compute<S>>&,              \
                                       const StatisticsGradient<Compute<S>>&, const View<S>&,                        \
                                       const ContextGradient<Compute<S>>&, int);

}  // namespace btinet
