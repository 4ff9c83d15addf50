// Work on all positions of a batch, one after the other across samples: how it is cut, and products summed over it.
// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kFewestTiles = 8;  // so that maps of few positions keep several threads busy

// Positions of a whole batch, cut into pieces that are whole register blocks and about alike.
class Pieces {
 public:
  Pieces(int64_t begin, int64_t end, int64_t largest, int64_t fewest)
      : begin_(begin), end_(end), blocks_((end - begin + kRows - 1) / kRows) {
    count_ = std::min(blocks_, std::max(fewest, (end - begin + largest - 1) / largest));
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t piece) const { return std::min(end_, begin_ + piece * blocks_ / count_ * kRows); }
  int64_t end(int64_t piece) const { return begin(piece + 1); }
  int64_t largest() const { return count_ ? (blocks_ + count_ - 1) / count_ * kRows : 0; }

 private:
  int64_t begin_, end_, blocks_, count_;
};

// Bands of positions whose rows of `stride` values lie in the outer cache together.
template <class T>
Pieces bands_of_rows(int64_t positions, int64_t stride) {
  constexpr int64_t kBytes = 8 << 20;
  constexpr int64_t kFewestPositions = 512;  // sums over fewer would be added to the weights' gradients too often
  return Pieces(0, positions, std::max(kFewestPositions, kBytes / (stride * int64_t(sizeof(T)))), 1);
}

// Whether a tensor is too large for whoever reads it next to find it in the caches, beside what it was computed from.
template <class S>
bool outgrows_caches(const View<S>& view) {
  constexpr int64_t kBytes = 16 << 20;
  return view.shape.batch * view.shape.channels * view.shape.positions() * int64_t(sizeof(S)) > kBytes;
}

// As store_tile, for all channels; past the caches where that is wanted and possible. `end_streams` comes after.
template <class S>
void write_tile(const View<S>& view, const Offsets& offsets, const Range& range, const Compute<S>* tile, int64_t stride,
                bool streaming) {
  const int64_t columns = view.shape.channels;
  if (!streaming || view.channel_stride != 1) return store_tile(view, offsets, range, 0, columns, tile, stride);
  for (int64_t n = range.begin; n < range.end; ++n, tile += stride)
    store_run(view.data + range.sample * view.batch_stride + offsets[n], columns, true,
              [&](int64_t c, auto) { return load(tile + c); });
}

// Rows of a matrix this far apart, in whole vectors, do not all fall into the same sets of the first cache.
template <class T>
int64_t spread_stride(int64_t columns) {
  return padded<T>(columns) + Lanes<T>::count;
}

// total [columns of left, columns] = left^T right over so many positions, or += it. All threads of a team share the
// work and do not wait for one another. Rows of `right` and of `total` are whole vectors.
template <class T>
void add_products(const Strips<T>& left, Right<T> right, int64_t positions, int64_t columns, bool first, T* total,
                  int64_t total_stride) {
  constexpr int64_t kPositions = 256, kWidth = Panels<T>::kWidth;  // that one product sums over; of its columns
  constexpr int64_t kTasks = 32, kStrips = 24;  // tasks, if there is enough for so many; strips of a task at most
  const int64_t strips = (left.columns() + kRows - 1) / kRows, panels = (columns + kWidth - 1) / kWidth;
  const int64_t group = std::max<int64_t>(1, std::min(kStrips, strips * panels / kTasks));
  const int64_t groups = (strips + group - 1) / group;
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < panels * groups; ++task) {
    const int64_t column = task / groups * kWidth, wide = std::min(kWidth, columns - column);
    const int64_t begin = task % groups * group, end = std::min(begin + group, strips);
    for (int64_t n = 0; n < positions; n += kPositions)
      for (int64_t row = begin * kRows; row < end * kRows; row += kRows) {
        const Right<T> factor{right.data + n * right.stride + column, right.stride};
        const int64_t rows = std::min<int64_t>(kRows, left.columns() - row),
                      inner = std::min(kPositions, positions - n);
        T* to = total + row * total_stride + column;
        if (first && n == 0)
          multiply(left.left(row, n), factor, rows, inner, wide, Store<T, false>{to, total_stride});
        else
          multiply(left.left(row, n), factor, rows, inner, wide, AddTo<T>{to, total_stride});
      }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
