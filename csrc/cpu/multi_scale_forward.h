// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kScaleTile = 96;  // positions at most

// Positions in a tile of so many: all about alike, because every tile reads all weights.
inline int64_t scale_tile(int64_t positions) {
  const int64_t tiles = (positions + kScaleTile - 1) / kScaleTile, even = (positions + tiles - 1) / tiles;
  return (even + kRows - 1) / kRows * kRows;
}

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
  PositionRows<T> around(const Range& range, const ImageRows& rows, int64_t reach, Scratch<T>& scratch) const {
    if (in_place_) return of_sample(range.sample);
    const auto [first, last] = rows.reached(range.begin / rows.width(), (range.end - 1) / rows.width() + 1, reach);
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

// Does what `Finish` says with tiles of rows, and keeps the moments of each range of positions.
template <class T>
class FinishedTiles {
  static constexpr int64_t lanes = Lanes<T>::count;

 public:
  FinishedTiles(const Finish<T>& finish, int64_t columns, int64_t ranges)
      : finish_(finish), columns_(columns), stride_(padded<T>(columns)), ranges_(ranges) {
    if (finish.mean) moments_.fill(2 * ranges * stride_, 0.0);
    if (finish.factor) copy_padded(finish.factor, columns, factor_);
    if (finish.addend) copy_padded(finish.addend, columns, addend_);
  }

  void finish(T* rows, int64_t count, int64_t range) {
    if (finish_.relu || finish_.factor) {
      for (int64_t c = 0; c < stride_; c += lanes) {
        const Vector<T> factor = finish_.factor ? load(&factor_[c]) : broadcast(T(1));
        const Vector<T> addend = finish_.addend ? load(&addend_[c]) : Vector<T>{};
        for (int64_t n = 0; n < count; ++n) {
          Vector<T> value = load(rows + n * stride_ + c);
          if (finish_.relu) value = value < T(0) ? Vector<T>{} : value;
          store(rows + n * stride_ + c, value * factor + addend);
        }
      }
    }
    if (finish_.mean) keep_moments(rows, count, &moments_[2 * range * stride_]);
  }

  // Mean and variance from those of the ranges, in their order. Called by every thread after all tiles.
  void add_moments(int64_t count) {
    if (!finish_.mean) return;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < columns_; ++c) {
      double sum = 0, squares = 0;
      for (int64_t range = 0; range < ranges_; ++range) {
        sum += moments_[2 * range * stride_ + c];
        squares += moments_[(2 * range + 1) * stride_ + c];
      }
      const double mean = sum / count;
      finish_.mean[c] = T(mean);
      finish_.variance[c] = T(std::max(0.0, squares / count - mean * mean));
    }
  }

 private:
  // Squares are summed around the tile's own mean: nothing is lost where the mean is large beside the deviations.
  void keep_moments(const T* rows, int64_t count, double* moments) {
    for (int64_t c = 0; c < stride_; c += lanes) {
      Vector<T> sum = {}, squares = {};
      for (int64_t n = 0; n < count; ++n) sum += load(rows + n * stride_ + c);
      const Vector<T> mean = sum / T(count);
      for (int64_t n = 0; n < count; ++n) {
        const Vector<T> deviation = load(rows + n * stride_ + c) - mean;
        squares += deviation * deviation;
      }
      T means[lanes], deviations[lanes];
      store(means, mean);
      store(deviations, squares);
      for (int64_t i = 0; i < lanes; ++i) {
        moments[c + i] += double(means[i]) * count;
        moments[stride_ + c + i] += deviations[i] + double(means[i]) * means[i] * count;
      }
    }
  }

  const Finish<T>& finish_;
  int64_t columns_, stride_, ranges_;
  Scratch<T> factor_, addend_;
  Scratch<double> moments_;  // [ranges, sum and sum of squares, columns]
};

constexpr int64_t kFewPositions = 512;  // of all samples, with which the weights are most of what is read

// Where positions are few: all of them are convolved, and then multiplied by one panel of the weights after the other.
template <class S>
void multi_scale_of_few(const View<const S>& x, const ScaleWeights<Compute<S>>& weights, const View<S>& out,
                        const View<S>& between, const Finish<Compute<S>>& finish, int threads) {
  using T = Compute<S>;
  using F = Factor<S>;
  const int64_t channels = x.shape.channels, stride = padded<T>(channels), inner = weights.scales * stride;
  const int64_t middle_stride = padded<T>(weights.middle), out_stride = padded<T>(weights.outputs);
  const int64_t positions = x.shape.positions(), total = x.shape.batch * positions;
  const ImageRows rows(x.shape, weights.axes);
  const RowsOf<S> source(x);
  const Offsets out_offsets(out), between_offsets(between);
  const int64_t tile_size = scale_tile(positions);
  const Partition partition(x.shape, tile_size);
  FinishedTiles<T> last(finish, weights.outputs, partition.ranges());
  const Turned<T> pointwise{weights.pointwise, weights.scales, weights.pointwise_stride, weights.middle,
                            channels,          stride};
  const Turned<T> fusion{&weights.fusion, 1, weights.middle, weights.outputs, weights.middle, middle_stride};
  const int64_t biases = weights.share ? x.shape.batch : 1;
  Scratch<T> bias(biases * middle_stride), fusion_bias, middle(total * middle_stride);
  Scratch<T> result(weights.fusion ? total * out_stride : 0);
  Scratch<F> convolved(total * inner), rounded(weights.fusion ? total * middle_stride : 0);
  bias.fill(biases * middle_stride, T(0));
  for (int64_t b = 0; b < biases; ++b)
    std::copy_n(weights.bias_of(b), weights.middle, bias.data() + b * middle_stride);
  if (weights.fusion) copy_padded(weights.fusion_bias, weights.outputs, fusion_bias);
#pragma omp parallel num_threads(threads)
  {
    TapTable<T> taps(weights, channels, rows.taps());
    Scratch<T> staged;
    int64_t sample = -1;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < partition.ranges(); ++index) {
      const Range range = partition.range(index);
      if (range.sample != sample) taps.set_sample(sample = range.sample);
      const PositionRows<T> values = source.around(range, rows, weights.reach(), staged);
      for_each_tile(range, tile_size, [&](const Range& tile) {
        F* to = &convolved[(sample * positions + tile.begin) * inner];
        convolve(
            values, rows, weights, taps, channels, tile.begin, tile.end,
            [&](int scale, int64_t c) { return to + scale * stride + c; }, inner);
      });
    }
    multiply_turned(convolved.data(), total, pointwise,
                    RowBias<T>{bias.data(), weights.share ? middle_stride : 0, positions}, middle.data(),
                    middle_stride);
    if (weights.fusion) {
      const F* factors = as_shared_factors(middle.data(), total * middle_stride, rounded);
      multiply_turned(factors, total, fusion, RowBias<T>{fusion_bias.data(), 0, total}, result.data(), out_stride);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < partition.ranges(); ++index) {
      const Range range = partition.range(index);
      for_each_tile(range, tile_size, [&](const Range& tile) {
        const int64_t first = range.sample * positions + tile.begin;
        T* of_tile = &middle[first * middle_stride];
        if (weights.fusion) {
          if (between.data) store_tile(between, between_offsets, tile, 0, weights.middle, of_tile, middle_stride);
          return store_tile(out, out_offsets, tile, 0, weights.outputs, &result[first * out_stride], out_stride);
        }
        last.finish(of_tile, tile.end - tile.begin, index);
        store_tile(out, out_offsets, tile, 0, weights.outputs, of_tile, middle_stride);
      });
    }
    last.add_moments(total);
  }
}

template <class S>
void multi_scale(const View<const S>& x, const ScaleWeights<Compute<S>>& weights, const View<S>& out,
                 const View<S>& between, const Finish<Compute<S>>& finish, int threads) {
  using T = Compute<S>;
  // A thread needs panels of its own.
  if (x.shape.batch * x.shape.positions() <= kFewPositions && weights.middle >= 4 * Panels<T>::kWidth)
    return multi_scale_of_few(x, weights, out, between, finish, threads);
  using F = Factor<S>;
  const int64_t channels = x.shape.channels, stride = padded<T>(channels), inner = weights.scales * stride;
  const int64_t middle_stride = padded<T>(weights.middle), out_stride = padded<T>(weights.outputs);
  const ImageRows rows(x.shape, weights.axes);
  const RowsOf<S> source(x);
  const Offsets out_offsets(out), between_offsets(between);
  const int64_t tile_size = scale_tile(x.shape.positions());
  const Partition partition(x.shape, tile_size);
  FinishedTiles<T> last(finish, weights.outputs, partition.ranges());
  Panels<F> pointwise(inner, weights.middle), fusion(weights.fusion ? middle_stride : 0, weights.outputs);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pointwise.count(); ++p) {
      pointwise.clear(p);
      for (int i = 0; i < weights.scales; ++i)
        fill_transposed(pointwise, p, i * stride, weights.pointwise[i], weights.pointwise_stride, weights.middle,
                        channels);
    }
    if (weights.fusion) {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < fusion.count(); ++p) {
        fusion.clear(p);
        fill_transposed(fusion, p, 0, weights.fusion, weights.middle, weights.outputs, weights.middle);
      }
    }
    TapTable<T> taps(weights, channels, rows.taps());
    Scratch<T> staged, middle(kScaleTile * middle_stride), bias, fusion_bias;
    Scratch<F> convolved(kScaleTile * inner), rounded;
    Scratch<T> result(weights.fusion ? kScaleTile * out_stride : 0);
    if (weights.fusion) copy_padded(weights.fusion_bias, weights.outputs, fusion_bias);
    int64_t sample = -1;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < partition.ranges(); ++index) {
      const Range range = partition.range(index);
      if (range.sample != sample) {
        sample = range.sample;
        taps.set_sample(sample);
        copy_padded(weights.bias_of(sample), weights.middle, bias);
      }
      const PositionRows<T> values = source.around(range, rows, weights.reach(), staged);
      for_each_tile(range, tile_size, [&](const Range& tile) {
        const int64_t positions = tile.end - tile.begin;
        convolve(
            values, rows, weights, taps, channels, tile.begin, tile.end,
            [&](int scale, int64_t c) { return &convolved[scale * stride + c]; }, inner);
        multiply_panels(Left<F>{convolved.data(), inner, 1}, pointwise, positions, bias.data(), middle.data(),
                        middle_stride);
        if (!weights.fusion) {
          last.finish(middle.data(), positions, index);
          return store_tile(out, out_offsets, tile, 0, weights.outputs, middle.data(), middle_stride);
        }
        if (between.data) store_tile(between, between_offsets, tile, 0, weights.middle, middle.data(), middle_stride);
        multiply_panels(as_factors(middle.data(), positions, middle_stride, rounded), fusion, positions,
                        fusion_bias.data(), result.data(), out_stride);
        store_tile(out, out_offsets, tile, 0, weights.outputs, result.data(), out_stride);
      });
    }
    last.add_moments(x.shape.batch * x.shape.positions());
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
