// How passes reach the values of a view: by position, by tile, as operands of a product, or element by element.
// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kTile = 48;  // positions a tile holds

// Where each position of a view lies, and which positions have a successor along each axis.
template <class T>
class Positions {
 public:
  explicit Positions(const Shape& shape) {
    step_[2] = 1;
    step_[1] = shape.size[2];
    step_[0] = shape.size[2] * shape.size[1];
    const int64_t n = shape.positions();
    for (int d = 0; d < 3; ++d) {
      if (shape.size[d] < 2) continue;
      axes_.push_back(d);
      has_next_[d].resize(n);
      for (int64_t i = 0; i < n; ++i) has_next_[d][i] = i / step_[d] % shape.size[d] + 1 < shape.size[d] ? T(1) : T(0);
    }
  }

  // The axes along which a position can have a neighbour, 0 to 3 of them.
  const std::vector<int>& axes() const { return axes_; }
  int64_t step(int d) const { return step_[d]; }
  const T* has_next(int d) const { return has_next_[d].data(); }

 private:
  int64_t step_[3];
  std::vector<int> axes_;
  std::vector<T> has_next_[3];
};

template <class T>
std::vector<int64_t> offsets_of(const View<T>& view) {
  std::vector<int64_t> offsets(view.shape.positions());
  for (size_t n = 0; n < offsets.size(); ++n) offsets[n] = view.offset(n);
  return offsets;
}

// tile[r][c] = view[sample, c, begin + r]; columns beyond the channels are zero.
template <class T>
void load_tile(const View<const T>& view, const std::vector<int64_t>& offsets, int64_t sample, int64_t begin,
               int64_t rows, T* tile, int64_t stride) {
  const int64_t channels = view.shape.channels;
  const T* base = view.data + sample * view.batch_stride;
  if (view.channel_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* source = base + offsets[begin + r];
      std::copy(source, source + channels, tile + r * stride);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < rows; ++r) tile[r * stride + c] = base[offsets[begin + r] + c * view.channel_stride];
  }
  for (int64_t r = 0; r < rows; ++r) std::fill(tile + r * stride + channels, tile + (r + 1) * stride, T(0));
}

// view[sample, c, begin + r] += tile[r][c].
template <class T>
void add_tile(const View<T>& view, const std::vector<int64_t>& offsets, int64_t sample, int64_t begin, int64_t rows,
              const T* tile, int64_t stride) {
  const int64_t channels = view.shape.channels;
  T* base = view.data + sample * view.batch_stride;
  if (view.channel_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      T* out = base + offsets[begin + r];
      for (int64_t c = 0; c < channels; ++c) out[c] += tile[r * stride + c];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < rows; ++r) base[offsets[begin + r] + c * view.channel_stride] += tile[r * stride + c];
  }
}

// Rows of positions of a view as operands of a product: in place where memory allows, else packed into `tile`.
template <class T>
class Rows {
 public:
  Rows(const View<const T>& view, const std::vector<int64_t>& offsets)
      : view_(view), offsets_(offsets), step_(view.shape.positions() > 1 ? offsets[1] - offsets[0] : 0) {
    even_ = view.positions_lie_apart_by(step_);
    whole_ = even_ && view.channel_stride == 1 && view.shape.channels % Lanes<T>::count == 0;
  }

  Left<T> left(int64_t sample, int64_t begin, int64_t rows, T* tile, int64_t stride) const {
    if (even_) return {view_.data + sample * view_.batch_stride + offsets_[begin], step_, view_.channel_stride};
    load_tile(view_, offsets_, sample, begin, rows, tile, stride);
    return {tile, stride, 1};
  }

  Right<T> right(int64_t sample, int64_t begin, int64_t rows, T* tile, int64_t stride) const {
    if (whole_) return {view_.data + sample * view_.batch_stride + offsets_[begin], step_};
    load_tile(view_, offsets_, sample, begin, rows, tile, stride);
    return {tile, stride};
  }

 private:
  const View<const T>& view_;
  const std::vector<int64_t>& offsets_;
  int64_t step_;
  bool even_;
  bool whole_;  // rows are whole vectors
};

// Calls element(c, offset in first, offset in second, offset in out) with the innermost loop along memory.
template <class A, class B, class O, class F>
void for_each_element(const View<A>& first, const View<B>& second, const View<O>& out,
                      const std::vector<int64_t> (&offsets)[3], const Range& range, const F& element) {
  const int64_t channels = first.shape.channels;
  if (first.channel_stride == 1 && second.channel_stride == 1 && out.channel_stride == 1) {
    for (int64_t n = range.begin; n < range.end; ++n) {
      const int64_t i = offsets[0][n], j = offsets[1][n], k = offsets[2][n];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) element(c, i + c, j + c, k + c);
    }
  } else if (first.positions_lie_apart_by(1) && second.positions_lie_apart_by(1) && out.positions_lie_apart_by(1)) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = c * first.channel_stride, j = c * second.channel_stride, k = c * out.channel_stride;
#pragma omp simd
      for (int64_t n = range.begin; n < range.end; ++n) element(c, i + n, j + n, k + n);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t n = range.begin; n < range.end; ++n)
        element(c, offsets[0][n] + c * first.channel_stride, offsets[1][n] + c * second.channel_stride,
                offsets[2][n] + c * out.channel_stride);
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
