// Adds up partial results in a fixed order.
#pragma once

#include <cstdint>

namespace btinet {
namespace cuda {

struct Parts {
  const float* values;  // [groups, count, width]
  int64_t groups;
  int64_t count;
  int64_t width;
};

// out[groups, width]
void sum_parts(const Parts& parts, float* out, void* stream);

}  // namespace cuda
}  // namespace btinet
