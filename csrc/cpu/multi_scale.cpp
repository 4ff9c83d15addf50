// Chooses the instruction set at run time.
#include "multi_scale.h"

#include <type_traits>

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

#if defined(__x86_64__)
namespace avx512bf16 {
BTINET_DECLARE_MULTI_SCALE
}  // namespace avx512bf16
#endif

template <class S>
void multi_scale(const View<const S>& x, const ScaleWeights<Compute<S>>& weights, const View<S>& out,
                 const View<S>& between, const Finish<Compute<S>>& finish, int threads) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<S, bfloat16>) {
    if (multiplies_bfloat16()) return avx512bf16::multi_scale<S>(x, weights, out, between, finish, threads);
  }
#endif
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
