#include "../bindings.h"
#include "gates.h"

namespace py = pybind11;

namespace btinet {

namespace {

using Weights = std::array<uintptr_t, 6>;
using Saved = std::array<uintptr_t, 5>;

template <class T>
DualPathWeights<T> weights_at(const Weights& a) {
  return {at<T>(a[0]), at<T>(a[1]), at<T>(a[2]), at<T>(a[3]), at<T>(a[4]), at<T>(a[5])};
}

template <class T>
DualPathSaved<T> saved_at(const Saved& a) {
  return {at<T>(a[0]), at<T>(a[1]), at<T>(a[2]), at<T>(a[3]), at<T>(a[4])};
}

// A missing tensor has the address 0.
template <class S>
void bind_dual_path(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  module.def(("dual_path_" + suffix).c_str(),
             [](const Dense& x, const Dense& residual, const std::array<int64_t, 3>& sizes, const Weights& weights,
                const Saved& saved, const Dense& out, int threads) {
               dual_path<S>(x.as<const S>(), residual.as<const S>(), {sizes[0], {sizes[1], sizes[2]}},
                            weights_at<const T>(weights), saved_at<T>(saved), out.as<S>(), threads);
             },
             Release());
  module.def(("dual_path_backward_" + suffix).c_str(),
             [](const Dense& d_out, const Dense& x, const Dense& out, const std::array<int64_t, 3>& sizes,
                const Weights& weights, const Saved& saved, const Dense& d_x, const Dense& d_residual,
                const Weights& d_weights, int threads) {
               dual_path_backward<S>(d_out.as<const S>(), x.as<const S>(), out.as<const S>(),
                                     {sizes[0], {sizes[1], sizes[2]}}, weights_at<const T>(weights),
                                     saved_at<const T>(saved), d_x.as<S>(), d_residual.as<S>(),
                                     weights_at<T>(d_weights), threads);
             },
             Release());
}

// Addresses: x_weight, g_weight, bias.
template <class T>
JointWeights<T> joint_at(const std::array<uintptr_t, 3>& a) {
  return {at<T>(a[0]), at<T>(a[1]), at<T>(a[2])};
}

// Addresses: weight, bias.
template <class T>
PositionWeights<T> position_at(const std::array<uintptr_t, 2>& a) {
  return {at<T>(a[0]), at<T>(a[1])};
}

template <class S>
void bind_attention(py::module_& module, const std::string& suffix) {
  using T = Compute<S>;
  using Joint = std::array<uintptr_t, 3>;
  using Position = std::array<uintptr_t, 2>;
  module.def(("joint_projection_" + suffix).c_str(),
             [](const Dense& x, const Dense& g, const Joint& weights, const Dense& out, int threads) {
               joint_projection<S>(x.as<const S>(), g.as<const S>(), joint_at<const T>(weights), out.as<S>(), threads);
             },
             Release());
  module.def(("joint_projection_backward_" + suffix).c_str(),
             [](const Dense& d_out, const Dense& out, const Dense& x, const Dense& g, const Joint& weights,
                const Dense& d_x, const Dense& d_g, const Joint& d_weights, int threads) {
               joint_projection_backward<S>(d_out.as<const S>(), out.as<const S>(), x.as<const S>(), g.as<const S>(),
                                            joint_at<const T>(weights), d_x.as<S>(), d_g.as<S>(),
                                            joint_at<T>(d_weights), threads);
             },
             Release());
  module.def(
      ("position_gate_" + suffix).c_str(),
      [](const Dense& x, const Dense& h, const Position& weights, uintptr_t gate, const Dense& out, int threads) {
        position_gate<S>(x.as<const S>(), h.as<const S>(), position_at<const T>(weights), at<T>(gate), out.as<S>(),
                         threads);
      },
      Release());
  module.def(("position_gate_backward_" + suffix).c_str(),
             [](const Dense& d_out, const Dense& x, const Dense& h, uintptr_t gate, const Position& weights,
                const Dense& d_x, const Dense& d_h, const Position& d_weights, int threads) {
               position_gate_backward<S>(d_out.as<const S>(), x.as<const S>(), h.as<const S>(), at<const T>(gate),
                                         position_at<const T>(weights), d_x.as<S>(), d_h.as<S>(),
                                         position_at<T>(d_weights), threads);
             },
             Release());
}

}  // namespace

void bind_gates(py::module_& module) {
  bind_dual_path<float>(module, "float32");
  bind_attention<float>(module, "float32");
  bind_dual_path<double>(module, "float64");
  bind_attention<double>(module, "float64");
  bind_dual_path<bfloat16>(module, "bfloat16");
  bind_attention<bfloat16>(module, "bfloat16");
}

}  // namespace btinet
