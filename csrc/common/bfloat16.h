// The storage type bfloat16, and the type that values of a storage type are computed in.
#pragma once

#include <cstdint>
#include <cstring>

namespace btinet {

struct bfloat16 {
  uint16_t bits;

  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }

  // Rounds to the nearest, ties to even; a NaN stays one.
  static bfloat16 rounded(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    wide = value == value ? wide + 0x7fffu + ((wide >> 16) & 1u) : wide | 0x400000u;
    return {uint16_t(wide >> 16)};
  }
};

template <class S>
struct ComputeType {
  using type = S;
};
template <>
struct ComputeType<bfloat16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeType<S>::type;

template <class S>
inline S stored(Compute<S> value) {
  return value;
}
template <>
inline bfloat16 stored<bfloat16>(float value) {
  return bfloat16::rounded(value);
}

}  // namespace btinet
