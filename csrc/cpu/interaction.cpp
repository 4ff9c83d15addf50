// Chooses the instruction set at run time.
#include "interaction.h"

#include <cstdlib>
#include <cstring>

namespace btinet {

namespace avx512 {
BTINET_DECLARE_INTERACTION_PASSES
}
namespace avx2 {
BTINET_DECLARE_INTERACTION_PASSES
}
namespace portable {
BTINET_DECLARE_INTERACTION_PASSES
}

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

template <class T>
void statistics(const View<const T>& seg, const Context<T>& context, const Statistics<T>& out, int threads) {
  BTINET_DISPATCH(statistics(seg, context, out, threads));
}

template <class T>
void scale_channels(const View<const T>& seg, const T* scale, const View<T>& out, int threads) {
  BTINET_DISPATCH(scale_channels(seg, scale, out, threads));
}

template <class T>
void interpolate(const View<const T>& base, const View<const T>& enhanced, const T* weight, const View<T>& out,
                 int threads) {
  BTINET_DISPATCH(interpolate(base, enhanced, weight, out, threads));
}

template <class T>
void channel_dot(const View<const T>& grad, const View<const T>& seg, T* out, int threads) {
  BTINET_DISPATCH(channel_dot(grad, seg, out, threads));
}

template <class T>
void statistics_backward(const View<const T>& seg, const View<const T>& grad, const T* scale, const Context<T>& context,
                         const Statistics<const T>& saved, const StatisticsGradient<T>& gradient, const View<T>& out,
                         const ContextGradient<T>& context_gradient, int threads) {
  BTINET_DISPATCH(statistics_backward(seg, grad, scale, context, saved, gradient, out, context_gradient, threads));
}

BTINET_INSTANTIATE_INTERACTION_PASSES(float)
BTINET_INSTANTIATE_INTERACTION_PASSES(double)

}  // namespace btinet
