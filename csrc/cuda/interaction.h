// The passes of the task interaction on a CUDA device, over the dense tensor D = seg [B, C, spatial]; N = positions.
// All pointers are device pointers; statistics, weights and vectors are float32, dense and row-major. A null pointer
// for an optional output or gradient means "not wanted" / "zero". Every call only enqueues work on `stream`.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace btinet {
namespace cuda {

enum class Type { kFloat32, kFloat16, kBFloat16 };

struct Tensor {
  View<void> view;
  Type type;
};

// ReLU(W D + w0), pooled over the positions: by their mean, or by a softmax of the logit v . ReLU(W D + w0).
struct Context {
  int64_t hidden;            // 0: no context
  const float* weight;       // W  [hidden, C]
  const float* bias;         // w0 [hidden]
  const float* pool_weight;  // v  [hidden]; null: mean
};

struct Statistics {
  float* mean;         // [B, C]
  float* variance;     // [B, C], population variance
  float* edges;        // [B], (sum of |forward differences| over all axes) / (C N)
  float* pooled;       // [B, hidden]
  float* log_sum_exp;  // [B], of the pooling logits
  uint8_t* active;     // [B, N, ceil(hidden / 8)], bit j % 8 of byte j / 8: W D + w0 > 0 (mean pooling)
};

struct StatisticsGradient {
  const float* mean;
  const float* variance;
  const float* edges;
  const float* pooled;
};

struct ContextGradient {
  float* weight;
  float* bias;
  float* pool_weight;
};

struct BackwardInputs {
  Tensor seg;
  Tensor grad;
  const float* scale;
  Context context;
  Statistics saved;  // `active` must be there for mean pooling
  StatisticsGradient gradient;
};

// Workspaces are the caller's; these are their sizes in floats.
int64_t statistics_workspace(const Shape& shape, int64_t hidden);
int64_t channel_dot_workspace(const Shape& shape);
int64_t statistics_backward_workspace(const Shape& shape, int64_t hidden, bool softmax);

// Pass 1: reads D once.
void statistics(const Tensor& seg, const Context& context, const Statistics& out, float* workspace, void* stream);
// Pass 2: out = D * scale[b, c].
void scale_channels(const Tensor& seg, const float* scale, const Tensor& out, void* stream);
// out = base + weight[b] (enhanced - base).
void interpolate(const Tensor& base, const Tensor& enhanced, const float* weight, const Tensor& out, void* stream);
// Backward pass A: out[b, c] = sum over positions of grad * D.
void channel_dot(const Tensor& grad, const Tensor& seg, float* out, float* workspace, void* stream);
// Backward pass B: out = grad * scale + the gradient that reaches D through its statistics.
void statistics_backward(const BackwardInputs& in, const Tensor& out, const ContextGradient& context_gradient,
                         float* workspace, void* stream);

}  // namespace cuda
}  // namespace btinet
