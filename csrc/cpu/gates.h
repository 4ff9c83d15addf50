// Dual-path attention over x [B, C, spatial]: y = x * channel_gate[b, c] * spatial_gate[b, n], or ReLU(y + residual).
//   channel_gate = sigmoid(W2 ReLU(W1 mean_n(x) + b1) + b2)
//   spatial_gate = sigmoid(conv(max_c(x), mean_c(x)) + bias), a convolution of width 7 with zero padding
// The two ends of an attention gate, x [B, C, spatial], g [B, G, spatial], h [B, K, spatial]:
//   joint_projection: out [B, K, spatial] = ReLU(Wx x + Wg g + bias), Wx [K, C], Wg [K, G]
//   position_gate: out = x * gate[b, n], gate = sigmoid(w . h[b, :, n] + bias)
// S is what values are stored as: float, double or bfloat16; vectors and maps are of the type they are computed in and
// dense row-major. N = number of positions, h = width of the channel path.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

struct DualPathSizes {
  int64_t hidden;     // h
  int64_t kernel[2];  // the convolution's widths along z and y: 1 where the tensor has no such axis, else 7
};

// Weights, or, for T not const, their gradients.
template <class T>
struct DualPathWeights {
  T *hidden_weight, *hidden_bias;    // [h, C], [h]
  T *gate_weight, *gate_bias;        // [C, h], [C]
  T *spatial_weight, *spatial_bias;  // [2, kernel z, kernel y, 7], [1]
};

// What the forward pass leaves for the backward pass.
template <class T>
struct DualPathSaved {
  T* mean;          // [B, C], over the positions
  T* hidden;        // [B, h], after its ReLU
  T* channel_gate;  // [B, C]
  T* maps;          // [B, 2, N]: maximum and mean over the channels
  T* spatial_gate;  // [B, N]
};

template <class T>
struct JointWeights {
  T *x_weight, *g_weight, *bias;  // [K, C], [K, G], [K]
};

template <class T>
struct PositionWeights {
  T *weight, *bias;  // [K], [1]
};

// A view whose data is null stands for a tensor that is not there: without `residual` there is no ReLU either, and the
// backward pass takes no `out` and gives no `d_residual`.
#define BTINET_DECLARE_GATES                                                                                           \
  template <class S>                                                                                                   \
  void dual_path(const View<const S>& x, const View<const S>& residual, const DualPathSizes& sizes,                    \
                 const DualPathWeights<const Compute<S>>& weights, const DualPathSaved<Compute<S>>& saved,             \
                 const View<S>& out, int threads);                                                                     \
  template <class S>                                                                                                   \
  void dual_path_backward(const View<const S>& d_out, const View<const S>& x, const View<const S>& out,                \
                          const DualPathSizes& sizes, const DualPathWeights<const Compute<S>>& weights,                \
                          const DualPathSaved<const Compute<S>>& saved, const View<S>& d_x, const View<S>& d_residual, \
                          const DualPathWeights<Compute<S>>& d_weights, int threads);                                  \
  template <class S>                                                                                                   \
  void joint_projection(const View<const S>& x, const View<const S>& g, const JointWeights<const Compute<S>>& weights, \
                        const View<S>& out, int threads);                                                              \
  template <class S>                                                                                                   \
  void joint_projection_backward(const View<const S>& d_out, const View<const S>& out, const View<const S>& x,         \
                                 const View<const S>& g, const JointWeights<const Compute<S>>& weights,                \
                                 const View<S>& d_x, const View<S>& d_g, const JointWeights<Compute<S>>& d_weights,    \
                                 int threads);                                                                         \
  template <class S>                                                                                                   \
  void position_gate(const View<const S>& x, const View<const S>& h, const PositionWeights<const Compute<S>>& weights, \
                     Compute<S>* gate, const View<S>& out, int threads);                                               \
  template <class S>                                                                                                   \
  void position_gate_backward(const View<const S>& d_out, const View<const S>& x, const View<const S>& h,              \
                              const Compute<S>* gate, const PositionWeights<const Compute<S>>& weights,                \
                              const View<S>& d_x, const View<S>& d_h, const PositionWeights<Compute<S>>& d_weights,    \
                              int threads);

BTINET_DECLARE_GATES

#define BTINET_INSTANTIATE_GATES(S)                                                                                    \
  template void dual_path<S>(const View<const S>&, const View<const S>&, const DualPathSizes&,                         \
                             const DualPathWeights<const Compute<S>>&, const DualPathSaved<Compute<S>>&,               \
                             const View<S>&, int);                                                                     \
  template void dual_path_backward<S>(const View<const S>&, const View<const S>&, const View<const S>&,                \
                                      const DualPathSizes&, const DualPathWeights<const Compute<S>>&,                  \
                                      const DualPathSaved<const Compute<S>>&, const View<S>&, const View<S>&,          \
                                      const DualPathWeights<Compute<S>>&, int);                                        \
  template void joint_projection<S>(const View<const S>&, const View<const S>&, const JointWeights<const Compute<S>>&, \
                                    const View<S>&, int);                                                              \
  template void joint_projection_backward<S>(const View<const S>&, const View<const S>&, const View<const S>&,         \
                                             const View<const S>&, const JointWeights<const Compute<S>>&,              \
                                             const View<S>&, const View<S>&, const JointWeights<Compute<S>>&, int);    \
  template void position_gate<S>(const View<const S>&, const View<const S>&, const PositionWeights<const Compute<S>>&, \
                                 Compute<S>*, const View<S>&, int);                                                    \
  template void position_gate_backward<S>(const View<const S>&, const View<const S>&, const View<const S>&,            \
                                          const Compute<S>*, const PositionWeights<const Compute<S>>&, const View<S>&, \
                                          const View<S>&, const PositionWeights<Compute<S>>&, int);

}  // namespace btinet
