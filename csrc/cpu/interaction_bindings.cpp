#include "../bindings.h"
#include "interaction.h"
#include "level.h"

namespace py = pybind11;

namespace btinet {

namespace {

template <class T>
Context<T> context_of(int64_t hidden, const std::array<uintptr_t, 3>& weights) {
  return {hidden, at<const T>(weights[0]), at<const T>(weights[1]), at<const T>(weights[2])};
}

template <class S>
void bind_passes(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  using Pointers3 = std::array<uintptr_t, 3>;
  using Pointers4 = std::array<uintptr_t, 4>;
  using Pointers6 = std::array<uintptr_t, 6>;

  module.def(("statistics_" + suffix).c_str(),
             [](const Dense& seg, int64_t hidden, const Pointers3& context, const Pointers6& out, int threads) {
               statistics<S>(
                   seg.as<const S>(), context_of<T>(hidden, context),
                   {at<T>(out[0]), at<T>(out[1]), at<T>(out[2]), at<T>(out[3]), at<T>(out[4]), at<uint8_t>(out[5])},
                   threads);
             },
             Release());
  module.def(("scale_channels_" + suffix).c_str(),
             [](const Dense& seg, uintptr_t scale, const Dense& out, int threads) {
               scale_channels<S>(seg.as<const S>(), at<const T>(scale), out.as<S>(), threads);
             },
             Release());
  module.def(("interpolate_" + suffix).c_str(),
             [](const Dense& base, const Dense& enhanced, uintptr_t weight, const Dense& out, int threads) {
               interpolate<S>(base.as<const S>(), enhanced.as<const S>(), at<const T>(weight), out.as<S>(), threads);
             },
             Release());
  module.def(("channel_dot_" + suffix).c_str(),
             [](const Dense& grad, const Dense& seg, uintptr_t out, int threads) {
               channel_dot<S>(grad.as<const S>(), seg.as<const S>(), at<T>(out), threads);
             },
             Release());
  module.def(
      ("statistics_backward_" + suffix).c_str(),
      [](const Dense& seg, const Dense& grad, uintptr_t scale, int64_t hidden, const Pointers3& context,
         const Pointers6& saved, const Pointers4& gradient, const Dense& out, const Pointers3& context_gradient,
         int threads) {
        statistics_backward<S>(
            seg.as<const S>(), grad.as<const S>(), at<const T>(scale), context_of<T>(hidden, context),
            {at<const T>(saved[0]), at<const T>(saved[1]), at<const T>(saved[2]), at<const T>(saved[3]),
             at<const T>(saved[4]), at<const uint8_t>(saved[5])},
            {at<const T>(gradient[0]), at<const T>(gradient[1]), at<const T>(gradient[2]), at<const T>(gradient[3])},
            out.as<S>(), {at<T>(context_gradient[0]), at<T>(context_gradient[1]), at<T>(context_gradient[2])}, threads);
      },
      Release());
}

// Addresses of the weights in LevelWeights' order; a pointer for those that are missing is null.
template <class T>
LevelWeights<T> level_weights(const std::array<uintptr_t, 18>& a) {
  return {at<T>(a[0]),  at<T>(a[1]),  at<T>(a[2]),  at<T>(a[3]),  at<T>(a[4]),  at<T>(a[5]),
          at<T>(a[6]),  at<T>(a[7]),  at<T>(a[8]),  at<T>(a[9]),  at<T>(a[10]), at<T>(a[11]),
          at<T>(a[12]), at<T>(a[13]), at<T>(a[14]), at<T>(a[15]), at<T>(a[16]), at<T>(a[17])};
}

template <class T>
LevelInputs<T> level_inputs(const std::array<uintptr_t, 5>& a) {
  return {at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2]), at<const T>(a[3]), at<const T>(a[4])};
}

template <class T>
void bind_level(py::module_& module, const std::string& suffix) {
  using Weights = std::array<uintptr_t, 18>;
  using Inputs = std::array<uintptr_t, 5>;
  module.def(("level_vectors_" + suffix).c_str(),
             [](const LevelOptions& options, const Inputs& in, const Weights& weights,
                const std::array<uintptr_t, 6>& out, int threads) {
               level_vectors<T>(
                   options, level_inputs<T>(in), level_weights<const T>(weights),
                   {at<T>(out[0]), at<T>(out[1]), at<T>(out[2]), at<T>(out[3]), at<T>(out[4]), at<T>(out[5])}, threads);
             },
             Release());
  module.def(
      ("level_backward_" + suffix).c_str(),
      [](const LevelOptions& options, const Inputs& in, const Weights& weights,
         const std::array<uintptr_t, 4>& upstream, const std::array<uintptr_t, 5>& gradient,
         const Weights& weight_gradient, int threads) {
        level_backward<T>(
            options, level_inputs<T>(in), level_weights<const T>(weights),
            {at<const T>(upstream[0]), at<const T>(upstream[1]), at<const T>(upstream[2]), at<const T>(upstream[3])},
            {at<T>(gradient[0]), at<T>(gradient[1]), at<T>(gradient[2]), at<T>(gradient[3]), at<T>(gradient[4])},
            level_weights<T>(weight_gradient), threads);
      },
      Release());
}

}  // namespace

void bind_interaction(py::module_& module) {
  py::class_<LevelOptions>(module, "LevelOptions")
      .def(py::init([](const std::array<int64_t, 6>& sizes, int signals, double strength, bool training, double eps) {
        return LevelOptions{sizes[0], sizes[1],         sizes[2], sizes[3], sizes[4],
                            sizes[5], Signals(signals), strength, training, eps};
      }));
  bind_level<float>(module, "float32");
  bind_level<double>(module, "float64");
  bind_passes<float>(module, "float32");
  bind_passes<double>(module, "float64");
  bind_passes<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
