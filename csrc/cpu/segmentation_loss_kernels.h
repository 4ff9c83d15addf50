// The passes, compiled once per instruction set (common/isa_*.h).
#pragma once

#include "../common/simd.h"

#include "../common/product.h"

#include "../common/exponential.h"

#include "segmentation_loss_rows.h"

#include "segmentation_loss_passes.h"

namespace btinet {
namespace BTINET_ISA {

BTINET_INSTANTIATE_SEGMENTATION_LOSS(float)
BTINET_INSTANTIATE_SEGMENTATION_LOSS(double)
BTINET_INSTANTIATE_SEGMENTATION_LOSS(bfloat16)

}  // namespace BTINET_ISA
}  // namespace btinet
