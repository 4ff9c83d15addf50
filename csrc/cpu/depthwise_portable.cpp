#include "../common/prelude.h"
#include "depthwise.h"

#include "../common/isa_portable.h"

#include "depthwise_kernels.h"
