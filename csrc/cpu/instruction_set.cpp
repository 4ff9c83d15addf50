#include "../common/instruction_set.h"

#include <cstdlib>

namespace btinet {

namespace {

// BTINET_INSTRUCTION_SET=avx512, =avx2 or =portable asks for less than the machine has, to test or to compare.
bool is_asked_for(const char* name) {
  const char* wanted = std::getenv("BTINET_INSTRUCTION_SET");
  return wanted && std::strcmp(wanted, name) == 0;
}

const char* best_instruction_set() {
#if defined(__x86_64__)
  const bool portable = is_asked_for("portable"), at_most_avx2 = is_asked_for("avx2");
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

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool does = std::strcmp(instruction_set(), "avx512") == 0 && !is_asked_for("avx512") &&
                           __builtin_cpu_supports("avx512bf16");
  return does;
#else
  return false;
#endif
}

}  // namespace btinet
