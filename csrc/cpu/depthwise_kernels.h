// The kernels, compiled once per instruction set (common/isa_*.h).
#pragma once

#include "../common/simd.h"

#include "../common/access.h"

#include "depthwise_images.h"

#include "depthwise_passes.h"

namespace btinet {
namespace BTINET_ISA {

BTINET_INSTANTIATE_DEPTHWISE(float)
BTINET_INSTANTIATE_DEPTHWISE(double)
BTINET_INSTANTIATE_DEPTHWISE(bfloat16)

}  // namespace BTINET_ISA
}  // namespace btinet
