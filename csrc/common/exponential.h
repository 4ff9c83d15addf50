// The exponential function and the sigmoid of vectors. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// e^x: float by a polynomial around the nearest power of two (relative error 2e-7, x held within ±87), double by the
// library.
inline Vector<float> exponential(Vector<float> x) {
  using bits = typename Lanes<float>::bits;
  constexpr float kInLowBits = 0x1.8p23f + 127;  // adding it rounds to whole numbers, kept in the lowest bits
  const Vector<float> bounded = x < -87.0f ? broadcast(-87.0f) : x > 87.0f ? broadcast(87.0f) : x;
  const Vector<float> shifted = bounded * 1.44269504f + kInLowBits;
  const Vector<float> whole = shifted - kInLowBits, power = Vector<float>(bits(shifted) << 23);
  const Vector<float> rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  Vector<float> sum = broadcast(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + factor;
  return sum * power;
}

inline Vector<double> exponential(Vector<double> x) {
  for (int64_t i = 0; i < Lanes<double>::count; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class T>
inline Vector<T> sigmoid(Vector<T> x) {
  return reciprocal<T>(T(1) + exponential(-x));
}

}  // namespace BTINET_ISA
}  // namespace btinet
