// Matrices cut into panels of columns, as wide as the register block of a product, so that a product reads memory in
// one stream. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

template <class T>
class Panels {
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
  void clear(int64_t panel) { std::fill_n(this->panel(panel), rows_ * kWidth, T(0)); }
  T* panel(int64_t panel) { return &data_[panel * rows_ * kWidth]; }
  // Where the vector of columns that starts at `column` lies in row 0; rows lie kWidth apart.
  T* at(int64_t column) { return panel(column / kWidth) + column % kWidth; }
  Right<T> right(int64_t panel, int64_t first_row = 0) const {
    return {&data_[(panel * rows_ + first_row) * kWidth], kWidth};
  }

 private:
  int64_t rows_, columns_, count_;
  Scratch<T> data_;
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
template <class T>
void multiply_panels(Left<T> a, const Panels<T>& b, int64_t first, int64_t count, int64_t rows, const T* bias, T* out,
                     int64_t stride) {
  for (int64_t k = 0; k < count; k += kInner) {
    const int64_t inner = std::min(kInner, count - k);
    const Left<T> left{a.data + k * a.inner_step, a.row_step, a.inner_step};
    for (int64_t p = 0; p < b.count(); ++p) {
      const Right<T> right = b.right(p, first + k);
      T* to = out + b.first_column(p);
      if (k == 0)
        multiply(left, right, rows, inner, b.width(p), StoreSum<T>{bias + b.first_column(p), to, stride});
      else
        multiply(left, right, rows, inner, b.width(p), AddTo<T>{to, stride});
    }
  }
}

template <class T>
void multiply_panels(Left<T> a, const Panels<T>& b, int64_t rows, const T* bias, T* out, int64_t stride) {
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

// A vector of `count` values with zeros up to whole vectors.
template <class T>
void copy_padded(const T* values, int64_t count, Scratch<T>& out) {
  out.fill(padded<T>(count), T(0));
  std::copy_n(values, count, out.data());
}

}  // namespace BTINET_ISA
}  // namespace btinet
