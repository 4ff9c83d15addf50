// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kScaleTile = 96;  // positions

// A dense tensor as rows of whole vectors: in place where memory allows, else copied into scratch as it is needed.
template <class S>
class RowsOf {
  using T = Compute<S>;

 public:
  explicit RowsOf(const View<const S>& view) : view_(view), offsets_(view), stride_(padded<T>(view.shape.channels)) {
    in_place_ =
        std::is_same_v<S, T> && layout_of(view) == Layout::rows && offsets_.even() && stride_ == view.shape.channels;
  }

  bool in_place() const { return in_place_; }
  int64_t stride() const { return stride_; }
  PositionRows<T> of_sample(int64_t b) const {
    if constexpr (std::is_same_v<S, T>) return {view_.data + b * view_.batch_stride, offsets_.step(), 0};
    return {};
  }
  void copy(const Range& range, T* out) const {
    load_tile(view_, offsets_, range, 0, view_.shape.channels, out, stride_);
  }
  // The positions of `range` and all that their taps reach.
  PositionRows<T> around(const Range& range, const ImageRows& rows, Scratch<T>& scratch) const {
    if (in_place_) return of_sample(range.sample);
    const auto [first, last] = rows.reached(range.begin / rows.width(), (range.end - 1) / rows.width() + 1);
    scratch.resize((last - first) * rows.width() * stride_);
    copy({range.sample, first * rows.width(), last * rows.width()}, scratch.data());
    return {scratch.data(), stride_, first * rows.width()};
  }

 private:
  const View<const S>& view_;
  Offsets offsets_;
  int64_t stride_;
  bool in_place_;
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

template <class S>
void multi_scale(const View<const S>& x, const ScaleWeights<Compute<S>>& weights, const View<S>& out, int threads) {
  using T = Compute<S>;
  const int64_t channels = x.shape.channels, stride = padded<T>(channels), inner = kScales * stride;
  const int64_t outputs = weights.outputs, out_stride = padded<T>(outputs);
  const ImageRows rows(x.shape, weights.axes);
  const RowsOf<S> source(x);
  const Offsets out_offsets(out);
  const Partition partition(x.shape, kTile);
  Panels<T> merged(inner, outputs);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < merged.count(); ++p) {
      std::fill_n(merged.panel(p), inner * merged.kWidth, T(0));
      const int64_t first = merged.first_column(p), count = std::min(merged.kWidth, outputs - first);
      for (int i = 0; i < kScales; ++i)
        transpose(weights.merged + (first * kScales + i) * channels, kScales * channels, count, channels,
                  merged.panel(p) + i * stride * merged.kWidth, merged.kWidth);
    }
    TapTable<T> taps(weights, channels, rows.taps());
    Scratch<T> staged, convolved(kScaleTile * inner), result(kScaleTile * out_stride), bias;
    bias.fill(out_stride, T(0));
    int64_t sample = -1;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < partition.ranges(); ++index) {
      const Range range = partition.range(index);
      if (range.sample != sample) {
        sample = range.sample;
        taps.set_sample(sample);
        std::copy_n(weights.bias + sample * outputs, outputs, bias.data());
      }
      const PositionRows<T> values = source.around(range, rows, staged);
      for_each_tile(range, kScaleTile, [&](const Range& tile) {
        const int64_t positions = tile.end - tile.begin;
        convolve(
            values, rows, taps, channels, tile.begin, tile.end,
            [&](int scale, int64_t c) { return &convolved[scale * stride + c]; }, inner);
        for (int64_t p = 0; p < merged.count(); ++p) {
          const int64_t first = merged.first_column(p);
          multiply(Left<T>{convolved.data(), inner, 1}, merged.right(p), positions, inner, merged.width(p),
                   StoreSum<T>{&bias[first], &result[first], out_stride});
        }
        store_tile(out, out_offsets, tile, 0, outputs, result.data(), out_stride);
      });
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
