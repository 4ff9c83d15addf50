// The convolution of width 7 over maps [N] with zero padding, and its gradients, one row of positions at a time.
// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kTaps = 7;  // along x; along z and y one or seven
constexpr int64_t kPadding = kTaps / 2;

// The rows of some maps that one row of positions sees, with zeros on both sides; those outside are left out.
template <class T>
class MapRows {
 public:
  MapRows(const Shape& shape, const int64_t (&kernel)[2], int64_t maps)
      : size_{shape.size[0], shape.size[1], shape.size[2]},
        kernel_{kernel[0], kernel[1]},
        maps_(maps),
        stride_(padded<T>(shape.size[2]) + padded<T>(kTaps)) {
    data_.fill(maps * kernel[0] * kernel[1] * stride_, T(0));
  }

  // `maps`: of one sample, [maps, N]; `row`: number of the row of positions.
  void gather(const T* maps, int64_t row) {
    taps_.clear();
    const int64_t z = row / size_[1], y = row % size_[1];
    for (int64_t m = 0; m < maps_; ++m)
      for (int64_t kz = 0; kz < kernel_[0]; ++kz)
        for (int64_t ky = 0; ky < kernel_[1]; ++ky) {
          const int64_t from_z = z + kz - kernel_[0] / 2, from_y = y + ky - kernel_[1] / 2;
          if (from_z < 0 || from_z >= size_[0] || from_y < 0 || from_y >= size_[1]) continue;
          const T* from = maps + ((m * size_[0] + from_z) * size_[1] + from_y) * size_[2];
          std::copy(from, from + size_[2], data_.data() + count() * stride_ + kPadding);
          taps_.push_back(((m * kernel_[0] + kz) * kernel_[1] + ky) * kTaps);
        }
  }

  int64_t count() const { return int64_t(taps_.size()); }
  const T* row(int64_t i) const { return data_.data() + i * stride_; }
  int64_t taps(int64_t i) const { return taps_[i]; }  // where the weights of row i begin

 private:
  int64_t size_[3], kernel_[2], maps_, stride_;
  std::vector<int64_t> taps_;
  Scratch<T> data_;
};

// O convolutions of the gathered rows, V vectors of positions from x on: sum[o][v].
template <class T, int O, int V>
inline void convolve(const MapRows<T>& rows, const T* weights, int64_t of_output, int64_t x, Vector<T> (&sum)[O][V]) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t i = 0; i < rows.count(); ++i) {
    const T *from = rows.row(i) + x, *weight = weights + rows.taps(i);
    for (int64_t k = 0; k < kTaps; ++k) {
      Vector<T> value[V];
      for (int v = 0; v < V; ++v) value[v] = load(from + k + v * lanes);
      for (int o = 0; o < O; ++o)
        for (int v = 0; v < V; ++v) sum[o][v] += weight[o * of_output + k] * value[v];
    }
  }
}

// Calls finish(x, one vector for each of the O outputs, Whole or Part) for every vector of a row of `size` positions.
template <class T, int O, class F>
inline void convolve_row(const MapRows<T>& rows, const T* weights, int64_t of_output, int64_t size, const F& finish) {
  constexpr int64_t lanes = Lanes<T>::count;
  constexpr int V = 4;
  int64_t x = 0;
  for (; x + V * lanes <= size; x += V * lanes) {
    Vector<T> sum[O][V] = {};
    convolve<T, O, V>(rows, weights, of_output, x, sum);
    for (int v = 0; v < V; ++v) {
      Vector<T> outputs[O];
      for (int o = 0; o < O; ++o) outputs[o] = sum[o][v];
      finish(x + v * lanes, outputs, Whole{});
    }
  }
  const int64_t begin = x;
  for_each_vector<T>(size - begin, [&](int64_t i, auto part) {
    Vector<T> sum[O][1] = {}, outputs[O];
    convolve<T, O, 1>(rows, weights, of_output, begin + i, sum);
    for (int o = 0; o < O; ++o) outputs[o] = sum[o][0];
    finish(begin + i, outputs, part);
  });
}

// sums[tap] += products of the gathered rows and `gradient`, whose last vector is filled up with zeros.
template <class T>
inline void add_tap_products(const MapRows<T>& rows, const T* gradient, int64_t size, Vector<T>* sums) {
  for (int64_t i = 0; i < rows.count(); ++i) {
    Vector<T>* of_row = sums + rows.taps(i);
    Vector<T> sum[kTaps];
    for (int64_t k = 0; k < kTaps; ++k) sum[k] = of_row[k];
    for (int64_t x = 0; x < size; x += Lanes<T>::count) {
      const Vector<T> upstream = load(gradient + x);
      for (int64_t k = 0; k < kTaps; ++k) sum[k] += upstream * load(rows.row(i) + x + k);
    }
    for (int64_t k = 0; k < kTaps; ++k) of_row[k] = sum[k];
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
