// Half precision in the bits of a uint16_t, rounded to nearest even.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return x.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = uint16_t(__float_as_uint(x) >> 31 << 15);
  if (std::isnan(x)) return {0x7fff};
  if (std::fabs(x) >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent;
  std::frexp(x, &exponent);
  const int step = (exponent < -13 ? -13 : exponent) - 11;  // the last place is 2^step
  const int places = int(std::nearbyint(std::ldexp(std::fabs(x), -step)));
  return {uint16_t(sign | (((step + 24) << 10) + places))};
}
