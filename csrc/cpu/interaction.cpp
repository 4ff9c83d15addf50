// Chooses the instruction set at run time.
#include "interaction.h"
#include "level.h"

#include <cstdlib>
#include <cstring>

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

namespace {

const char* best_instruction_set() {
#if defined(__x86_64__)
  // BTINET_INSTRUCTION_SET=avx2 or =portable asks for less than the machine has, to test or to compare.
  const char* wanted = std::getenv("BTINET_INSTRUCTION_SET");
  const bool portable = wanted && std::strcmp(wanted, "portable") == 0;
  const bool at_most_avx2 = wanted && std::strcmp(wanted, "avx2") == 0;
  if (!portable && !at_most_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return "avx512";
  if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

}  // namespace

const char* instruction_set() {
  static const char* const name = best_instruction_set();
  return name;
}

#if defined(__x86_64__)
#define BTINET_DISPATCH(call)                             \
  do {                                                    \
    if (std::strcmp(instruction_set(), "avx512") == 0)    \
      avx512::call;                                       \
    else if (std::strcmp(instruction_set(), "avx2") == 0) \
      avx2::call;                                         \
    else                                                  \
      portable::call;                                     \
  } while (0)
#else
#define BTINET_DISPATCH(call) portable::call
#endif

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
