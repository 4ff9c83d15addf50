#include "interaction_prelude.h"

#include "../common/isa_portable.h"

#include "interaction_kernels.h"
