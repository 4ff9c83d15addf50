// The vector mathematics of one interaction level (TIM, and its gate UPA) and its gradient; the equations are those of
// btinet_kernels/interaction/reference.py. B samples, C seg channels, K clf features, h context width.
#pragma once

#include <cstdint>

namespace btinet {

enum class Signals { none, proxies, variance };

struct LevelOptions {
  int64_t batch, channels, features, hidden;
  int64_t projection;   // width of the alignment's projections
  int64_t gate_hidden;  // width of the gate's network
  Signals signals;
  double strength;
  bool training;  // BatchNorm by the batch's statistics
  double eps;
};

// Weights, or, for T not const, their gradients (without those of the running statistics).
template <class T>
struct LevelWeights {
  T *dense_weight, *dense_bias;  // [K, h], [K]
  T *norm_weight, *norm_bias;    // [K]
  T *running_mean, *running_var;
  T *clf_gate_weight, *clf_gate_bias;      // [K, K], [K]
  T *seg_gate_weight, *seg_gate_bias;      // [C, C], [C]
  T *clf_to_seg_weight, *clf_to_seg_bias;  // [C, K], [C]
  T *seg_projection, *clf_projection;      // [P, C], [P, K]
  T *hidden_weight, *hidden_bias;          // [H, signals], [H]
  T *output_weight, *output_bias;          // [2, H], [2]
};

template <class T>
struct LevelInputs {
  const T *mean, *variance;  // [B, C]
  const T* edges;            // [B]
  const T* pooled;           // [B, h]
  const T* clf;              // [B, K]
};

template <class T>
struct LevelResult {
  T* scale;                   // [B, C]
  T* clf;                     // [B, K]
  T* gates;                   // [B, 2]
  T* proxies;                 // [B, 3] or [B, 2]
  T *batch_mean, *batch_var;  // [K]; null in inference
};

template <class T>
struct LevelUpstream {
  const T *scale, *clf, *gates, *proxies;  // as in LevelResult
};

template <class T>
struct LevelGradient {
  T *mean, *variance, *edges, *pooled, *clf;  // as in LevelInputs; null: not wanted
};

#define BTINET_DECLARE_LEVEL                                                                                       \
  template <class T>                                                                                               \
  void level_vectors(const LevelOptions& options, const LevelInputs<T>& in, const LevelWeights<const T>& weights,  \
                     const LevelResult<T>& out, int threads);                                                      \
  template <class T>                                                                                               \
  void level_backward(const LevelOptions& options, const LevelInputs<T>& in, const LevelWeights<const T>& weights, \
                      const LevelUpstream<T>& upstream, const LevelGradient<T>& gradient,                          \
                      const LevelWeights<T>& weight_gradient, int threads);

BTINET_DECLARE_LEVEL

#define BTINET_INSTANTIATE_LEVEL(T)                                                                         \
  template void level_vectors<T>(const LevelOptions&, const LevelInputs<T>&, const LevelWeights<const T>&,  \
                                 const LevelResult<T>&, int);                                               \
  template void level_backward<T>(const LevelOptions&, const LevelInputs<T>&, const LevelWeights<const T>&, \
                                  const LevelUpstream<T>&, const LevelGradient<T>&, const LevelWeights<T>&, int);

}  // namespace btinet
