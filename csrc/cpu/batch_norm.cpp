// Chooses the instruction set at run time.
#include "batch_norm.h"

#include "../common/instruction_set.h"

namespace btinet {

namespace avx512 {
BTINET_DECLARE_BATCH_NORM
}  // namespace avx512
namespace avx2 {
BTINET_DECLARE_BATCH_NORM
}  // namespace avx2
namespace portable {
BTINET_DECLARE_BATCH_NORM
}  // namespace portable

template <class S>
void batch_norm(const View<const S>& x, const NormWeights<Compute<S>>& weights, bool training,
                const Moments<Compute<S>>& moments, const View<S>& out, int threads) {
  BTINET_DISPATCH(batch_norm<S>(x, weights, training, moments, out, threads));
}

template <class S>
void batch_norm_backward(const View<const S>& x, const View<const S>& grad, const NormWeights<Compute<S>>& weights,
                         bool training, const Moments<const Compute<S>>& moments, const View<S>& out,
                         Compute<S>* d_weight, Compute<S>* d_bias, int threads) {
  BTINET_DISPATCH(batch_norm_backward<S>(x, grad, weights, training, moments, out, d_weight, d_bias, threads));
}

BTINET_INSTANTIATE_BATCH_NORM(float)
BTINET_INSTANTIATE_BATCH_NORM(double)
BTINET_INSTANTIATE_BATCH_NORM(bfloat16)

}  // namespace btinet
