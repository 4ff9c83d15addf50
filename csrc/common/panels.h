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

  int64_t count() const { return count_; }
  // Whole vectors of columns in a panel; only the last may have fewer than kWidth.
  int64_t width(int64_t panel) const { return std::min(kWidth, columns_ - panel * kWidth); }
  int64_t first_column(int64_t panel) const { return panel * kWidth; }
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

}  // namespace BTINET_ISA
}  // namespace btinet
