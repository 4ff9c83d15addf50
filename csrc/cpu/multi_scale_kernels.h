// The kernels, compiled once per instruction set (common/isa_*.h).
#pragma once

#include "../common/simd.h"

#include "../common/product.h"

#include "../common/access.h"

#include "../common/bands.h"
#include "../common/panels.h"
#include "../common/turned_product.h"
#include "dilated.h"

#include "multi_scale_forward.h"

#include "multi_scale_backward.h"

namespace btinet {
namespace BTINET_ISA {

BTINET_INSTANTIATE_MULTI_SCALE(float)
BTINET_INSTANTIATE_MULTI_SCALE(double)
BTINET_INSTANTIATE_MULTI_SCALE(bfloat16)

}  // namespace BTINET_ISA
}  // namespace btinet
