#include "../bindings.h"
#include "depthwise.h"

namespace py = pybind11;

namespace btinet {

namespace {

// Kernel, stride, padding, dilation; each along y and x.
using Numbers = std::array<std::array<int64_t, 2>, 4>;

Geometry geometry(const Numbers& n) {
  return {{n[0][0], n[0][1]}, {n[1][0], n[1][1]}, {n[2][0], n[2][1]}, {n[3][0], n[3][1]}};
}

template <class S>
void bind(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  module.def(("depthwise_" + suffix).c_str(),
             [](const Dense& x, const Numbers& numbers, uintptr_t taps, uintptr_t bias, const Dense& out, int threads) {
               depthwise<S>(x.as<const S>(), geometry(numbers), at<const T>(taps), at<const T>(bias), out.as<S>(),
                            threads);
             },
             Release());
  module.def(("depthwise_backward_" + suffix).c_str(),
             [](const Dense& x, const Dense& grad, const Numbers& numbers, uintptr_t taps, const Dense& out,
                uintptr_t d_taps, int threads) {
               depthwise_backward<S>(x.as<const S>(), grad.as<const S>(), geometry(numbers), at<const T>(taps),
                                     out.as<S>(), at<T>(d_taps), threads);
             },
             Release());
}

}  // namespace

void bind_depthwise(py::module_& module) {
  bind<float>(module, "float32");
  bind<double>(module, "float64");
  bind<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
