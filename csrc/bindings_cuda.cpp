// The extension module btinet_kernels._cuda: device pointers in, nothing of torch. Pointers and streams travel as
// integers; 0 is null. Calls only enqueue work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/interaction.h"

namespace py = pybind11;
using namespace btinet;
using namespace btinet::cuda;

namespace {

using Pointers3 = std::array<uintptr_t, 3>;
using Pointers4 = std::array<uintptr_t, 4>;
using Pointers6 = std::array<uintptr_t, 6>;
using Sizes = std::array<int64_t, 5>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Type type_named(const std::string& name) {
  if (name == "float32") return Type::kFloat32;
  if (name == "float16") return Type::kFloat16;
  if (name == "bfloat16") return Type::kBFloat16;
  throw std::invalid_argument("the CUDA kernels take float32, float16 and bfloat16, not " + name + ".");
}

Shape shape_of(const Sizes& size) {
  return {size[0], size[1], {size[2], size[3], size[4]}};
}

Context context_of(int64_t hidden, const Pointers3& weights) {
  return {hidden, at<const float>(weights[0]), at<const float>(weights[1]), at<const float>(weights[2])};
}

cuda::Statistics statistics_of(const Pointers6& p) {
  return {at<float>(p[0]), at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), at<float>(p[4]), at<uint8_t>(p[5])};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using Release = py::call_guard<py::gil_scoped_release>;

  // (address, dtype, [B, C, z, y, x] sizes, strides in elements)
  py::class_<Tensor>(module, "Dense", py::module_local())
      .def(py::init([](uintptr_t address, const std::string& dtype, const Sizes& size, const Sizes& stride) {
        return Tensor{{at<void>(address), shape_of(size), stride[0], stride[1], {stride[2], stride[3], stride[4]}},
                      type_named(dtype)};
      }));

  // Sizes of workspaces in floats.
  module.def("statistics_workspace",
             [](const Tensor& seg, int64_t hidden) { return statistics_workspace(seg.view.shape, hidden); });
  module.def("channel_dot_workspace", [](const Tensor& seg) { return channel_dot_workspace(seg.view.shape); });
  module.def("statistics_backward_workspace", [](const Tensor& seg, int64_t hidden, bool softmax) {
    return statistics_backward_workspace(seg.view.shape, hidden, softmax);
  });

  module.def(
      "statistics",
      [](const Tensor& seg, int64_t hidden, const Pointers3& context, const Pointers6& out, uintptr_t workspace,
         uintptr_t stream) {
        statistics(seg, context_of(hidden, context), statistics_of(out), at<float>(workspace), at<void>(stream));
      },
      Release());
  module.def(
      "scale_channels",
      [](const Tensor& seg, uintptr_t scale, const Tensor& out, uintptr_t stream) {
        scale_channels(seg, at<const float>(scale), out, at<void>(stream));
      },
      Release());
  module.def(
      "interpolate",
      [](const Tensor& base, const Tensor& enhanced, uintptr_t weight, const Tensor& out, uintptr_t stream) {
        interpolate(base, enhanced, at<const float>(weight), out, at<void>(stream));
      },
      Release());
  module.def(
      "channel_dot",
      [](const Tensor& grad, const Tensor& seg, uintptr_t out, uintptr_t workspace, uintptr_t stream) {
        channel_dot(grad, seg, at<float>(out), at<float>(workspace), at<void>(stream));
      },
      Release());
  module.def(
      "statistics_backward",
      [](const Tensor& seg, const Tensor& grad, uintptr_t scale, int64_t hidden, const Pointers3& context,
         const Pointers6& saved, const Pointers4& gradient, const Tensor& out, const Pointers3& context_gradient,
         uintptr_t workspace, uintptr_t stream) {
        statistics_backward(
            {seg,
             grad,
             at<const float>(scale),
             context_of(hidden, context),
             statistics_of(saved),
             {at<const float>(gradient[0]), at<const float>(gradient[1]), at<const float>(gradient[2]),
              at<const float>(gradient[3])}},
            out, {at<float>(context_gradient[0]), at<float>(context_gradient[1]), at<float>(context_gradient[2])},
            at<float>(workspace), at<void>(stream));
      },
      Release());
}
