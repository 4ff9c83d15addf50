#include "../common/prelude.h"
#include "multi_scale.h"

#include "../common/isa_portable.h"

#include "multi_scale_kernels.h"
