#include "../common/prelude.h"
#include "dropout.h"

#include "../common/isa_portable.h"

#include "dropout_kernels.h"
