// The passes of dual-path attention over tiles of rows, several rows at a time. Compiled once per instruction set
// (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Where a pass writes the rows of a tile: in place where the channels lie side by side, else by way of scratch.
template <class S>
class TileWriter {
 public:
  explicit TileWriter(const View<S>& view) : view_(view), offsets_(view), direct_(view.channel_stride == 1) {
    if (!direct_ && view.data) scratch_.resize(kTile * view.shape.channels);
  }

  void begin(const Range& tile) { tile_ = tile; }
  S* row(int64_t r) {
    return direct_ ? sample() + offsets_[tile_.begin + r] : scratch_.data() + r * view_.shape.channels;
  }
  void end() {
    if (direct_) return;
    const int64_t channels = view_.shape.channels;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t n = tile_.begin; n < tile_.end; ++n)
        sample()[c * view_.channel_stride + offsets_[n]] = scratch_[(n - tile_.begin) * channels + c];
  }

 private:
  S* sample() const { return view_.data + tile_.sample * view_.batch_stride; }

  const View<S>& view_;
  Offsets offsets_;
  bool direct_;
  Scratch<S> scratch_;
  Range tile_{};
};

// Where a pass reads the rows of a tile.
template <class S>
class TileReader {
 public:
  explicit TileReader(const View<const S>& view)
      : view_(view), offsets_(view), stride_(padded<Compute<S>>(view.shape.channels)) {}

  // A view that is not there yields `otherwise`.
  Tile<Compute<S>> read(const Range& tile, Tile<Compute<S>> otherwise = {}) {
    if (!view_.data) return otherwise;
    scratch_.resize(kTile * stride_);
    return read_tile(view_, offsets_, tile, 0, view_.shape.channels, scratch_.data(), stride_);
  }

 private:
  const View<const S>& view_;
  Offsets offsets_;
  int64_t stride_;
  Scratch<Compute<S>> scratch_;
};

// Calls rows(first row, number of rows as a constant).
template <int R, class F>
inline void for_each_rows(int64_t count, const F& rows) {
  int64_t r = 0;
  for (; r + R <= count; r += R) rows(r, std::integral_constant<int, R>{});
  for (; r < count; ++r) rows(r, std::integral_constant<int, 1>{});
}

// channel_sums += R rows; maximum and sum of each of them. A NaN need not reach `top`: it reaches the sum, and both
// feed the same convolution.
template <class T, int R>
inline void summarise_rows(const Tile<T>& tile, int64_t first, int64_t channels, T* channel_sums, T* top, T* total) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Vector<T> largest[R], sum[R] = {};
  for (int r = 0; r < R; ++r) largest[r] = broadcast(kLowest);
  for_each_vector<T>(channels, [&](int64_t c, auto part) {
    Vector<T> value[R], of_rows = load(channel_sums + c);
    for (int r = 0; r < R; ++r) value[r] = load(tile.data + (first + r) * tile.stride + c);
    for (int r = 0; r < R; ++r) {
      largest[r] = larger<T>(filled<T>(value[r], part, kLowest), largest[r]);
      sum[r] += value[r];
      of_rows += value[r];
    }
    store(channel_sums + c, of_rows);
  });
  for (int r = 0; r < R; ++r) {
    top[r] = largest_of_lanes<T>(largest[r]);
    total[r] = sum_of_lanes<T>(sum[r]);
  }
}

// One row of the result; `residual` is null where there is none.
template <class S, class T>
inline void gate_row(const T* x, const T* residual, const T* channel_gate, T spatial_gate, int64_t channels, S* out) {
  for_each_vector<T>(channels, [&](int64_t c, auto part) {
    Vector<T> value = load(x + c) * (load(channel_gate + c, part) * spatial_gate);
    if (residual) value = larger<T>(Vector<T>{}, value + load(residual + c));  // lets NaN through, as torch does
    store(out + c, value, part);
  });
}

template <class T>
struct RowsBackward {
  Tile<T> d_out, x, out;   // `out` only with a residual
  const T* channel_gate;   // [C]
  const T* spatial_gate;   // of the rows
  const T* top;            // of the rows
  T* channel_sums;         // [padded C], += sum over the rows of dz x spatial_gate
  T *spatial_sums, *ties;  // of the rows: sum over the channels of dz x channel_gate; how many equal the maximum
};

// dz = d_out where the ReLU passed; d_residual[r] is where it goes, or null where there is no residual.
template <class S, int R, class T>
inline void reduce_rows(const RowsBackward<T>& in, int64_t first, int64_t channels, S* const (&d_residual)[R]) {
  Vector<T> sum[R] = {}, equal[R] = {}, gate[R], top[R];
  for (int r = 0; r < R; ++r) {
    gate[r] = broadcast(in.spatial_gate[first + r]);
    top[r] = broadcast(in.top[first + r]);
  }
  for_each_vector<T>(channels, [&](int64_t c, auto part) {
    const Vector<T> channel_gate = load(in.channel_gate + c, part);
    Vector<T> of_rows = load(in.channel_sums + c);
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = load(in.x.data + (first + r) * in.x.stride + c);
      Vector<T> dz = load(in.d_out.data + (first + r) * in.d_out.stride + c);
      if (d_residual[0]) {
        dz = load(in.out.data + (first + r) * in.out.stride + c) <= T(0) ? Vector<T>{} : dz;
        store(d_residual[r] + c, dz, part);
      }
      const Vector<T> product = dz * x;
      sum[r] += product * channel_gate;
      of_rows += product * gate[r];
      equal[r] += filled<T>(x, part, std::numeric_limits<T>::quiet_NaN()) == top[r] ? broadcast(T(1)) : Vector<T>{};
    }
    store(in.channel_sums + c, of_rows);
  });
  for (int r = 0; r < R; ++r) {
    in.spatial_sums[first + r] = sum_of_lanes<T>(sum[r]);
    in.ties[first + r] = sum_of_lanes<T>(equal[r]);
  }
}

// What the gradient of one position's summary adds to its channels.
template <class T>
struct SummaryGradient {
  T top;   // to each channel that equals the maximum
  T mean;  // to every channel
};

template <class S, class T>
inline void gradient_row(const T* dz, const T* x, const T* channel_gate, T spatial_gate, const T* d_mean, T top,
                         const SummaryGradient<T>& summary, int64_t channels, S* d_x) {
  for_each_vector<T>(channels, [&](int64_t c, auto part) {
    const Vector<T> gate = load(channel_gate + c, part) * spatial_gate;
    const Vector<T> constant = load(d_mean + c, part) + summary.mean;
    const Vector<T> of_top = load(x + c) == top ? broadcast(summary.top) : Vector<T>{};
    store(d_x + c, load(dz + c) * gate + (constant + of_top), part);
  });
}

}  // namespace BTINET_ISA
}  // namespace btinet
