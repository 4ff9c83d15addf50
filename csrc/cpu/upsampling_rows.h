// How the products of the transposed convolution reach their left operands: rows of channels, gathered for tiles of
// positions. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kUpsamplingTile = 96;  // positions: while a panel of weights is in the second cache

// A tensor as rows of channels: in place where memory allows, else a copy, made by all threads of a team.
template <class S>
class ChannelRows {
  using T = Compute<S>;

 public:
  explicit ChannelRows(const View<const S>& view) : view_(view), offsets_(view) {
    const Shape& shape = view.shape;
    in_place_ = std::is_same_v<S, T> && (view.channel_stride == 1 || shape.channels == 1) && offsets_.even();
    step_ = in_place_ ? offsets_.step() : padded<T>(shape.channels);
    if (!in_place_) copy_.resize(shape.batch * shape.positions() * step_);
  }

  // Threads wait for one another where there is something to copy.
  void prepare() {
    if (in_place_) return;
    const int64_t positions = view_.shape.positions(), tiles = (positions + kTile - 1) / kTile;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < view_.shape.batch * tiles; ++index) {
      const int64_t b = index / tiles, begin = index % tiles * kTile;
      load_tile(view_, offsets_, {b, begin, std::min(begin + kTile, positions)}, 0, view_.shape.channels,
                &copy_[(b * positions + begin) * step_], step_);
    }
  }
  const T* at(int64_t sample, int64_t position) const {
    if constexpr (std::is_same_v<S, T>)
      if (in_place_) return view_.data + sample * view_.batch_stride + position * step_;
    return &copy_[(sample * view_.shape.positions() + position) * step_];
  }
  int64_t step() const { return step_; }  // between positions

 private:
  const View<const S>& view_;
  Offsets offsets_;
  bool in_place_;
  int64_t step_;
  Scratch<T> copy_;
};

// Positions side by side in one row of an image.
struct Run {
  int64_t sample, row, column;
  int64_t first, count;  // `first`: relative to where the walk began
};

template <class F>
void for_each_run(const Shape& shape, int64_t begin, int64_t end, const F& f) {
  const int64_t height = shape.size[1], width = shape.size[2];
  for (int64_t n = begin; n < end;) {
    const int64_t column = n % width, row = n / width % height, count = std::min(width - column, end - n);
    f(Run{n / (width * height), row, column, n - begin, count});
    n += count;
  }
}

template <class T>
inline void copy_row(const T* from, int64_t count, T* to) {
  for_each_vector<T>(count, [&](int64_t i, auto part) { store(to + i, load(from + i, part), part); });
}

}  // namespace BTINET_ISA
}  // namespace btinet
