#include "../common/prelude.h"
#include "upsampling.h"

#if defined(__x86_64__)
#include "../common/isa_avx512.h"

#include "upsampling_kernels.h"
#endif
