#include "gates_prelude.h"

#include "../common/isa_portable.h"

#include "gates_kernels.h"
