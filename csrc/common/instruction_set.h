// Which instruction set serves this machine, and calls into what was compiled for it.
#pragma once

#include <cstring>

namespace btinet {

// "avx512", "avx2" or "portable".
const char* instruction_set();

// Whether the instruction set is "avx512" and the machine also sums products of pairs of bfloat16 (AVX512_BF16).
bool multiplies_bfloat16();

}  // namespace btinet

#if defined(__x86_64__)
#define BTINET_DISPATCH(call)                             \
  do {                                                    \
    if (std::strcmp(instruction_set(), "avx512") == 0)    \
      avx512::call;                                       \
    else if (std::strcmp(instruction_set(), "avx2") == 0) \
      avx2::call;                                         \
    else                                                  \
      portable::call;                                     \
  } while (0)
#else
#define BTINET_DISPATCH(call) portable::call
#endif
