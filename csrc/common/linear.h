// Linear layers of a few samples and their gradients. Every thread of a team calls these functions; they share the work
// and do not wait for one another. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Dot products of R rows of `in` with O rows of `weight`, side by side.
template <class T, int R, int O>
inline void dot_block(const T* in, const T* weight, int64_t inputs, const T* bias, T* out, int64_t out_stride) {
  Vector<T> sum[R][O] = {};
  for_each_vector<T>(inputs, [&](int64_t i, auto part) {
    Vector<T> row[R];
    for (int r = 0; r < R; ++r) row[r] = load(in + r * inputs + i, part);
    for (int o = 0; o < O; ++o) {
      const Vector<T> column = load(weight + o * inputs + i, part);
      for (int r = 0; r < R; ++r) sum[r][o] += row[r] * column;
    }
  });
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) out[r * out_stride + o] = sum_of_lanes<T>(sum[r][o]) + (bias ? bias[o] : T(0));
}

template <class T, int O>
inline void dot_rows(const T* in, const T* weight, int64_t samples, int64_t inputs, const T* bias, T* out,
                     int64_t out_stride) {
  int64_t b = 0;
  for (; b + 4 <= samples; b += 4)
    dot_block<T, 4, O>(in + b * inputs, weight, inputs, bias, out + b * out_stride, out_stride);
  for (; b < samples; ++b) dot_block<T, 1, O>(in + b * inputs, weight, inputs, bias, out + b * out_stride, out_stride);
}

constexpr int64_t kOutputs = 4;  // of a linear layer, computed side by side

// The outputs [first, first + kOutputs) of `linear`, as far as there are so many.
template <class T>
void linear_block(const T* in, const T* weight, const T* bias, int64_t samples, int64_t outputs, int64_t inputs,
                  int64_t first, T* out) {
  const auto from = [&](int64_t o) { return bias ? bias + o : nullptr; };
  if (first + kOutputs <= outputs)
    return dot_rows<T, kOutputs>(in, weight + first * inputs, samples, inputs, from(first), out + first, outputs);
  for (int64_t o = first; o < outputs; ++o)
    dot_rows<T, 1>(in, weight + o * inputs, samples, inputs, from(o), out + o, outputs);
}

// out [samples, outputs] = in weight^T + bias, weight [outputs, inputs]; bias may be null.
template <class T>
void linear(const T* in, const T* weight, const T* bias, int64_t samples, int64_t outputs, int64_t inputs, T* out) {
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < outputs; first += kOutputs)
    linear_block(in, weight, bias, samples, outputs, inputs, first, out);
}

// out [rows, columns] = A B, or out += A B; B [inner, columns] is dense. The last columns may be less than a vector.
template <class T, bool kAdd>
void multiply_any(Left<T> a, const T* b, int64_t rows, int64_t inner, int64_t columns, int64_t first, int64_t wide,
                  T* out) {
  const int64_t whole = wide / Lanes<T>::count * Lanes<T>::count;
  multiply(a, Right<T>{b + first, columns}, rows, inner, whole, Store<T, kAdd>{out + first, columns});
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = first + whole; c < first + wide; ++c) {
      T sum = kAdd ? out[r * columns + c] : T(0);
      for (int64_t k = 0; k < inner; ++k) sum += a.data[r * a.row_step + k * a.inner_step] * b[k * columns + c];
      out[r * columns + c] = sum;
    }
}

// in_gradient [samples, inputs] = out_gradient weight, or += it.
template <class T, bool kAdd>
void linear_input_gradient(const T* out_gradient, const T* weight, int64_t samples, int64_t outputs, int64_t inputs,
                           T* in_gradient) {
  constexpr int64_t kColumns = kVectors * Lanes<T>::count;
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < inputs; first += kColumns)
    multiply_any<T, kAdd>(Left<T>{out_gradient, outputs, 1}, weight, samples, outputs, inputs, first,
                          std::min(kColumns, inputs - first), in_gradient);
}

// weight_gradient [outputs, inputs] = out_gradient^T in; bias_gradient [outputs] (or null) = its sum over the samples.
template <class T>
void linear_weight_gradient(const T* out_gradient, const T* in, int64_t samples, int64_t outputs, int64_t inputs,
                            T* weight_gradient, T* bias_gradient) {
#pragma omp for schedule(static) nowait
  for (int64_t o = 0; o < outputs; o += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, outputs - o);
    multiply_any<T, false>(Left<T>{out_gradient + o, 1, outputs}, in, rows, samples, inputs, 0, inputs,
                           weight_gradient + o * inputs);
    for (int64_t r = o; bias_gradient && r < o + rows; ++r) {
      T sum = 0;
      for (int64_t b = 0; b < samples; ++b) sum += out_gradient[b * outputs + r];
      bias_gradient[r] = sum;
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
