// What the bindings of every operator family share. Pointers travel as integers; 0 is null.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/view.h"

namespace btinet {

// (address, [B, C, z, y, x] sizes, strides in elements)
struct Dense {
  uintptr_t address;
  std::array<int64_t, 5> size;
  std::array<int64_t, 5> stride;

  template <class T>
  View<T> as() const {
    return {reinterpret_cast<T*>(address),
            {size[0], size[1], {size[2], size[3], size[4]}},
            stride[0],
            stride[1],
            {stride[2], stride[3], stride[4]}};
  }
};

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Kernels run without Python's lock.
using Release = pybind11::call_guard<pybind11::gil_scoped_release>;

// One function per operator family, called when the module is imported.
void bind_interaction(pybind11::module_& module);
void bind_multi_scale(pybind11::module_& module);
void bind_gates(pybind11::module_& module);
void bind_segmentation_loss(pybind11::module_& module);
void bind_upsampling(pybind11::module_& module);
void bind_batch_norm(pybind11::module_& module);
void bind_depthwise(pybind11::module_& module);
void bind_dropout(pybind11::module_& module);

}  // namespace btinet
