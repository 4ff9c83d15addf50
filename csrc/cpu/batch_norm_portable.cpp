#include "../common/prelude.h"
#include "batch_norm.h"

#include "../common/isa_portable.h"

#include "batch_norm_kernels.h"
