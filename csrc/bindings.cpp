// The extension module btinet_kernels._cpu: pointers in, nothing of torch.
#include "bindings.h"

#include "common/instruction_set.h"

namespace py = pybind11;
using namespace btinet;

PYBIND11_MODULE(_cpu, module) {
  module.def("instruction_set", &instruction_set);
  py::class_<Dense>(module, "Dense")
      .def(py::init([](uintptr_t address, const std::array<int64_t, 5>& size, const std::array<int64_t, 5>& stride) {
        return Dense{address, size, stride};
      }));
  bind_interaction(module);
  bind_multi_scale(module);
  bind_gates(module);
  bind_segmentation_loss(module);
  bind_upsampling(module);
  bind_batch_norm(module);
  bind_depthwise(module);
  bind_dropout(module);
}
