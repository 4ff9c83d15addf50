#include "../common/prelude.h"
#include "segmentation_loss.h"

#if defined(__x86_64__)
#include "../common/isa_avx2.h"

#include "segmentation_loss_kernels.h"
#endif
