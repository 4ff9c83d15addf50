// The product of a few rows with a large transposed matrix: a panel of its columns is turned around once, used for all
// rows while it is in the second cache, and forgotten, so that the matrix is read from memory once and written nowhere.
// The sums are those of multiply_panels. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Matrices [columns, count], side by side and transposed: element (i * rows + k, j) is parts[i][j * stride + k], and 0
// for k from `count` to `rows`, which is a whole number of vectors.
template <class T>
struct Turned {
  const T* const* parts;
  int number;
  int64_t stride, columns, count, rows;

  int64_t inner() const { return number * rows; }
};

// What the rows of a product start from: `positions` rows share one.
template <class T>
struct RowBias {
  const T* data;
  int64_t stride, positions;

  const T* of(int64_t row) const { return data + row / positions * stride; }
};

// out = product + bias, where the bias differs between rows.
template <class T>
struct StoreRowSum {
  using vector = Vector<T>;
  const RowBias<T>& bias;
  int64_t first_column;
  T* out;
  int64_t stride;

  vector start(int64_t row, int64_t column) const { return load(bias.of(row) + first_column + column); }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    for (int r = 0; r < R; ++r) store(out + (row + r) * stride + column, sum[r]);
  }
};

// Rows [first, first + count) of the only panel of `piece` = those of panel p of the matrix.
template <class F, class T>
void fill_piece(Panels<F>& piece, const Turned<T>& matrix, int64_t p, int64_t first, int64_t count) {
  const int64_t column = p * Panels<F>::kWidth, columns = std::min(Panels<F>::kWidth, matrix.columns - column);
  piece.clear(0);
  for (int i = 0; i < matrix.number; ++i) {
    const int64_t offset = i * matrix.rows;
    const int64_t begin = std::max(first, offset), end = std::min(first + count, offset + matrix.count);
    if (begin >= end) continue;
    fill_transposed(piece, 0, begin - first, matrix.parts[i] + column * matrix.stride + begin - offset, matrix.stride,
                    columns, end - begin);
  }
}

template <class T>
int64_t turned_panels(const Turned<T>& matrix) {
  return (padded<T>(matrix.columns) + Panels<T>::kWidth - 1) / Panels<T>::kWidth;
}

// out [rows, columns] = left [rows, inner] matrix + bias. Called by every thread.
template <class F, class T>
void multiply_turned(const F* left, int64_t rows, const Turned<T>& matrix, const RowBias<T>& bias, T* out,
                     int64_t stride) {
  const int64_t inner = matrix.inner(), panels = turned_panels(matrix);
  Panels<F> piece(std::min(kInner, inner), Panels<F>::kWidth);
#pragma omp for schedule(static)
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t column = p * Panels<F>::kWidth;
    const int64_t width = std::min(Panels<F>::kWidth, padded<T>(matrix.columns) - column);
    for (int64_t k = 0; k < inner; k += kInner) {
      const int64_t count = std::min(kInner, inner - k);
      fill_piece(piece, matrix, p, k, count);
      const Left<F> a{left + k, inner, 1};
      if (k == 0)
        multiply(a, piece.right(0), rows, count, width, StoreRowSum<T>{bias, column, out + column, stride});
      else
        multiply(a, piece.right(0), rows, count, width, AddTo<T>{out + column, stride});
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
