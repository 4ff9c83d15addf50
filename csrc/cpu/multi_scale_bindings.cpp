#include "../bindings.h"
#include "multi_scale.h"

namespace py = pybind11;

namespace btinet {

namespace {

// Addresses: three of taps, three of pointwise, share, bias, fusion, fusion_bias.
using Addresses = std::array<uintptr_t, 10>;

struct Sizes {
  int axes;
  std::vector<int64_t> dilations;
  int64_t middle, outputs, pointwise_stride;
};

template <class T>
ScaleWeights<T> scale_weights(const Sizes& sizes, const Addresses& a) {
  ScaleWeights<T> weights{sizes.axes,
                          int(sizes.dilations.size()),
                          {},
                          {at<const T>(a[0]), at<const T>(a[1]), at<const T>(a[2])},
                          {at<const T>(a[3]), at<const T>(a[4]), at<const T>(a[5])},
                          sizes.pointwise_stride,
                          at<const T>(a[6]),
                          at<const T>(a[7]),
                          at<const T>(a[8]),
                          at<const T>(a[9]),
                          sizes.middle,
                          sizes.outputs};
  std::copy(sizes.dilations.begin(), sizes.dilations.end(), weights.dilations);
  return weights;
}

template <class T>
ScaleGradient<T> scale_gradient(const Sizes& sizes, const Addresses& a) {
  return {{at<T>(a[0]), at<T>(a[1]), at<T>(a[2])},
          {at<T>(a[3]), at<T>(a[4]), at<T>(a[5])},
          sizes.pointwise_stride,
          at<T>(a[6]),
          at<T>(a[7]),
          at<T>(a[8]),
          at<T>(a[9])};
}

template <class S>
void bind(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  module.def(("multi_scale_" + suffix).c_str(),
             [](const Dense& x, const Sizes& sizes, const Addresses& weights, const Dense& out, const Dense& between,
                int threads) {
               multi_scale<S>(x.as<const S>(), scale_weights<T>(sizes, weights), out.as<S>(), between.as<S>(), {},
                              threads);
             },
             Release());
  module.def(("multi_scale_backward_" + suffix).c_str(),
             [](const Dense& x, const Dense& grad, const Dense& between, const Sizes& sizes, const Addresses& weights,
                const Dense& out, const Sizes& gradient_sizes, const Addresses& gradient, int threads) {
               multi_scale_backward<S>(x.as<const S>(), grad.as<const S>(), between.as<const S>(), {},
                                       scale_weights<T>(sizes, weights), out.as<S>(),
                                       scale_gradient<T>(gradient_sizes, gradient), threads);
             },
             Release());
  // `finish`: addresses of factor, addend, mean, variance.
  module.def(("separable_" + suffix).c_str(),
             [](const Dense& x, const Sizes& sizes, const Addresses& weights, const Dense& out, bool relu,
                const std::array<uintptr_t, 4>& finish, int threads) {
               multi_scale<S>(
                   x.as<const S>(), scale_weights<T>(sizes, weights), out.as<S>(), {},
                   {relu, at<const T>(finish[0]), at<const T>(finish[1]), at<T>(finish[2]), at<T>(finish[3])}, threads);
             },
             Release());
  // `arriving`: addresses of factor, slope, addend.
  module.def(
      ("separable_backward_" + suffix).c_str(),
      [](const Dense& x, const Dense& grad, const Dense& value, bool relu, const std::array<uintptr_t, 3>& arriving,
         const Sizes& sizes, const Addresses& weights, const Dense& out, const Sizes& gradient_sizes,
         const Addresses& gradient, int threads) {
        multi_scale_backward<S>(
            x.as<const S>(), grad.as<const S>(), {},
            {value.as<const S>(), at<const T>(arriving[0]), at<const T>(arriving[1]), at<const T>(arriving[2]), relu},
            scale_weights<T>(sizes, weights), out.as<S>(), scale_gradient<T>(gradient_sizes, gradient), threads);
      },
      Release());
}

}  // namespace

void bind_multi_scale(py::module_& module) {
  py::class_<Sizes>(module, "ScaleSizes")
      .def(py::init(
          [](int axes, std::vector<int64_t> dilations, int64_t middle, int64_t outputs, int64_t pointwise_stride) {
            if (dilations.empty() || dilations.size() > kMostScales) throw py::value_error("one to three scales");
            return Sizes{axes, std::move(dilations), middle, outputs, pointwise_stride};
          }));
  bind<float>(module, "float32");
  bind<double>(module, "float64");
  bind<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
