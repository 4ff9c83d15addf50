#include "interaction_prelude.h"

#define BTINET_ISA portable
#define BTINET_VECTOR_BYTES 16
#define BTINET_ROWS 4
#define BTINET_VECTORS 2
#include "interaction_kernels.h"
