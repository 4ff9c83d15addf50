#include "../bindings.h"
#include "upsampling.h"

namespace py = pybind11;

namespace btinet {

namespace {

// Address, stride of the outputs, stride of the taps.
using Weight = std::array<int64_t, 3>;

template <class T>
UpsamplingWeight<T> weight_at(const Weight& a) {
  return {at<T>(uintptr_t(a[0])), a[1], a[2]};
}

template <class S>
void bind(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  module.def(("upsample_twice_" + suffix).c_str(),
             [](const Dense& x, const Weight& weight, uintptr_t bias, const Dense& out, int threads) {
               upsample_twice<S>(x.as<const S>(), weight_at<const T>(weight), at<const T>(bias), out.as<S>(), threads);
             },
             Release());
  module.def(("upsample_twice_backward_" + suffix).c_str(),
             [](const Dense& d_out, const Dense& x, const Weight& weight, const Dense& d_x, const Weight& d_weight,
                uintptr_t d_bias, int threads) {
               upsample_twice_backward<S>(d_out.as<const S>(), x.as<const S>(), weight_at<const T>(weight), d_x.as<S>(),
                                          weight_at<T>(d_weight), at<T>(d_bias), threads);
             },
             Release());
}

}  // namespace

void bind_upsampling(py::module_& module) {
  bind<float>(module, "float32");
  bind<double>(module, "float64");
  bind<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
