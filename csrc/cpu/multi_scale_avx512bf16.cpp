// Only what products of bfloat16 make faster: the forward.
#include "../common/prelude.h"
#include "multi_scale.h"

#if defined(__x86_64__)
#include "../common/isa_avx512bf16.h"

#include "../common/simd.h"

#include "../common/product.h"

#include "../common/access.h"

#include "../common/bands.h"
#include "../common/panels.h"
#include "../common/turned_product.h"
#include "dilated.h"

#include "multi_scale_forward.h"

namespace btinet {
namespace avx512bf16 {

template void multi_scale<bfloat16>(const View<const bfloat16>&, const ScaleWeights<float>&, const View<bfloat16>&,
                                    const View<bfloat16>&, const Finish<float>&, int);

}  // namespace avx512bf16
}  // namespace btinet
#endif
