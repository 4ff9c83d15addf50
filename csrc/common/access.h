// How passes reach the values of a view: rows of channels, planes of positions, or one by one; and tiles of them.
// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kTile = 48;  // positions a tile holds

// Calls with consecutive pieces of at most `positions` positions.
template <class F>
void for_each_tile(const Range& range, int64_t positions, const F& tile) {
  for (int64_t begin = range.begin; begin < range.end; begin += positions)
    tile(Range{range.sample, begin, std::min(begin + positions, range.end)});
}

// rows: the channels of a position lie side by side. planes: the positions of a channel do.
enum class Layout { rows, planes, scattered };

template <class S>
Layout layout_of(const View<S>& view) {
  const bool rows = view.channel_stride == 1, planes = view.positions_lie_apart_by(1);
  if (rows && (view.shape.channels > 1 || !planes)) return Layout::rows;
  return planes ? Layout::planes : Layout::scattered;
}

// The common layout of several views of one shape; scattered where they differ.
template <class First, class... Rest>
Layout layout_of(const First& first, const Rest&... rest) {
  const Layout layout = layout_of(first);
  return ((layout_of(rest) == layout) && ...) ? layout : Layout::scattered;
}

// Where each position of a view lies, relative to its sample and channel.
class Offsets {
 public:
  template <class S>
  explicit Offsets(const View<S>& view) {
    const Shape& shape = view.shape;
    int last = 2;
    while (last > 0 && shape.size[last] == 1) --last;
    step_ = view.spatial_stride[last];
    even_ = view.positions_lie_apart_by(step_);
    if (even_) return;
    values_.reserve(shape.positions());
    for (int64_t z = 0; z < shape.size[0]; ++z)
      for (int64_t y = 0; y < shape.size[1]; ++y)
        for (int64_t x = 0; x < shape.size[2]; ++x)
          values_.push_back(z * view.spatial_stride[0] + y * view.spatial_stride[1] + x * view.spatial_stride[2]);
  }

  int64_t operator[](int64_t position) const { return even_ ? position * step_ : values_[position]; }
  bool even() const { return even_; }
  int64_t step() const { return step_; }

 private:
  int64_t step_;
  bool even_;
  std::vector<int64_t> values_;
};

// Asks for `count` values that are needed soon: the hardware does not foresee where the next plane lies.
template <bool kForWriting, class S>
inline void prefetch_run(const S* data, int64_t count) {
  constexpr int64_t line = 64 / sizeof(S);
  constexpr int kFirstCache = 3;
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(data + i, kForWriting, kFirstCache);
}

// tile[r][c] = view[sample, first + c, begin + r] for c < columns; the rest of a row's last vector is zero.
template <class S>
void load_tile(const View<const S>& view, const Offsets& offsets, const Range& range, int64_t first, int64_t columns,
               Compute<S>* tile, int64_t stride) {
  using T = Compute<S>;
  const int64_t rows = range.end - range.begin;
  const S* base = view.data + range.sample * view.batch_stride + first * view.channel_stride;
  switch (layout_of(view)) {
    case Layout::rows:
      for (int64_t r = 0; r < rows; ++r) {
        const S* row = base + offsets[range.begin + r];
        for_each_vector<T>(columns, [&](int64_t c, auto part) { store(tile + r * stride + c, load(row + c, part)); });
      }
      break;
    case Layout::planes:
      transpose(base + range.begin, view.channel_stride, columns, rows, tile, stride);
      break;
    case Layout::scattered:
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c)
          tile[r * stride + c] = base[offsets[range.begin + r] + c * view.channel_stride];
        std::fill(tile + r * stride + columns, tile + r * stride + padded<T>(columns), T(0));
      }
  }
}

// view[sample, first + c, begin + r] = tile[r][c] for c < columns.
template <class S>
void store_tile(const View<S>& view, const Offsets& offsets, const Range& range, int64_t first, int64_t columns,
                const Compute<S>* tile, int64_t stride) {
  using T = Compute<S>;
  constexpr int64_t n = Lanes<T>::count;
  const int64_t rows = range.end - range.begin;
  S* base = view.data + range.sample * view.batch_stride + first * view.channel_stride;
  switch (layout_of(view)) {
    case Layout::rows:
      for (int64_t r = 0; r < rows; ++r) {
        S* row = base + offsets[range.begin + r];
        for_each_vector<T>(columns, [&](int64_t c, auto part) { store(row + c, load(tile + r * stride + c), part); });
      }
      break;
    case Layout::planes:
      for (int64_t c = 0; c < columns; c += n)
        for_each_vector<T>(rows, [&](int64_t r, auto part) {
          Vector<T> block[n] = {};
          for (int64_t i = 0; i < std::min(n, rows - r); ++i) block[i] = load(tile + (r + i) * stride + c);
          transpose<T>(block);
          for (int64_t i = 0; i < std::min(n, columns - c); ++i)
            store(base + (c + i) * view.channel_stride + range.begin + r, block[i], part);
        });
      break;
    case Layout::scattered:
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c)
          base[offsets[range.begin + r] + c * view.channel_stride] = stored<S>(tile[r * stride + c]);
  }
}

// Rows of whole vectors, one for each position.
template <class T>
struct Tile {
  const T* data;
  int64_t stride;
};

// The channels [first, first + columns) of some positions as a tile: in place where memory allows, else in `scratch`.
template <class S>
Tile<Compute<S>> read_tile(const View<const S>& view, const Offsets& offsets, const Range& range, int64_t first,
                           int64_t columns, Compute<S>* scratch, int64_t stride) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    const bool whole = columns % Lanes<S>::count == 0;
    if (whole && view.channel_stride == 1 && offsets.even())
      return {view.data + range.sample * view.batch_stride + offsets[range.begin] + first, offsets.step()};
  }
  load_tile(view, offsets, range, first, columns, scratch, stride);
  return {scratch, stride};
}

// The matrix [rows, columns] with rows of whole vectors: itself where it has them, else a copy.
template <class T>
class PaddedRows {
 public:
  PaddedRows(const T* matrix, int64_t rows, int64_t columns) : data_(matrix), stride_(padded<T>(columns)) {
    if (stride_ == columns) return;
    copy_.fill(rows * stride_, T(0));
    for (int64_t r = 0; r < rows; ++r) std::copy(matrix + r * columns, matrix + (r + 1) * columns, &copy_[r * stride_]);
    data_ = copy_.data();
  }
  PaddedRows(const PaddedRows&) = delete;

  const T* data() const { return data_; }
  const T* row(int64_t r) const { return data_ + r * stride_; }
  int64_t stride() const { return stride_; }

 private:
  Scratch<T> copy_;
  const T* data_;
  int64_t stride_;
};

}  // namespace BTINET_ISA
}  // namespace btinet
