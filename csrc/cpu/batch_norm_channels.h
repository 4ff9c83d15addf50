// What batch normalisation does to one vector of values, and the constants of its channels. Compiled once per
// instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

struct Identity {
  template <class T>
  static Vector<T> of(Vector<T> z) {
    return z;
  }
  // The gradient of z where `grad` is that of the activation.
  template <class T>
  static Vector<T> gradient(Vector<T>, Vector<T> grad) {
    return grad;
  }
};

struct ReLU {
  template <class T>
  static Vector<T> of(Vector<T> z) {
    return larger<T>(Vector<T>{}, z);
  }
  template <class T>
  static Vector<T> gradient(Vector<T> z, Vector<T> grad) {
    return z <= T(0) ? Vector<T>{} : grad;  // a NaN lets the gradient through, as in ATen
  }
};

struct SiLU {
  template <class T>
  static Vector<T> of(Vector<T> z) {
    return z * sigmoid<T>(z);
  }
  template <class T>
  static Vector<T> gradient(Vector<T> z, Vector<T> grad) {
    const Vector<T> share = sigmoid<T>(z);
    return grad * (share + z * share * (T(1) - share));
  }
};

template <class F>
void with_activation(Activation act, const F& f) {
  switch (act) {
    case Activation::identity:
      return f(Identity{});
    case Activation::relu:
      return f(ReLU{});
    case Activation::silu:
      return f(SiLU{});
  }
}

// What some channels are normalised with, and the gradient through their moments.
template <class T>
struct Constants {
  Vector<T> mean, scale, bias, slope, shift;

  Vector<T> centred(Vector<T> x) const { return x - mean; }
  Vector<T> normalised(Vector<T> centred) const { return centred * scale + bias; }
  Vector<T> gradient(Vector<T> centred, Vector<T> d_z) const { return scale * d_z - (slope * centred + shift); }
};

// The constants of all channels, in whole vectors.
template <class T>
class ConstantsTable {
 public:
  explicit ConstantsTable(int64_t channels) : stride_(padded<T>(channels)) { values_.fill(5 * stride_, T(0)); }

  void set_forward(int64_t c, const NormWeights<T>& weights, T mean, T variance) {
    at(kMean, c) = mean;
    at(kScale, c) = (weights.weight ? weights.weight[c] : T(1)) * T(inverse_deviation(weights, variance));
    at(kBias, c) = weights.bias ? weights.bias[c] : T(0);
  }
  // The sums of d_z and of d_z (x - mean), over `count` positions.
  void set_backward(int64_t c, const NormWeights<T>& weights, T variance, double sum, double product, double count) {
    const double scale = at(kScale, c), inverse = inverse_deviation(weights, variance);
    at(kSlope, c) = T(scale * inverse * inverse * product / count);
    at(kShift, c) = T(scale * sum / count);
  }
  static double inverse_deviation(const NormWeights<T>& weights, T variance) {
    return 1 / std::sqrt(double(variance) + weights.eps);
  }

  // Of the vector of channels at c.
  Constants<T> channels(int64_t c) const {
    const T* from = values_.data() + c;
    return {load(from + kMean * stride_), load(from + kScale * stride_), load(from + kBias * stride_),
            load(from + kSlope * stride_), load(from + kShift * stride_)};
  }
  // Of channel c in every lane.
  Constants<T> channel(int64_t c) const {
    const T* from = values_.data() + c;
    return {broadcast(from[kMean * stride_]), broadcast(from[kScale * stride_]), broadcast(from[kBias * stride_]),
            broadcast(from[kSlope * stride_]), broadcast(from[kShift * stride_])};
  }

 private:
  static constexpr int kMean = 0, kScale = 1, kBias = 2, kSlope = 3, kShift = 4;
  T& at(int which, int64_t c) { return values_[which * stride_ + c]; }
  int64_t stride_;
  Scratch<T> values_;
};

}  // namespace BTINET_ISA
}  // namespace btinet
