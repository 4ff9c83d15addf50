// The kernels, compiled once per instruction set (common/isa_*.h).
#pragma once

#include "../common/simd.h"

#include "../common/product.h"

#include "../common/access.h"
#include "../common/panels.h"
#include "../common/pieces.h"

#include "upsampling_rows.h"

#include "upsampling_forward.h"

#include "upsampling_backward.h"

namespace btinet {
namespace BTINET_ISA {

BTINET_INSTANTIATE_UPSAMPLING(float)
BTINET_INSTANTIATE_UPSAMPLING(double)
BTINET_INSTANTIATE_UPSAMPLING(bfloat16)

}  // namespace BTINET_ISA
}  // namespace btinet
