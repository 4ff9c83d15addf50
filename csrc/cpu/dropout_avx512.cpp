#include "../common/prelude.h"
#include "dropout.h"

#if defined(__x86_64__)
#include "../common/isa_avx512.h"

#include "dropout_kernels.h"
#endif
