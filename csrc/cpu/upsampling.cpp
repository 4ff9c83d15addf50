// Chooses the instruction set at run time.
#include "upsampling.h"

#include "../common/instruction_set.h"

namespace btinet {

namespace avx512 {
BTINET_DECLARE_UPSAMPLING
}  // namespace avx512
namespace avx2 {
BTINET_DECLARE_UPSAMPLING
}  // namespace avx2
namespace portable {
BTINET_DECLARE_UPSAMPLING
}  // namespace portable

template <class S>
void upsample_twice(const View<const S>& x, const UpsamplingWeight<const Compute<S>>& weight, const Compute<S>* bias,
                    const View<S>& out, int threads) {
  BTINET_DISPATCH(upsample_twice<S>(x, weight, bias, out, threads));
}

template <class S>
void upsample_twice_backward(const View<const S>& d_out, const View<const S>& x,
                             const UpsamplingWeight<const Compute<S>>& weight, const View<S>& d_x,
                             const UpsamplingWeight<Compute<S>>& d_weight, Compute<S>* d_bias, int threads) {
  BTINET_DISPATCH(upsample_twice_backward<S>(d_out, x, weight, d_x, d_weight, d_bias, threads));
}

BTINET_INSTANTIATE_UPSAMPLING(float)
BTINET_INSTANTIATE_UPSAMPLING(double)
BTINET_INSTANTIATE_UPSAMPLING(bfloat16)

}  // namespace btinet
