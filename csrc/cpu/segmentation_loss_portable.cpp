#include "../common/prelude.h"
#include "segmentation_loss.h"

#include "../common/isa_portable.h"

#include "segmentation_loss_kernels.h"
