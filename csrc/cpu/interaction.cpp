// Chooses the instruction set at run time.
#include "interaction.h"

#include "../common/instruction_set.h"
#include "level.h"

namespace btinet {

namespace avx512 {
BTINET_DECLARE_INTERACTION_PASSES
BTINET_DECLARE_LEVEL
}  // namespace avx512
namespace avx2 {
BTINET_DECLARE_INTERACTION_PASSES
BTINET_DECLARE_LEVEL
}  // namespace avx2
namespace portable {
BTINET_DECLARE_INTERACTION_PASSES
BTINET_DECLARE_LEVEL
}  // namespace portable

template <class S>
void statistics(const View<const S>& seg, const Context<Compute<S>>& context, const Statistics<Compute<S>>& out,
                int threads) {
  BTINET_DISPATCH(statistics<S>(seg, context, out, threads));
}

template <class S>
void scale_channels(const View<const S>& seg, const Compute<S>* scale, const View<S>& out, int threads) {
  BTINET_DISPATCH(scale_channels<S>(seg, scale, out, threads));
}

template <class S>
void interpolate(const View<const S>& base, const View<const S>& enhanced, const Compute<S>* weight, const View<S>& out,
                 int threads) {
  BTINET_DISPATCH(interpolate<S>(base, enhanced, weight, out, threads));
}

template <class S>
void channel_dot(const View<const S>& grad, const View<const S>& seg, Compute<S>* out, int threads) {
  BTINET_DISPATCH(channel_dot<S>(grad, seg, out, threads));
}

template <class S>
void statistics_backward(const View<const S>& seg, const View<const S>& grad, const Compute<S>* scale,
                         const Context<Compute<S>>& context, const Statistics<const Compute<S>>& saved,
                         const StatisticsGradient<Compute<S>>& gradient, const View<S>& out,
                         const ContextGradient<Compute<S>>& context_gradient, int threads) {
  BTINET_DISPATCH(statistics_backward<S>(seg, grad, scale, context, saved, gradient, out, context_gradient, threads));
}

template <class T>
void level_vectors(const LevelOptions& options, const LevelInputs<T>& in, const LevelWeights<const T>& weights,
                   const LevelResult<T>& out, int threads) {
  BTINET_DISPATCH(level_vectors<T>(options, in, weights, out, threads));
}

template <class T>
void level_backward(const LevelOptions& options, const LevelInputs<T>& in, const LevelWeights<const T>& weights,
                    const LevelUpstream<T>& upstream, const LevelGradient<T>& gradient,
                    const LevelWeights<T>& weight_gradient, int threads) {
  BTINET_DISPATCH(level_backward<T>(options, in, weights, upstream, gradient, weight_gradient, threads));
}

BTINET_INSTANTIATE_INTERACTION_PASSES(float)
BTINET_INSTANTIATE_INTERACTION_PASSES(double)
BTINET_INSTANTIATE_INTERACTION_PASSES(bfloat16)
BTINET_INSTANTIATE_LEVEL(float)
BTINET_INSTANTIATE_LEVEL(double)

}  // namespace btinet
