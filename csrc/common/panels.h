// Matrices cut into panels of columns, as wide as the register block of a product, so that a product reads memory in
// one stream. Panels of bfloat16 have an even number of rows, two by two as products take them. Compiled once per
// instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

template <class F>
class Panels {
  using T = Compute<F>;

 public:
  static constexpr int64_t kWidth = kVectors * Lanes<T>::count;

  Panels(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(padded<T>(columns)),
        count_((columns_ + kWidth - 1) / kWidth),
        data_(count_ * rows * kWidth) {}

  int64_t rows() const { return rows_; }
  int64_t count() const { return count_; }
  // Whole vectors of columns in a panel; only the last may have fewer than kWidth.
  int64_t width(int64_t panel) const { return std::min(kWidth, columns_ - panel * kWidth); }
  int64_t first_column(int64_t panel) const { return panel * kWidth; }
  void clear(int64_t panel) { std::fill_n(this->panel(panel), rows_ * kWidth, F{}); }
  F* panel(int64_t panel) { return &data_[panel * rows_ * kWidth]; }
  // Where the vector of columns that starts at `column` lies in row 0; rows lie kWidth apart. Not of bfloat16.
  T* at(int64_t column) { return panel(column / kWidth) + column % kWidth; }
  Right<F> right(int64_t panel, int64_t first_row = 0) const {
    return {&data_[(panel * rows_ + first_row) * kWidth], kTogether<F> * kWidth};
  }

 private:
  int64_t rows_, columns_, count_;
  Scratch<F> data_;
};

// The rows of a transposed left operand, as many side by side as the register block has.
template <class T>
class Strips {
 public:
  Strips(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), data_((columns + kRows - 1) / kRows * kRows * rows) {}

  int64_t columns() const { return columns_; }
  // Copies `count` rows of values into the rows from `first` on.
  void set_rows(int64_t first, int64_t count, const T* values, int64_t stride) {
    for (int64_t c = 0; c < columns_; c += kRows) {
      T* strip = &data_[(c * rows_) + first * kRows];
      const int64_t wide = std::min<int64_t>(kRows, columns_ - c);
      for (int64_t r = 0; r < count; ++r, strip += kRows) {
        const T* from = values + r * stride + c;
        if (wide == kRows) {
          std::memcpy(strip, from, kRows * sizeof(T));
        } else {
          std::fill_n(strip, kRows, T(0));
          std::copy_n(from, wide, strip);
        }
      }
    }
  }
  // The columns from `column` on, a whole number of kRows, as rows of a left operand.
  Left<T> left(int64_t column, int64_t first_row) const {
    return {&data_[column * rows_ + first_row * kRows], 1, kRows};
  }

 private:
  int64_t rows_, columns_;
  Scratch<T> data_;
};

// out = product + bias, whole vectors.
template <class T>
struct StoreSum {
  using vector = Vector<T>;
  const T* bias;
  T* out;
  int64_t stride;

  vector start(int64_t, int64_t column) const { return load(bias + column); }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    for (int r = 0; r < R; ++r) store(out + (row + r) * stride + column, sum[r]);
  }
};

// out += product: the sums over a piece of the inner dimension are added up before they meet the total.
template <class T>
struct AddTo {
  using vector = Vector<T>;
  T* out;
  int64_t stride;

  vector start(int64_t, int64_t) const { return vector{}; }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    for (int r = 0; r < R; ++r) {
      T* to = out + (row + r) * stride + column;
      store(to, load(to) + sum[r]);
    }
  }
};

constexpr int64_t kInner = 1024;  // rows of a panel that stay in the second cache while they are used

// out [rows, columns of b] = a b + bias, b: the rows [first, first + count) of the panels.
template <class F, class T>
void multiply_panels(Left<F> a, const Panels<F>& b, int64_t first, int64_t count, int64_t rows, const T* bias, T* out,
                     int64_t stride) {
  for (int64_t k = 0; k < count; k += kInner) {
    const int64_t inner = std::min(kInner, count - k);
    const Left<F> left{a.data + k * a.inner_step, a.row_step, a.inner_step};
    for (int64_t p = 0; p < b.count(); ++p) {
      const Right<F> right = b.right(p, first + k);
      T* to = out + b.first_column(p);
      if (k == 0)
        multiply(left, right, rows, inner, b.width(p), StoreSum<T>{bias + b.first_column(p), to, stride});
      else
        multiply(left, right, rows, inner, b.width(p), AddTo<T>{to, stride});
    }
  }
}

template <class F, class T>
void multiply_panels(Left<F> a, const Panels<F>& b, int64_t rows, const T* bias, T* out, int64_t stride) {
  multiply_panels(a, b, 0, b.rows(), rows, bias, out, stride);
}

// Panel p from row `first_row` on = columns of the transposed matrix [columns, count].
template <class T>
void fill_transposed(Panels<T>& panels, int64_t p, int64_t first_row, const T* matrix, int64_t stride, int64_t columns,
                     int64_t count) {
  const int64_t first = panels.first_column(p);
  transpose(matrix + first * stride, stride, std::min(panels.kWidth, columns - first), count,
            panels.panel(p) + first_row * panels.kWidth, panels.kWidth);
}

#ifdef BTINET_BFLOAT16_DOT
// The same of bfloat16: pairs of neighbours in a row of the matrix are transposed as if they were one value.
inline void fill_transposed(Panels<bfloat16>& panels, int64_t p, int64_t first_row, const float* matrix, int64_t stride,
                            int64_t columns, int64_t count) {
  constexpr int64_t lanes = Lanes<float>::count;
  const int64_t first = panels.first_column(p), last = std::min(first + panels.kWidth, columns);
  for (int64_t column = first; column < last; column += lanes)
    for (int64_t k = 0; k < count; k += 2 * lanes) {
      Vector<float> block[lanes] = {};
      for (int64_t i = 0; i < std::min(lanes, last - column); ++i) {
        bfloat16 pairs[2 * lanes] = {};
        const float* row = matrix + (column + i) * stride + k;
        for_each_vector<float>(std::min(2 * lanes, count - k),
                               [&](int64_t c, auto part) { store(pairs + c, load(row + c, part)); });
        std::memcpy(&block[i], pairs, sizeof(pairs));
      }
      transpose<float>(block);
      bfloat16* to = panels.panel(p) + (first_row + k) * panels.kWidth + 2 * (column - first);
      for (int64_t i = 0; i < std::min(lanes, (count - k + 1) / 2); ++i)
        std::memcpy(to + i * 2 * panels.kWidth, &block[i], sizeof(block[i]));
    }
}
#endif

// Rows of whole vectors as a left operand; `rounded` receives them where factors are of another type.
template <class F>
Left<F> as_factors(const Compute<F>* rows, int64_t count, int64_t stride, Scratch<F>& rounded) {
  if constexpr (std::is_same_v<F, Compute<F>>) {
    return {rows, stride, 1};
  } else {
    rounded.resize(count * stride);
    for (int64_t i = 0; i < count * stride; i += Lanes<Compute<F>>::count) store(&rounded[i], load(rows + i));
    return {rounded.data(), stride, 1};
  }
}

// The same of a buffer that all threads share; called by every one of them.
template <class F>
const F* as_shared_factors(const Compute<F>* values, int64_t count, Scratch<F>& rounded) {
  if constexpr (std::is_same_v<F, Compute<F>>) {
    return values;
  } else {
    constexpr int64_t lanes = Lanes<Compute<F>>::count;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i += lanes) store(&rounded[i], load(values + i));
    return rounded.data();
  }
}

// A vector of `count` values with zeros up to whole vectors.
template <class T>
void copy_padded(const T* values, int64_t count, Scratch<T>& out) {
  out.fill(padded<T>(count), T(0));
  std::copy_n(values, count, out.data());
}

}  // namespace BTINET_ISA
}  // namespace btinet
