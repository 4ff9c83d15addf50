#include "../common/prelude.h"
#include "depthwise.h"

#if defined(__x86_64__)
#include "../common/isa_avx2.h"

#include "depthwise_kernels.h"
#endif
