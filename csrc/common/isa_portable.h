// What every machine can run: vectors of 16 bytes, in whatever instructions the compiler makes of them.
#define BTINET_ISA portable
#define BTINET_VECTOR_BYTES 16
#define BTINET_ROWS 4
#define BTINET_VECTORS 2
