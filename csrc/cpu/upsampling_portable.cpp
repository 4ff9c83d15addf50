#include "../common/prelude.h"
#include "upsampling.h"

#include "../common/isa_portable.h"

#include "upsampling_kernels.h"
