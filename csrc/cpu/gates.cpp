// Chooses the instruction set at run time.
#include "gates.h"

#include "../common/instruction_set.h"

namespace btinet {

namespace avx512 {
BTINET_DECLARE_GATES
}  // namespace avx512
namespace avx2 {
BTINET_DECLARE_GATES
}  // namespace avx2
namespace portable {
BTINET_DECLARE_GATES
}  // namespace portable

template <class S>
void dual_path(const View<const S>& x, const View<const S>& residual, const DualPathSizes& sizes,
               const DualPathWeights<const Compute<S>>& weights, const DualPathSaved<Compute<S>>& saved,
               const View<S>& out, int threads) {
  BTINET_DISPATCH(dual_path<S>(x, residual, sizes, weights, saved, out, threads));
}

template <class S>
void dual_path_backward(const View<const S>& d_out, const View<const S>& x, const View<const S>& out,
                        const DualPathSizes& sizes, const DualPathWeights<const Compute<S>>& weights,
                        const DualPathSaved<const Compute<S>>& saved, const View<S>& d_x, const View<S>& d_residual,
                        const DualPathWeights<Compute<S>>& d_weights, int threads) {
  BTINET_DISPATCH(dual_path_backward<S>(d_out, x, out, sizes, weights, saved, d_x, d_residual, d_weights, threads));
}

BTINET_INSTANTIATE_GATES(float)
BTINET_INSTANTIATE_GATES(double)
BTINET_INSTANTIATE_GATES(bfloat16)

}  // namespace btinet
