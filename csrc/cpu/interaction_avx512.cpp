#include "interaction_prelude.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#define BTINET_ISA avx512
#define BTINET_VECTOR_BYTES 64
#define BTINET_ROWS 8
#define BTINET_VECTORS 3
#include "interaction_kernels.h"
#endif
