#include "../bindings.h"
#include "batch_norm.h"

namespace py = pybind11;

namespace btinet {

namespace {

template <class T>
NormWeights<T> norm_weights(const std::array<uintptr_t, 2>& weights, double eps, int act) {
  return {at<const T>(weights[0]), at<const T>(weights[1]), eps, Activation(act)};
}

template <class S>
void bind(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  using Two = std::array<uintptr_t, 2>;  // weight and bias, or mean and variance
  module.def(("batch_norm_" + suffix).c_str(),
             [](const Dense& x, const Two& weights, double eps, int act, bool training, const Two& moments,
                const Dense& out, int threads) {
               batch_norm<S>(x.as<const S>(), norm_weights<T>(weights, eps, act), training,
                             {at<T>(moments[0]), at<T>(moments[1])}, out.as<S>(), threads);
             },
             Release());
  module.def(("batch_norm_backward_" + suffix).c_str(),
             [](const Dense& x, const Dense& grad, const Two& weights, double eps, int act, bool training,
                const Two& moments, const Dense& out, const Two& gradients, int threads) {
               batch_norm_backward<S>(x.as<const S>(), grad.as<const S>(), norm_weights<T>(weights, eps, act), training,
                                      {at<const T>(moments[0]), at<const T>(moments[1])}, out.as<S>(),
                                      at<T>(gradients[0]), at<T>(gradients[1]), threads);
             },
             Release());
}

}  // namespace

void bind_batch_norm(py::module_& module) {
  bind<float>(module, "float32");
  bind<double>(module, "float64");
  bind<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
