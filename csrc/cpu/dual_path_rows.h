// The passes of dual-path attention over tiles of rows, one row after the other: the hardware fetches a single stream
// ahead of time, several interleaved ones it does not. Compiled once per instruction set (BTINET_ISA).
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

  bool direct() const { return direct_; }
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

  // A view that is not there yields a tile that is not there.
  Tile<Compute<S>> read(const Range& tile) {
    if (!view_.data) return {};
    scratch_.resize(kTile * stride_);
    return read_tile(view_, offsets_, tile, 0, view_.shape.channels, scratch_.data(), stride_);
  }

 private:
  const View<const S>& view_;
  Offsets offsets_;
  int64_t stride_;
  Scratch<Compute<S>> scratch_;
};

// channel_sums += the row; its maximum and sum. A NaN need not reach `top`: it reaches the sum, and both feed the same
// convolution.
template <class T>
inline void summarise_row(const T* row, int64_t channels, T* channel_sums, T& top, T& total) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Vector<T> largest = broadcast(kLowest), sum = {};
  for_each_vector<T>(channels, [&](int64_t c, auto part) {
    const Vector<T> value = load(row + c);
    largest = larger<T>(filled<T>(value, part, kLowest), largest);
    sum += value;
    store(channel_sums + c, load(channel_sums + c) + value);
  });
  top = largest_of_lanes<T>(largest);
  total = sum_of_lanes<T>(sum);
}

// One row of the result; `residual` is null where there is none.
template <class S, class T>
inline void gate_row(const T* x, const T* residual, const T* channel_gate, T spatial_gate, int64_t channels, S* out,
                     bool streaming) {
  store_run(out, channels, streaming, [&](int64_t c, auto part) {
    Vector<T> value = load(x + c) * (load(channel_gate + c, part) * spatial_gate);
    if (residual) value = larger<T>(Vector<T>{}, value + load(residual + c));  // lets NaN through, as torch does
    return value;
  });
}

// What belongs to one position.
template <class T>
struct Position {
  T spatial_gate;
  T top;  // the largest of its channels
};

// dz = d_out where the ReLU passed; with `out` it goes to d_residual, without there is no ReLU. channel_sums += dz x
// spatial_gate; spatial_sum = the sum of dz x channel_gate, ties = how many channels equal the largest.
template <class S, class T>
inline void reduce_row(const T* d_out, const T* x, const T* out, const T* channel_gate, const Position<T>& at,
                       int64_t channels, S* d_residual, T* channel_sums, T& spatial_sum, T& ties) {
  Vector<T> sum = {}, equal = {};
  for_each_vector<T>(channels, [&](int64_t c, auto part) {
    const Vector<T> value = load(x + c);
    Vector<T> dz = load(d_out + c);
    if (out) {
      dz = load(out + c) <= T(0) ? Vector<T>{} : dz;
      store(d_residual + c, dz, part);
    }
    const Vector<T> product = dz * value;
    sum += product * load(channel_gate + c, part);
    store(channel_sums + c, load(channel_sums + c) + product * at.spatial_gate);
    equal += filled<T>(value, part, std::numeric_limits<T>::quiet_NaN()) == at.top ? broadcast(T(1)) : Vector<T>{};
  });
  spatial_sum = sum_of_lanes<T>(sum);
  ties = sum_of_lanes<T>(equal);
}

// What the gradient of one position's summary adds to its channels.
template <class T>
struct SummaryGradient {
  T top;   // to each channel that equals the maximum
  T mean;  // to every channel
};

template <class S, class T>
inline void gradient_row(const T* dz, const T* x, const T* channel_gate, const T* d_mean, const Position<T>& at,
                         const SummaryGradient<T>& summary, int64_t channels, S* d_x, bool streaming) {
  store_run(d_x, channels, streaming, [&](int64_t c, auto part) {
    const Vector<T> gate = load(channel_gate + c, part) * at.spatial_gate;
    const Vector<T> constant = load(d_mean + c, part) + summary.mean;
    const Vector<T> of_top = load(x + c) == at.top ? broadcast(summary.top) : Vector<T>{};
    return load(dz + c) * gate + (constant + of_top);
  });
}

}  // namespace BTINET_ISA
}  // namespace btinet
