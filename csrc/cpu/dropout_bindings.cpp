#include "../bindings.h"
#include "dropout.h"

namespace py = pybind11;

namespace btinet {

namespace {

template <class S>
void bind(py::module_& module, const std::string& suffix) {
  module.def(("dropout_" + suffix).c_str(),
             [](uintptr_t x, int64_t count, int64_t seed, uint64_t threshold, double factor, uintptr_t out,
                int threads) {
               dropout<S>(at<const S>(x), count, {uint64_t(seed), threshold, factor}, at<S>(out), threads);
             },
             Release());
}

}  // namespace

void bind_dropout(py::module_& module) {
  bind<float>(module, "float32");
  bind<double>(module, "float64");
  bind<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
