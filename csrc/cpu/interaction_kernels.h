// The passes, compiled once per instruction set (common/isa_*.h).
#pragma once

#include "../common/simd.h"

#include "../common/product.h"

#include "../common/access.h"
#include "../common/bit_product.h"
#include "edges.h"

#include "elementwise.h"
#include "statistics.h"

#include "dense_gradient.h"

#include "statistics_backward.h"

#include "../common/exponential.h"
#include "../common/linear.h"

#include "level_forward.h"

#include "level_backward.h"

namespace btinet {
namespace BTINET_ISA {

BTINET_INSTANTIATE_INTERACTION_PASSES(float)
BTINET_INSTANTIATE_INTERACTION_PASSES(double)
BTINET_INSTANTIATE_INTERACTION_PASSES(bfloat16)
BTINET_INSTANTIATE_LEVEL(float)
BTINET_INSTANTIATE_LEVEL(double)

}  // namespace BTINET_ISA
}  // namespace btinet
