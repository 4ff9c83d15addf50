// What the segmentation loss of BTI-Net has to know of each image, and the gradient of the logits with respect to it.
// Logits and target [B, 1, y, x]; N positions; p = sigmoid(logits), kept between `floor` and 1 - `floor`.
//   r = curvature filter of (target - p), or of (target - (p > 0.5)), where the boundary is hard
//   s(map) = horizontal Sobel filter [1 2 1]^T [-1 0 1]
// Both filters see zeros outside. S is what logits are stored as; the target is of the type they are computed in, or
// of bytes.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/view.h"

namespace btinet {

// The curvature filter is symmetric in x and in y and changes its sign when they are exchanged: it has three weights,
// those of the offsets (x, y) = (1, 0), (2, 0), (2, 1).
struct MaskFilter {
  double curvature[3];
  double floor;
  bool hard_boundary;
  bool cross_entropy;  // whether it is wanted: else it is 0
};

// Of each image: the sums of target p, (1 - target) p and target (1 - p); the means of the target, of the binary cross
// entropy of the logits and of |r|; the variances of s(target) and s(p).
constexpr int kMaskStatistics = 8;

template <class T>
struct Target {
  View<const T> values;       // its data is null where the target is stored in bytes
  View<const uint8_t> bytes;  // zeros and ones
};

#define BTINET_DECLARE_SEGMENTATION_LOSS                                                                              \
  /* statistics [B, kMaskStatistics]; sobel_mean [B]: of s(p), for the backward pass. */                              \
  template <class S>                                                                                                  \
  void mask_statistics(const View<const S>& logits, const Target<Compute<S>>& target, const MaskFilter& filter,       \
                       double* statistics, double* sobel_mean, int threads);                                          \
  /* d_statistics [B, kMaskStatistics]: the gradient of what is computed from the statistics. */                      \
  template <class S>                                                                                                  \
  void mask_statistics_backward(const double* d_statistics, const View<const S>& logits,                              \
                                const Target<Compute<S>>& target, const MaskFilter& filter, const double* sobel_mean, \
                                const View<S>& d_logits, int threads);

BTINET_DECLARE_SEGMENTATION_LOSS

#define BTINET_INSTANTIATE_SEGMENTATION_LOSS(S)                                                                 \
  template void mask_statistics<S>(const View<const S>&, const Target<Compute<S>>&, const MaskFilter&, double*, \
                                   double*, int);                                                               \
  template void mask_statistics_backward<S>(const double*, const View<const S>&, const Target<Compute<S>>&,     \
                                            const MaskFilter&, const double*, const View<S>&, int);

}  // namespace btinet
