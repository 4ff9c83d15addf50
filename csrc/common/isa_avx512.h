// Included after every header from outside: from here on the compiler may use AVX-512.
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#define BTINET_ISA avx512
#define BTINET_VECTOR_BYTES 64
#define BTINET_ROWS 8
#define BTINET_VECTORS 3
