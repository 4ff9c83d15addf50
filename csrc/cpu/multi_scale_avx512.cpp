#include "../common/prelude.h"
#include "multi_scale.h"

#if defined(__x86_64__)
#include "../common/isa_avx512.h"

#include "multi_scale_kernels.h"
#endif
