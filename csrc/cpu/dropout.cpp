// Chooses the instruction set at run time.
#include "dropout.h"

#include "../common/instruction_set.h"

namespace btinet {

namespace avx512 {
BTINET_DECLARE_DROPOUT
}  // namespace avx512
namespace avx2 {
BTINET_DECLARE_DROPOUT
}  // namespace avx2
namespace portable {
BTINET_DECLARE_DROPOUT
}  // namespace portable

template <class S>
void dropout(const S* x, int64_t count, const Drop& drop, S* out, int threads) {
  BTINET_DISPATCH(dropout<S>(x, count, drop, out, threads));
}

BTINET_INSTANTIATE_DROPOUT(float)
BTINET_INSTANTIATE_DROPOUT(double)
BTINET_INSTANTIATE_DROPOUT(bfloat16)

}  // namespace btinet
