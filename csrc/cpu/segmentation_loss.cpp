// Chooses the instruction set at run time.
#include "segmentation_loss.h"

#include "../common/instruction_set.h"

namespace btinet {

namespace avx512 {
BTINET_DECLARE_SEGMENTATION_LOSS
}  // namespace avx512
namespace avx2 {
BTINET_DECLARE_SEGMENTATION_LOSS
}  // namespace avx2
namespace portable {
BTINET_DECLARE_SEGMENTATION_LOSS
}  // namespace portable

template <class S>
void mask_statistics(const View<const S>& logits, const Target<Compute<S>>& target, const MaskFilter& filter,
                     double* statistics, double* sobel_mean, int threads) {
  BTINET_DISPATCH(mask_statistics<S>(logits, target, filter, statistics, sobel_mean, threads));
}

template <class S>
void mask_statistics_backward(const double* d_statistics, const View<const S>& logits, const Target<Compute<S>>& target,
                              const MaskFilter& filter, const double* sobel_mean, const View<S>& d_logits,
                              int threads) {
  BTINET_DISPATCH(mask_statistics_backward<S>(d_statistics, logits, target, filter, sobel_mean, d_logits, threads));
}

BTINET_INSTANTIATE_SEGMENTATION_LOSS(float)
BTINET_INSTANTIATE_SEGMENTATION_LOSS(double)
BTINET_INSTANTIATE_SEGMENTATION_LOSS(bfloat16)

}  // namespace btinet
