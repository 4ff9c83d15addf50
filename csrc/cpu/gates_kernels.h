// The passes, compiled once per instruction set (common/isa_*.h).
#pragma once

#include "../common/simd.h"

#include "../common/product.h"

#include "../common/access.h"
#include "../common/exponential.h"
#include "../common/linear.h"
#include "../common/panels.h"
#include "../common/pieces.h"

#include "dual_path_planes.h"
#include "dual_path_rows.h"
#include "map_convolution.h"

#include "dual_path_plan.h"

#include "dual_path_backward.h"
#include "dual_path_forward.h"
#include "joint_projection.h"
#include "position_gate.h"

namespace btinet {
namespace BTINET_ISA {

BTINET_INSTANTIATE_GATES(float)
BTINET_INSTANTIATE_GATES(double)
BTINET_INSTANTIATE_GATES(bfloat16)

}  // namespace BTINET_ISA
}  // namespace btinet
