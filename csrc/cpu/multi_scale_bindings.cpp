#include "../bindings.h"
#include "multi_scale.h"

namespace py = pybind11;

namespace btinet {

namespace {

// Addresses: three of taps, share, merged, bias.
using Six = std::array<uintptr_t, 6>;

template <class T>
ScaleWeights<T> scale_weights(int axes, int64_t outputs, const Six& a) {
  return {axes,
          {at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2])},
          at<const T>(a[3]),
          at<const T>(a[4]),
          at<const T>(a[5]),
          outputs};
}

template <class S>
void bind(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  module.def(("multi_scale_" + suffix).c_str(),
             [](const Dense& x, int axes, int64_t outputs, const Six& weights, const Dense& out, int threads) {
               multi_scale<S>(x.as<const S>(), scale_weights<T>(axes, outputs, weights), out.as<S>(), threads);
             },
             Release());
  module.def(("multi_scale_backward_" + suffix).c_str(),
             [](const Dense& x, const Dense& grad, int axes, int64_t outputs, const Six& weights, const Dense& out,
                const Six& gradient, int threads) {
               multi_scale_backward<S>(x.as<const S>(), grad.as<const S>(), scale_weights<T>(axes, outputs, weights),
                                       out.as<S>(),
                                       {{at<T>(gradient[0]), at<T>(gradient[1]), at<T>(gradient[2])},
                                        at<T>(gradient[3]),
                                        at<T>(gradient[4]),
                                        at<T>(gradient[5])},
                                       threads);
             },
             Release());
}

}  // namespace

void bind_multi_scale(py::module_& module) {
  bind<float>(module, "float32");
  bind<double>(module, "float64");
  bind<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
