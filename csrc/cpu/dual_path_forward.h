// Dual-path attention, forwards. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// What one thread needs for the forward pass.
template <class S>
class DualPathForward {
  using T = Compute<S>;

 public:
  DualPathForward(const View<const S>& x, const View<const S>& residual, const DualPathSizes& sizes,
                  const DualPathWeights<const T>& weights, const DualPathSaved<T>& saved, const View<S>& out)
      : x_(x),
        residual_(residual),
        out_(out),
        sizes_(sizes),
        weights_(weights),
        saved_(saved),
        channels_(x.shape.channels),
        count_(x.shape.positions()),
        x_reader_(x),
        residual_reader_(residual),
        writer_(out),
        map_rows_(x.shape, sizes.kernel, 2) {
    tile_sums_.fill(padded<T>(channels_), T(0));
  }

  // Pass 1: maps and the channels' sums.
  void summarise(const Range& range, bool planes, double* channel_sums) {
    std::fill_n(channel_sums, channels_, 0.0);
    T* top = saved_.maps + 2 * range.sample * count_ + range.begin;
    T* mean = top + count_;
    const int64_t size = range.end - range.begin;
    if (planes) {
      std::fill_n(top, size, -std::numeric_limits<T>::infinity());
      std::fill_n(mean, size, T(0));
      for_each_tile(range, kPlaneTile, [&](const Range& tile) {
        const int64_t at = tile.begin - range.begin;
        for_each_planes<4>(channels_, [&](int64_t c, auto number) {
          summarise_planes<decltype(number)::value>(x_, tile, c, channel_sums, top + at, mean + at);
        });
      });
    } else {
      for_each_tile(range, kTile, [&](const Range& positions) {
        const Tile<T> tile = x_reader_.read(positions);
        const int64_t at = positions.begin - range.begin;
        for (int64_t r = 0; r < positions.end - positions.begin; ++r)
          summarise_row(tile.data + r * tile.stride, channels_, tile_sums_.data(), top[at + r], mean[at + r]);
        move_sums(tile_sums_.data(), channel_sums, channels_);
      });
    }
    for (int64_t n = 0; n < size; ++n) mean[n] /= T(channels_);
  }

  // The channel gates of a few samples.
  void channel_path(int64_t first, int64_t samples, const double* sums, int64_t ranges) {
    T* mean = saved_.mean + first * channels_;
    T* hidden = saved_.hidden + first * sizes_.hidden;
    T* gate = saved_.channel_gate + first * channels_;
    for (int64_t b = 0; b < samples; ++b)
      sum_ranges(sums + b * ranges * channels_, ranges, channels_, 1.0 / double(count_), mean + b * channels_);
    for (int64_t j = 0; j < sizes_.hidden; j += kOutputs)
      linear_block(mean, weights_.hidden_weight, weights_.hidden_bias, samples, sizes_.hidden, channels_, j, hidden);
    for (int64_t j = 0; j < samples * sizes_.hidden; ++j) hidden[j] = hidden[j] < T(0) ? T(0) : hidden[j];
    for (int64_t c = 0; c < channels_; c += kOutputs)
      linear_block(hidden, weights_.gate_weight, weights_.gate_bias, samples, channels_, sizes_.hidden, c, gate);
    for_each_vector<T>(samples * channels_,
                       [&](int64_t c, auto part) { store(gate + c, sigmoid<T>(load(gate + c, part)), part); });
  }

  // The spatial gates of a few rows of positions.
  void spatial_path(int64_t sample, int64_t first, int64_t end) {
    const int64_t width = x_.shape.size[2];
    for (int64_t row = first; row < end; ++row) {
      T* gate = saved_.spatial_gate + sample * count_ + row * width;
      map_rows_.gather(saved_.maps + 2 * sample * count_, row);
      convolve_row<T, 1>(map_rows_, weights_.spatial_weight, 0, width, [&](int64_t x, auto& sum, auto part) {
        store(gate + x, sigmoid<T>(sum[0] + *weights_.spatial_bias), part);
      });
    }
  }

  // Pass 2.
  void write(const Range& range, bool planes, bool streaming) {
    const T* channel_gate = saved_.channel_gate + range.sample * channels_;
    const T* spatial_gate = saved_.spatial_gate + range.sample * count_;
    if (planes) {
      for_each_tile(range, kPlaneTile, [&](const Range& tile) {
        for (int64_t c = 0; c < channels_; ++c)
          gate_plane(x_, residual_, tile, c, channel_gate[c], spatial_gate + tile.begin, out_, streaming);
      });
      return;
    }
    for_each_tile(range, kTile, [&](const Range& positions) {
      const Tile<T> tile = x_reader_.read(positions), residual = residual_reader_.read(positions);
      writer_.begin(positions);
      for (int64_t r = 0; r < positions.end - positions.begin; ++r)
        gate_row(tile.data + r * tile.stride, residual.data ? residual.data + r * residual.stride : nullptr,
                 channel_gate, spatial_gate[positions.begin + r], channels_, writer_.row(r),
                 streaming && writer_.direct());
      writer_.end();
    });
  }

 private:
  const View<const S>&x_, &residual_;
  const View<S>& out_;
  const DualPathSizes& sizes_;
  const DualPathWeights<const T>& weights_;
  const DualPathSaved<T>& saved_;
  int64_t channels_, count_;
  TileReader<S> x_reader_, residual_reader_;
  TileWriter<S> writer_;
  MapRows<T> map_rows_;
  Scratch<T> tile_sums_;
};

template <class S>
void dual_path(const View<const S>& x, const View<const S>& residual, const DualPathSizes& sizes,
               const DualPathWeights<const Compute<S>>& weights, const DualPathSaved<Compute<S>>& saved,
               const View<S>& out, int threads) {
  const int64_t channels = x.shape.channels;
  const bool planes = layout_of(x, residual, out) == Layout::planes;
  const DualPathPlan plan(x.shape, sizeof(S), planes, threads);
  Scratch<double> sums(x.shape.batch * plan.ranges() * channels);
  const auto sums_of = [&](int64_t sample) { return sums.data() + sample * plan.ranges() * channels; };
#pragma omp parallel num_threads(threads)
  {
    DualPathForward<S> pass(x, residual, sizes, weights, saved, out);
    plan.run([&](const Range& range,
                 int64_t number) { pass.summarise(range, planes, sums_of(range.sample) + number * channels); },
             [&](int64_t first, int64_t samples) { pass.channel_path(first, samples, sums_of(first), plan.ranges()); },
             [&](int64_t sample, int64_t, int64_t first, int64_t end) { pass.spatial_path(sample, first, end); },
             [&](const Range& range) { pass.write(range, planes, plan.streaming); });
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
