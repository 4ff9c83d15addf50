#include "../common/instruction_set.h"

#include <cstdlib>

namespace btinet {

namespace {

const char* best_instruction_set() {
#if defined(__x86_64__)
  // BTINET_INSTRUCTION_SET=avx2 or =portable asks for less than the machine has, to test or to compare.
  const char* wanted = std::getenv("BTINET_INSTRUCTION_SET");
  const bool portable = wanted && std::strcmp(wanted, "portable") == 0;
  const bool at_most_avx2 = wanted && std::strcmp(wanted, "avx2") == 0;
  if (!portable && !at_most_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return "avx512";
  if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

}  // namespace

const char* instruction_set() {
  static const char* const name = best_instruction_set();
  return name;
}

}  // namespace btinet
