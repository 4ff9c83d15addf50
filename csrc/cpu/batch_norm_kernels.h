// The passes, compiled once per instruction set (common/isa_*.h).
#pragma once

#include "../common/simd.h"

#include "../common/access.h"
#include "../common/exponential.h"

#include "batch_norm_channels.h"

#include "batch_norm_passes.h"

namespace btinet {
namespace BTINET_ISA {

BTINET_INSTANTIATE_BATCH_NORM(float)
BTINET_INSTANTIATE_BATCH_NORM(double)
BTINET_INSTANTIATE_BATCH_NORM(bfloat16)

}  // namespace BTINET_ISA
}  // namespace btinet
