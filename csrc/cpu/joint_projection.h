// ReLU(Wx x + Wg g + bias) as one product over both operands' channels, side by side. Compiled once per instruction set
// (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Calls f(range, rows before it) for each sample that the positions [begin, end) of a batch meet.
template <class F>
void for_each_sample(int64_t begin, int64_t end, int64_t positions, const F& f) {
  for (int64_t n = begin; n < end;) {
    const int64_t b = n / positions, last = std::min(end, (b + 1) * positions);
    f(Range{b, n - b * positions, last - b * positions}, n - begin);
    n = last;
  }
}

// The channels of two tensors of one size as rows of one matrix.
template <class S>
class JointRows {
  using T = Compute<S>;

 public:
  JointRows(const View<const S>& x, const View<const S>& g)
      : x_(x), g_(g), x_offsets_(x), g_offsets_(g), columns_(x.shape.channels + g.shape.channels) {}

  int64_t columns() const { return columns_; }
  // With room for the last vectors of both tensors.
  int64_t stride() const { return spread_stride<T>(columns_) + Lanes<T>::count; }
  void load(int64_t begin, int64_t end, T* rows) const {
    for_each_sample(begin, end, x_.shape.positions(), [&](const Range& range, int64_t before) {
      T* to = rows + before * stride();
      load_tile(x_, x_offsets_, range, 0, x_.shape.channels, to, stride());
      load_tile(g_, g_offsets_, range, 0, g_.shape.channels, to + x_.shape.channels, stride());
      for (int64_t r = 0; r < range.end - range.begin; ++r)
        std::fill(to + r * stride() + columns_, to + r * stride() + padded<T>(columns_), T(0));
    });
  }

 private:
  const View<const S>&x_, &g_;
  const Offsets x_offsets_, g_offsets_;
  const int64_t columns_;
};

template <class S>
void joint_projection(const View<const S>& x, const View<const S>& g, const JointWeights<const Compute<S>>& weights,
                      const View<S>& out, int threads) {
  using T = Compute<S>;
  const JointRows<S> source(x, g);
  const Offsets out_offsets(out);
  const int64_t outputs = out.shape.channels, stride = padded<T>(outputs), channels = x.shape.channels;
  const Pieces tiles(0, x.shape.batch * x.shape.positions(), kTile, kFewestTiles);
  Panels<T> panels(source.columns(), outputs);
  Scratch<T> bias;
  copy_padded(weights.bias, outputs, bias);
#pragma omp parallel num_threads(threads)
  {
    Scratch<T> rows(kTile * source.stride()), result(kTile * stride);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels.count(); ++p) {
      fill_transposed(panels, p, 0, weights.x_weight, channels, outputs, channels);
      fill_transposed(panels, p, channels, weights.g_weight, g.shape.channels, outputs, g.shape.channels);
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      const int64_t begin = tiles.begin(tile), end = tiles.end(tile);
      source.load(begin, end, rows.data());
      multiply_panels(Left<T>{rows.data(), source.stride(), 1}, panels, end - begin, bias.data(), result.data(),
                      stride);
      for (int64_t i = 0; i < (end - begin) * stride; i += Lanes<T>::count)
        store(&result[i], larger<T>(Vector<T>{}, load(&result[i])));  // lets NaN through, as torch does
      for_each_sample(begin, end, x.shape.positions(), [&](const Range& range, int64_t before) {
        store_tile(out, out_offsets, range, 0, outputs, &result[before * stride], stride);
      });
    }
  }
}

// Per band: dz = d_out where the ReLU passed; (d_x, d_g) = dz W, and dW = dz^T (x, g) over the band.
template <class S>
class JointBackward {
  using T = Compute<S>;

 public:
  JointBackward(const View<const S>& d_out, const View<const S>& out, const View<const S>& x, const View<const S>& g,
                const JointWeights<const T>& weights, const View<S>& d_x, const View<S>& d_g,
                const JointWeights<T>& d_weights)
      : d_out_(d_out),
        out_(out),
        d_x_(d_x),
        d_g_(d_g),
        weights_(weights),
        d_weights_(d_weights),
        d_out_offsets_(d_out),
        out_offsets_(out),
        d_x_offsets_(d_x),
        d_g_offsets_(d_g),
        source_(x, g),
        streaming_(outgrows_caches(d_x)),
        positions_(x.shape.positions()),
        channels_(x.shape.channels),
        outputs_(out.shape.channels),
        out_stride_(padded<T>(outputs_)),
        total_stride_(padded<T>(source_.columns())),
        bands_(bands_of_rows<T>(x.shape.batch * positions_, source_.stride())),
        panels_(outputs_, source_.columns()),
        strips_(bands_.largest(), outputs_),
        rows_(bands_.largest() * source_.stride()),
        total_(outputs_ * total_stride_) {
    int64_t tiles = 0;
    for (int64_t band = 0; band < bands_.count(); ++band) {
      first_tile_.push_back(tiles);
      tiles += tiles_of(band).count();
    }
    first_tile_.push_back(tiles);
    bias_sums_.resize(tiles * out_stride_);
    if (tiles == 0) total_.fill(outputs_ * total_stride_, T(0));
    zeros_.fill(total_stride_, T(0));
  }

  void run(int threads) {
#pragma omp parallel num_threads(threads)
    {
      Scratch<T> dz(kTile * out_stride_), out(kTile * out_stride_);
      Scratch<T> result(kTile * (total_stride_ + Lanes<T>::count));
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels_.count(); ++p) pack(p);
      for (int64_t band = 0; band < bands_.count(); ++band) {
        const Pieces tiles = tiles_of(band);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles.count(); ++tile)
          work_off(bands_.begin(band), tiles.begin(tile), tiles.end(tile),
                   &bias_sums_[(first_tile_[band] + tile) * out_stride_], dz.data(), out.data(), result.data());
        if (streaming_) end_streams();
        add_products(strips_, Right<T>{rows_.data(), source_.stride()}, bands_.end(band) - bands_.begin(band),
                     total_stride_, band == 0, total_.data(), total_stride_);
#pragma omp barrier
      }
      finish();
    }
  }

 private:
  Pieces tiles_of(int64_t band) const { return Pieces(bands_.begin(band), bands_.end(band), kTile, kFewestTiles); }

  void pack(int64_t p) {
    panels_.clear(p);
    const int64_t first = panels_.first_column(p), others = source_.columns() - channels_;
    for (int64_t o = 0; o < outputs_; ++o)
      for (int64_t c = first; c < std::min(first + panels_.kWidth, source_.columns()); ++c)
        panels_.panel(p)[o * panels_.kWidth + c - first] =
            c < channels_ ? weights_.x_weight[o * channels_ + c] : weights_.g_weight[o * others + c - channels_];
  }

  void work_off(int64_t origin, int64_t begin, int64_t end, T* bias_sums, T* dz, T* out, T* result) {
    const int64_t count = end - begin;
    source_.load(begin, end, &rows_[(begin - origin) * source_.stride()]);
    for_each_sample(begin, end, positions_, [&](const Range& range, int64_t before) {
      load_tile(d_out_, d_out_offsets_, range, 0, outputs_, dz + before * out_stride_, out_stride_);
      load_tile(out_, out_offsets_, range, 0, outputs_, out + before * out_stride_, out_stride_);
    });
    for (int64_t c = 0; c < out_stride_; c += Lanes<T>::count) {
      Vector<T> sum = {};
      for (int64_t i = c; i < count * out_stride_; i += out_stride_) {
        const Vector<T> passed = load(out + i) <= T(0) ? Vector<T>{} : load(dz + i);
        store(dz + i, passed);
        sum += passed;
      }
      store(bias_sums + c, sum);
    }
    strips_.set_rows(begin - origin, count, dz, out_stride_);
    multiply_panels(Left<T>{dz, out_stride_, 1}, panels_, count, zeros_.data(), result, total_stride_);
    for_each_sample(begin, end, positions_, [&](const Range& range, int64_t before) {
      const T* from = result + before * total_stride_;
      write_tile(d_x_, d_x_offsets_, range, from, total_stride_, streaming_);
      write_tile(d_g_, d_g_offsets_, range, from + channels_, total_stride_, streaming_);
    });
  }

  void finish() {
    const int64_t others = source_.columns() - channels_;
#pragma omp for schedule(static)
    for (int64_t o = 0; o < outputs_; ++o) {
      std::copy_n(&total_[o * total_stride_], channels_, d_weights_.x_weight + o * channels_);
      std::copy_n(&total_[o * total_stride_ + channels_], others, d_weights_.g_weight + o * others);
      double sum = 0;
      for (int64_t tile = 0; tile < first_tile_.back(); ++tile) sum += bias_sums_[tile * out_stride_ + o];
      d_weights_.bias[o] = T(sum);
    }
  }

  const View<const S>&d_out_, &out_;
  const View<S>&d_x_, &d_g_;
  const JointWeights<const T>& weights_;
  const JointWeights<T>& d_weights_;
  const Offsets d_out_offsets_, out_offsets_, d_x_offsets_, d_g_offsets_;
  const JointRows<S> source_;
  const bool streaming_;
  const int64_t positions_, channels_, outputs_, out_stride_, total_stride_;
  const Pieces bands_;
  std::vector<int64_t> first_tile_;  // of each band
  Panels<T> panels_;                 // [K, C + G]
  Strips<T> strips_;                 // [positions of a band, K]
  Scratch<T> rows_, total_;          // [positions of a band, C + G], [K, C + G]
  Scratch<T> bias_sums_, zeros_;
};

template <class S>
void joint_projection_backward(const View<const S>& d_out, const View<const S>& out, const View<const S>& x,
                               const View<const S>& g, const JointWeights<const Compute<S>>& weights,
                               const View<S>& d_x, const View<S>& d_g, const JointWeights<Compute<S>>& d_weights,
                               int threads) {
  JointBackward<S>(d_out, out, x, g, weights, d_x, d_g, d_weights).run(threads);
}

}  // namespace BTINET_ISA
}  // namespace btinet
