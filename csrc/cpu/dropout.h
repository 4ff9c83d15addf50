// Dropout of n values that lie side by side, as btinet_kernels/dropout/reference.py defines it: value 64 k + 16 j + l
// becomes 0 where word j of Philox4x32-10 of the counter 16 k + l lies below the threshold, else it is multiplied.
#pragma once

#include <cstdint>

#include "../common/bfloat16.h"

namespace btinet {

struct Drop {
  uint64_t seed;
  uint64_t threshold;  // at most 2^32
  double factor;
};

#define BTINET_DECLARE_DROPOUT \
  template <class S>           \
  void dropout(const S* x, int64_t count, const Drop& drop, S* out, int threads);

BTINET_DECLARE_DROPOUT

#define BTINET_INSTANTIATE_DROPOUT(S) template void dropout<S>(const S*, int64_t, const Drop&, S*, int);

}  // namespace btinet
