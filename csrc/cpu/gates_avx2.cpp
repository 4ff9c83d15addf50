#include "gates_prelude.h"

#if defined(__x86_64__)
#include "../common/isa_avx2.h"

#include "gates_kernels.h"
#endif
