// Dual-path attention, backwards. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Gradients between the passes, of the whole batch.
template <class T>
struct DualPathGradients {
  Scratch<T> gate_logit;     // [B, C], of the channel gate before its sigmoid
  Scratch<T> hidden;         // [B, h], before its ReLU
  Scratch<T> mean;           // [B, C], divided by N
  Scratch<T> spatial_logit;  // [B, N], of the spatial gate before its sigmoid
  Scratch<T> top;            // [B, N], of each channel that equals the maximum; before that, how many do
  Scratch<T> map_mean;       // [B, N], of each channel through the mean over the channels
  Scratch<double> taps;      // [B, blocks, taps + 1]: of the convolution's weights and, last, its bias
  Scratch<T> flipped;        // [2, taps of a map]: the convolution's weights, last tap first

  DualPathGradients(const Shape& shape, const DualPathSizes& sizes, int64_t blocks, const T* spatial_weight)
      : gate_logit(shape.batch * shape.channels),
        hidden(shape.batch * sizes.hidden),
        mean(shape.batch * shape.channels),
        spatial_logit(shape.batch * shape.positions()),
        top(shape.batch * shape.positions()),
        map_mean(shape.batch * shape.positions()),
        taps(shape.batch * blocks * (2 * of_map(sizes) + 1)),
        flipped(2 * of_map(sizes)) {
    const int64_t count = of_map(sizes);
    for (int64_t m = 0; m < 2; ++m)
      std::reverse_copy(spatial_weight + m * count, spatial_weight + (m + 1) * count, flipped.data() + m * count);
  }

  static int64_t of_map(const DualPathSizes& sizes) { return sizes.kernel[0] * sizes.kernel[1] * kTaps; }
};

// What one thread needs for the backward pass.
template <class S>
class DualPathBackward {
  using T = Compute<S>;

 public:
  DualPathBackward(const View<const S>& d_out, const View<const S>& x, const View<const S>& out,
                   const DualPathSizes& sizes, const DualPathWeights<const T>& weights,
                   const DualPathSaved<const T>& saved, const View<S>& d_x, const View<S>& d_residual,
                   const View<const S>& dz, DualPathGradients<T>& between)
      : d_out_(d_out),
        x_(x),
        out_(out),
        d_x_(d_x),
        d_residual_(d_residual),
        dz_(dz),
        sizes_(sizes),
        weights_(weights),
        saved_(saved),
        between_(between),
        channels_(x.shape.channels),
        count_(x.shape.positions()),
        d_out_reader_(d_out),
        x_reader_(x),
        out_reader_(out),
        dz_reader_(dz),
        d_x_writer_(d_x),
        d_residual_writer_(d_residual),
        map_rows_(x.shape, sizes.kernel, 2),
        gradient_rows_(x.shape, sizes.kernel, 1) {
    tile_sums_.fill(padded<T>(channels_), T(0));
    logits_.fill(padded<T>(x.shape.size[2]), T(0));
    tap_sums_.resize(2 * between.of_map(sizes) * Lanes<T>::count);
  }

  // Pass A: dz, and its sums with x over the channels and over the positions.
  void reduce(const Range& range, bool planes, double* channel_sums) {
    std::fill_n(channel_sums, channels_, 0.0);
    const int64_t size = range.end - range.begin, at = range.sample * count_ + range.begin;
    T *d_logit = &between_.spatial_logit[at], *ties = &between_.top[at];
    const T* spatial_gate = saved_.spatial_gate + at;
    if (planes) {
      std::fill_n(d_logit, size, T(0));
      std::fill_n(ties, size, T(0));
      for_each_tile(range, kPlaneTile, [&](const Range& tile) {
        const int64_t skip = tile.begin - range.begin;
        const PlanesBackward<S> in{
            d_out_,        x_,           out_,           d_residual_, channel_gate(range.sample), spatial_gate + skip,
            top_map(tile), channel_sums, d_logit + skip, ties + skip};
        for_each_planes<2>(channels_,
                           [&](int64_t c, auto number) { reduce_planes<decltype(number)::value>(in, tile, c); });
      });
    } else {
      for_each_tile(range, kTile, [&](const Range& tile) {
        const int64_t skip = tile.begin - range.begin;
        reduce_tile(tile, spatial_gate + skip, d_logit + skip, ties + skip);
        move_sums(tile_sums_.data(), channel_sums, channels_);
      });
    }
    for (int64_t n = 0; n < size; ++n) d_logit[n] *= spatial_gate[n] * (T(1) - spatial_gate[n]);
  }

  // Back through the channels' network, for a few samples.
  void channel_path(int64_t first, int64_t samples, const double* sums, int64_t ranges) {
    const int64_t hidden = sizes_.hidden;
    const T* gate = channel_gate(first);
    T *d_logit = &between_.gate_logit[first * channels_], *d_hidden = between_.hidden.data() + first * hidden;
    T* d_mean = &between_.mean[first * channels_];
    for (int64_t b = 0; b < samples; ++b)
      sum_ranges(sums + b * ranges * channels_, ranges, channels_, 1.0, d_logit + b * channels_);
    for (int64_t c = 0; c < samples * channels_; ++c) d_logit[c] *= gate[c] * (T(1) - gate[c]);
    multiply_any<T, false>(Left<T>{d_logit, channels_, 1}, weights_.gate_weight, samples, channels_, hidden, 0, hidden,
                           d_hidden);
    for (int64_t j = 0; j < samples * hidden; ++j)
      if (saved_.hidden[first * hidden + j] <= T(0)) d_hidden[j] = 0;
    multiply_any<T, false>(Left<T>{d_hidden, hidden, 1}, weights_.hidden_weight, samples, hidden, channels_, 0,
                           channels_, d_mean);
    for (int64_t c = 0; c < samples * channels_; ++c) d_mean[c] /= T(count_);
  }

  // Back through the convolution, for a few rows of positions; `taps`: where their share of its weights' gradient goes.
  void spatial_path(int64_t sample, int64_t first, int64_t end, double* taps) {
    const int64_t width = x_.shape.size[2], of_map = between_.of_map(sizes_);
    Vector<T>* tap_sums = reinterpret_cast<Vector<T>*>(tap_sums_.data());
    std::fill_n(tap_sums, 2 * of_map, Vector<T>{});
    double bias = 0;
    for (int64_t row = first; row < end; ++row) {
      const T* d_logit = &between_.spatial_logit[sample * count_];
      T* d_top = &between_.top[sample * count_ + row * width];
      T* d_mean = &between_.map_mean[sample * count_ + row * width];
      gradient_rows_.gather(d_logit, row);
      convolve_row<T, 2>(gradient_rows_, between_.flipped.data(), of_map, width,
                         [&](int64_t x, auto& gradient, auto part) {
                           const Vector<T> ties = filled<T>(load(d_top + x, part), part, T(1));
                           store(d_top + x, gradient[0] / ties, part);
                           store(d_mean + x, gradient[1] / T(channels_), part);
                         });
      std::copy_n(d_logit + row * width, width, logits_.data());
      map_rows_.gather(saved_.maps + 2 * sample * count_, row);
      add_tap_products(map_rows_, logits_.data(), width, tap_sums);
      for (int64_t x = 0; x < width; ++x) bias += logits_[x];
    }
    for (int64_t k = 0; k < 2 * of_map; ++k) taps[k] = sum_of_lanes<T>(tap_sums[k]);
    taps[2 * of_map] = bias;
  }

  // Pass B.
  void write(const Range& range, bool planes, bool streaming) {
    const int64_t at = range.sample * count_;
    const T* spatial_gate = saved_.spatial_gate + at;
    const T* d_mean = &between_.mean[range.sample * channels_];
    const T *d_top = &between_.top[at], *d_map_mean = &between_.map_mean[at];
    if (planes) {
      for_each_tile(range, kPlaneTile, [&](const Range& tile) {
        const int64_t n = tile.begin;
        for (int64_t c = 0; c < channels_; ++c)
          gradient_plane(dz_, x_, tile, c, channel_gate(range.sample)[c], spatial_gate + n, d_mean[c], top_map(tile),
                         d_top + n, d_map_mean + n, d_x_, streaming);
      });
      return;
    }
    for_each_tile(range, kTile, [&](const Range& positions) {
      const Tile<T> dz = dz_reader_.read(positions), x = x_reader_.read(positions);
      d_x_writer_.begin(positions);
      for (int64_t r = 0; r < positions.end - positions.begin; ++r) {
        const int64_t n = positions.begin + r;
        gradient_row(dz.data + r * dz.stride, x.data + r * x.stride, channel_gate(range.sample), d_mean,
                     Position<T>{spatial_gate[n], top_map(positions)[r]}, SummaryGradient<T>{d_top[n], d_map_mean[n]},
                     channels_, d_x_writer_.row(r), streaming && d_x_writer_.direct());
      }
      d_x_writer_.end();
    });
  }

 private:
  const T* channel_gate(int64_t sample) const { return saved_.channel_gate + sample * channels_; }
  const T* top_map(const Range& range) const { return saved_.maps + 2 * range.sample * count_ + range.begin; }

  void reduce_tile(const Range& positions, const T* spatial_gate, T* spatial_sums, T* ties) {
    const Tile<T> d_out = d_out_reader_.read(positions), x = x_reader_.read(positions);
    const Tile<T> out = out_reader_.read(positions);
    d_residual_writer_.begin(positions);
    for (int64_t r = 0; r < positions.end - positions.begin; ++r)
      reduce_row(d_out.data + r * d_out.stride, x.data + r * x.stride, out.data ? out.data + r * out.stride : nullptr,
                 channel_gate(positions.sample), Position<T>{spatial_gate[r], top_map(positions)[r]}, channels_,
                 out.data ? d_residual_writer_.row(r) : nullptr, tile_sums_.data(), spatial_sums[r], ties[r]);
    if (out.data) d_residual_writer_.end();
  }

  const View<const S>&d_out_, &x_, &out_;
  const View<S>&d_x_, &d_residual_;
  const View<const S>& dz_;
  const DualPathSizes& sizes_;
  const DualPathWeights<const T>& weights_;
  const DualPathSaved<const T>& saved_;
  DualPathGradients<T>& between_;
  int64_t channels_, count_;
  TileReader<S> d_out_reader_, x_reader_, out_reader_, dz_reader_;
  TileWriter<S> d_x_writer_, d_residual_writer_;
  MapRows<T> map_rows_, gradient_rows_;
  Scratch<T> tile_sums_, logits_, tap_sums_;
};

template <class S>
void dual_path_backward(const View<const S>& d_out, const View<const S>& x, const View<const S>& out,
                        const DualPathSizes& sizes, const DualPathWeights<const Compute<S>>& weights,
                        const DualPathSaved<const Compute<S>>& saved, const View<S>& d_x, const View<S>& d_residual,
                        const DualPathWeights<Compute<S>>& d_weights, int threads) {
  using T = Compute<S>;
  const int64_t batch = x.shape.batch, channels = x.shape.channels;
  const bool planes = layout_of(d_out, x, out, d_x, d_residual) == Layout::planes;
  const DualPathPlan plan(x.shape, sizeof(S), planes, threads);
  // Without a residual there is no ReLU either; else pass A leaves its gradient where pass B finds it.
  const View<S>& masked = d_residual;
  const View<const S> dz =
      out.data ? View<const S>{masked.data,
                               masked.shape,
                               masked.batch_stride,
                               masked.channel_stride,
                               {masked.spatial_stride[0], masked.spatial_stride[1], masked.spatial_stride[2]}}
               : d_out;
  Scratch<double> sums(x.shape.batch * plan.ranges() * channels);
  const auto sums_of = [&](int64_t sample) { return sums.data() + sample * plan.ranges() * channels; };
  DualPathGradients<T> between(x.shape, sizes, plan.blocks(), weights.spatial_weight);
  const int64_t taps = 2 * between.of_map(sizes) + 1;
#pragma omp parallel num_threads(threads)
  {
    DualPathBackward<S> pass(d_out, x, out, sizes, weights, saved, d_x, d_residual, dz, between);
    plan.run([&](const Range& range,
                 int64_t number) { pass.reduce(range, planes, sums_of(range.sample) + number * channels); },
             [&](int64_t first, int64_t samples) { pass.channel_path(first, samples, sums_of(first), plan.ranges()); },
             [&](int64_t sample, int64_t block, int64_t first, int64_t end) {
               pass.spatial_path(sample, first, end, between.taps.data() + (sample * plan.blocks() + block) * taps);
             },
             [&](const Range& range) { pass.write(range, planes, plan.streaming); });
    linear_weight_gradient(between.gate_logit.data(), saved.hidden, batch, channels, sizes.hidden,
                           d_weights.gate_weight, d_weights.gate_bias);
    linear_weight_gradient(between.hidden.data(), saved.mean, batch, sizes.hidden, channels, d_weights.hidden_weight,
                           d_weights.hidden_bias);
#pragma omp for schedule(static) nowait
    for (int64_t k = 0; k < taps; ++k) {
      double sum = 0;
      for (int64_t block = 0; block < batch * plan.blocks(); ++block) sum += between.taps[block * taps + k];
      (k + 1 < taps ? d_weights.spatial_weight[k] : *d_weights.spatial_bias) = T(sum);
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
