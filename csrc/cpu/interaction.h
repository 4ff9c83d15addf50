// The passes of the task interaction over the dense tensor D = seg [B, C, spatial]; N = number of positions.
// Vectors are dense row-major. A null pointer for an optional output or gradient means "not wanted" / "zero".
#pragma once

#include <cstdint>

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

#define BTINET_DECLARE_INTERACTION_PASSES                                                                         \
  /* Pass 1: reads D once. */                                                                                     \
  template <class T>                                                                                              \
  void statistics(const View<const T>& seg, const Context<T>& context, const Statistics<T>& out, int threads);    \
  /* Pass 2: out = D * scale[b, c]. */                                                                            \
  template <class T>                                                                                              \
  void scale_channels(const View<const T>& seg, const T* scale, const View<T>& out, int threads);                 \
  /* out = base + weight[b] (enhanced - base). */                                                                 \
  template <class T>                                                                                              \
  void interpolate(const View<const T>& base, const View<const T>& enhanced, const T* weight, const View<T>& out, \
                   int threads);                                                                                  \
  /* Backward pass A: out[b, c] = sum over positions of grad * D. */                                              \
  template <class T>                                                                                              \
  void channel_dot(const View<const T>& grad, const View<const T>& seg, T* out, int threads);                     \
  /* Backward pass B: out = grad * scale + the gradient that reaches D through its statistics. */                 \
  template <class T>                                                                                              \
  void statistics_backward(const View<const T>& seg, const View<const T>& grad, const T* scale,                   \
                           const Context<T>& context, const Statistics<const T>& saved,                           \
                           const StatisticsGradient<T>& gradient, const View<T>& out,                             \
                           const ContextGradient<T>& context_gradient, int threads);

BTINET_DECLARE_INTERACTION_PASSES

#define BTINET_INSTANTIATE_INTERACTION_PASSES(T)                                                                 \
  template void statistics<T>(const View<const T>&, const Context<T>&, const Statistics<T>&, int);               \
  template void scale_channels<T>(const View<const T>&, const T*, const View<T>&, int);                          \
  template void interpolate<T>(const View<const T>&, const View<const T>&, const T*, const View<T>&, int);       \
  template void channel_dot<T>(const View<const T>&, const View<const T>&, T*, int);                             \
  template void statistics_backward<T>(const View<const T>&, const View<const T>&, const T*, const Context<T>&,  \
                                       const Statistics<const T>&, const StatisticsGradient<T>&, const View<T>&, \
                                       const ContextGradient<T>&, int);

// The instruction set that serves this machine: "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace btinet
