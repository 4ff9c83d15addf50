// A small register-blocked matrix product whose epilogues do ReLU, pooling and masks. Factors are of the type that is
// computed in, or, where the instruction set sums the products of pairs of them (BTINET_BFLOAT16_DOT), bfloat16.
// Compiled once per instruction set: the including file has set BTINET_ISA and the register block BTINET_ROWS x
// BTINET_VECTORS.
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int kRows = BTINET_ROWS;
constexpr int kVectors = BTINET_VECTORS;

// What the factors of products are where tensors are stored as S.
#ifdef BTINET_BFLOAT16_DOT
template <class S>
using Factor = S;
#else
template <class S>
using Factor = Compute<S>;
#endif

// Neighbours along the inner dimension that lie side by side in both operands, and are summed up by one instruction.
template <class F>
constexpr int64_t kTogether = std::is_same_v<F, bfloat16> ? 2 : 1;

// The left operand of a product: element (r, k) lies at data[r * row_step + k * inner_step]; inner_step of bfloat16: 1.
template <class T>
struct Left {
  const T* data;
  int64_t row_step;
  int64_t inner_step;
};

// The right operand: element (k, j) lies at data[k * stride + j], and its rows are whole vectors. Of bfloat16, a row
// holds two: element (k, j) at data[k / 2 * stride + 2 * j + k % 2].
template <class T>
struct Right {
  const T* data;
  int64_t stride;
};

// A block of R rows and V vectors of columns of the product stays in registers; `finish` starts it and disposes of it.
template <class F, int R, int V, class Finish>
inline void multiply_block(Left<F> a, Right<F> b, int64_t inner, int64_t row, int64_t column, const Finish& finish) {
  using T = Compute<F>;
  using vector = typename Lanes<T>::vector;
  constexpr int64_t lanes = Lanes<T>::count;
  const F *left = a.data + row * a.row_step, *right = b.data + column * kTogether<F>;
  vector sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = finish.start(row + r, column + v * lanes);
#ifdef BTINET_BFLOAT16_DOT
  if constexpr (kTogether<F> == 2) {
    for (int64_t k = 0; k < inner; k += 2) {
      __m512bh columns[V];
      for (int v = 0; v < V; ++v)
        columns[v] = __m512bh(_mm512_loadu_si512(right + k / 2 * b.stride + v * 2 * lanes));
      for (int r = 0; r < R; ++r) {
        int pair;
        std::memcpy(&pair, left + r * a.row_step + k, sizeof(pair));
        for (int v = 0; v < V; ++v)
          sum[r][v] = vector(_mm512_dpbf16_ps(__m512(sum[r][v]), __m512bh(_mm512_set1_epi32(pair)), columns[v]));
      }
    }
  } else
#endif
    for (int64_t k = 0; k < inner; ++k) {
      vector columns[V];
      for (int v = 0; v < V; ++v) columns[v] = *reinterpret_cast<const vector*>(right + k * b.stride + v * lanes);
      for (int r = 0; r < R; ++r) {
        const T factor = left[r * a.row_step + k * a.inner_step];
        for (int v = 0; v < V; ++v) sum[r][v] += factor * columns[v];
      }
    }
  for (int v = 0; v < V; ++v) {
    vector of_rows[R];
    for (int r = 0; r < R; ++r) of_rows[r] = sum[r][v];
    finish.template end<R>(row, column + v * lanes, of_rows);
  }
}

template <class F, int R, class Finish>
inline void multiply_rows(Left<F> a, Right<F> b, int64_t inner, int64_t row, int64_t columns, const Finish& finish) {
  constexpr int64_t lanes = Lanes<Compute<F>>::count;
  int64_t j = 0;
  for (; j + kVectors * lanes <= columns; j += kVectors * lanes)
    multiply_block<F, R, kVectors>(a, b, inner, row, j, finish);
  for (; j + 2 * lanes <= columns; j += 2 * lanes) multiply_block<F, R, 2>(a, b, inner, row, j, finish);
  for (; j < columns; j += lanes) multiply_block<F, R, 1>(a, b, inner, row, j, finish);
}

// The product of A [rows, inner] and B [inner, columns]; `columns` is a whole number of vectors; `inner`, of bfloat16,
// is even.
template <class F, class Finish>
void multiply(Left<F> a, Right<F> b, int64_t rows, int64_t inner, int64_t columns, const Finish& finish) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) multiply_rows<F, kRows>(a, b, inner, r, columns, finish);
  for (; r + kRows / 2 <= rows; r += kRows / 2) multiply_rows<F, kRows / 2>(a, b, inner, r, columns, finish);
  for (; r < rows; ++r) multiply_rows<F, 1>(a, b, inner, r, columns, finish);
}

template <class T>
inline typename Lanes<T>::vector& vector_at(T* data) {
  return *reinterpret_cast<typename Lanes<T>::vector*>(data);
}

template <class T>
inline const typename Lanes<T>::vector& vector_at(const T* data) {
  return *reinterpret_cast<const typename Lanes<T>::vector*>(data);
}

// out += product, or out = product.
template <class T, bool kAdd>
struct Store {
  using vector = typename Lanes<T>::vector;
  T* out;
  int64_t stride;

  vector start(int64_t row, int64_t column) const { return kAdd ? vector_at(out + row * stride + column) : vector{}; }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    for (int r = 0; r < R; ++r) vector_at(out + (row + r) * stride + column) = sum[r];
  }
};

// out = ReLU(product + bias).
template <class T>
struct StoreReLU {
  using vector = typename Lanes<T>::vector;
  const T* bias;
  T* out;
  int64_t stride;

  vector start(int64_t, int64_t column) const { return vector_at(bias + column); }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    for (int r = 0; r < R; ++r) vector_at(out + (row + r) * stride + column) = sum[r] < T(0) ? vector{} : sum[r];
  }
};

// total += ReLU(product + bias), summed over the rows: the product itself never reaches memory. Where it is positive,
// a bit is set: bit j % 8 of byte j / 8 of a row of `active`.
template <class T, bool kBits>
struct PoolReLU {
  using vector = typename Lanes<T>::vector;
  const T* bias;
  T* total;
  uint8_t* active;
  int64_t active_bytes;  // of a row

  vector start(int64_t, int64_t column) const { return vector_at(bias + column); }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    constexpr int64_t lanes = Lanes<T>::count;
    vector pooled = vector_at(total + column);
    for (int r = 0; r < R; ++r) {
      pooled += sum[r] < T(0) ? vector{} : sum[r];  // lets NaN through, as torch does
      if (!kBits) continue;
      const uint32_t bits = positive_lanes<T>(sum[r]);
      if (column / 8 >= active_bytes) continue;  // the padding of the last vector
      uint8_t* byte = active + (row + r) * active_bytes + column / 8;
      *byte = column % 8 == 0 ? uint8_t(bits) : uint8_t(*byte | bits << column % 8);
      if (lanes == 16 && column / 8 + 1 < active_bytes) byte[1] = uint8_t(bits >> 8);
    }
    vector_at(total + column) = pooled;
  }
};

}  // namespace BTINET_ISA
}  // namespace btinet
