// Chooses the instruction set at run time.
#include "depthwise.h"

#include "../common/instruction_set.h"

namespace btinet {

namespace avx512 {
BTINET_DECLARE_DEPTHWISE
}  // namespace avx512
namespace avx2 {
BTINET_DECLARE_DEPTHWISE
}  // namespace avx2
namespace portable {
BTINET_DECLARE_DEPTHWISE
}  // namespace portable

template <class S>
void depthwise(const View<const S>& x, const Geometry& geometry, const Compute<S>* taps, const Compute<S>* bias,
               const View<S>& out, int threads) {
  BTINET_DISPATCH(depthwise<S>(x, geometry, taps, bias, out, threads));
}

template <class S>
void depthwise_backward(const View<const S>& x, const View<const S>& grad, const Geometry& geometry,
                        const Compute<S>* taps, const View<S>& out, Compute<S>* d_taps, int threads) {
  BTINET_DISPATCH(depthwise_backward<S>(x, grad, geometry, taps, out, d_taps, threads));
}

BTINET_INSTANTIATE_DEPTHWISE(float)
BTINET_INSTANTIATE_DEPTHWISE(double)
BTINET_INSTANTIATE_DEPTHWISE(bfloat16)

}  // namespace btinet
