#include "../common/prelude.h"
#include "batch_norm.h"

#if defined(__x86_64__)
#include "../common/isa_avx512.h"

#include "batch_norm_kernels.h"
#endif
