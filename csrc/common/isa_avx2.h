// Included after every header from outside: from here on the compiler may use AVX2.
#pragma GCC target("avx2,fma")
#define BTINET_ISA avx2
#define BTINET_VECTOR_BYTES 32
#define BTINET_ROWS 4
#define BTINET_VECTORS 3
