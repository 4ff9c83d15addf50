// Chooses the instruction set at run time.
#include "multi_scale.h"

#include "../common/instruction_set.h"

namespace btinet {

namespace avx512 {
BTINET_DECLARE_MULTI_SCALE
}  // namespace avx512
namespace avx2 {
BTINET_DECLARE_MULTI_SCALE
}  // namespace avx2
namespace portable {
BTINET_DECLARE_MULTI_SCALE
}  // namespace portable

template <class S>
void multi_scale(const View<const S>& x, const ScaleWeights<Compute<S>>& weights, const View<S>& out,
                 const View<S>& between, const Finish<Compute<S>>& finish, int threads) {
  BTINET_DISPATCH(multi_scale<S>(x, weights, out, between, finish, threads));
}

template <class S>
void multi_scale_backward(const View<const S>& x, const View<const S>& grad, const View<const S>& between,
                          const Arriving<S>& arriving, const ScaleWeights<Compute<S>>& weights, const View<S>& out,
                          const ScaleGradient<Compute<S>>& gradient, int threads) {
  BTINET_DISPATCH(multi_scale_backward<S>(x, grad, between, arriving, weights, out, gradient, threads));
}

BTINET_INSTANTIATE_MULTI_SCALE(float)
BTINET_INSTANTIATE_MULTI_SCALE(double)
BTINET_INSTANTIATE_MULTI_SCALE(bfloat16)

}  // namespace btinet
