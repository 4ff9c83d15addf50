#include "../bindings.h"
#include "segmentation_loss.h"

namespace py = pybind11;

namespace btinet {

namespace {

// A target that is stored in bytes has no values, and the other way round: its address is 0.
template <class S>
void bind(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  module.def(("mask_statistics_" + suffix).c_str(),
             [](const Dense& logits, const Dense& values, const Dense& bytes, const MaskFilter& filter,
                uintptr_t statistics, uintptr_t sobel_mean, int threads) {
               mask_statistics<S>(logits.as<const S>(), {values.as<const T>(), bytes.as<const uint8_t>()}, filter,
                                  at<double>(statistics), at<double>(sobel_mean), threads);
             },
             Release());
  module.def(("mask_statistics_backward_" + suffix).c_str(),
             [](uintptr_t d_statistics, const Dense& logits, const Dense& values, const Dense& bytes,
                const MaskFilter& filter, uintptr_t sobel_mean, const Dense& d_logits, int threads) {
               mask_statistics_backward<S>(at<const double>(d_statistics), logits.as<const S>(),
                                           {values.as<const T>(), bytes.as<const uint8_t>()}, filter,
                                           at<const double>(sobel_mean), d_logits.as<S>(), threads);
             },
             Release());
}

}  // namespace

void bind_segmentation_loss(py::module_& module) {
  py::class_<MaskFilter>(module, "MaskFilter")
      .def(py::init([](const std::array<double, 3>& curvature, double floor, bool hard_boundary, bool cross_entropy) {
        return MaskFilter{{curvature[0], curvature[1], curvature[2]}, floor, hard_boundary, cross_entropy};
      }));
  bind<float>(module, "float32");
  bind<double>(module, "float64");
  bind<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
