// The part of the backward pass that only softmax pooling needs.
#pragma once

#include "interaction.h"

namespace btinet {
namespace cuda {

int64_t softmax_gradient_workspace(const Shape& shape, int64_t hidden);

// Writes the pooling weight's gradient; returns the gradient of W D + w0, [B, N, hidden], in the workspace.
const float* softmax_gradient(const BackwardInputs& in, float* pool_weight_gradient, float* workspace, void* stream);

}  // namespace cuda
}  // namespace btinet
