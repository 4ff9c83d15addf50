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

template <class S>
void joint_projection(const View<const S>& x, const View<const S>& g, const JointWeights<const Compute<S>>& weights,
                      const View<S>& out, int threads) {
  BTINET_DISPATCH(joint_projection<S>(x, g, weights, out, threads));
}

template <class S>
void joint_projection_backward(const View<const S>& d_out, const View<const S>& out, const View<const S>& x,
                               const View<const S>& g, const JointWeights<const Compute<S>>& weights,
                               const View<S>& d_x, const View<S>& d_g, const JointWeights<Compute<S>>& d_weights,
                               int threads) {
  BTINET_DISPATCH(joint_projection_backward<S>(d_out, out, x, g, weights, d_x, d_g, d_weights, threads));
}

template <class S>
void position_gate(const View<const S>& x, const View<const S>& h, const PositionWeights<const Compute<S>>& weights,
                   Compute<S>* gate, const View<S>& out, int threads) {
  BTINET_DISPATCH(position_gate<S>(x, h, weights, gate, out, threads));
}

template <class S>
void position_gate_backward(const View<const S>& d_out, const View<const S>& x, const View<const S>& h,
                            const Compute<S>* gate, const PositionWeights<const Compute<S>>& weights,
                            const View<S>& d_x, const View<S>& d_h, const PositionWeights<Compute<S>>& d_weights,
                            int threads) {
  BTINET_DISPATCH(position_gate_backward<S>(d_out, x, h, gate, weights, d_x, d_h, d_weights, threads));
}

BTINET_INSTANTIATE_GATES(float)
BTINET_INSTANTIATE_GATES(double)
BTINET_INSTANTIATE_GATES(bfloat16)

}  // namespace btinet
