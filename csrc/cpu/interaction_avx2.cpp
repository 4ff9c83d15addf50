#include "interaction_prelude.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define BTINET_ISA avx2
#define BTINET_VECTOR_BYTES 32
#define BTINET_ROWS 4
#define BTINET_VECTORS 3
#include "interaction_kernels.h"
#endif
