// AVX-512 with products of pairs of bfloat16; only for tensors stored as such. Included after every header from
// outside: from here on the compiler may use it.
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#define BTINET_ISA avx512bf16
#define BTINET_BFLOAT16_DOT 1
#define BTINET_VECTOR_BYTES 64
#define BTINET_ROWS 8
#define BTINET_VECTORS 3
