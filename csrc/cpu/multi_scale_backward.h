// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// out = product, whole vectors of columns, each vector's column in a run of positions of its own.
template <class T>
struct StoreByVector {
  using vector = Vector<T>;
  T* out;
  int64_t run;  // elements between vectors of columns

  vector start(int64_t, int64_t) const { return vector{}; }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    T* to = out + column / Lanes<T>::count * run + row * Lanes<T>::count;
    for (int r = 0; r < R; ++r) store(to + r * Lanes<T>::count, sum[r]);
  }
};

// Per band: u = the convolutions, v = the gradient that reaches them; then the weights' gradients from u, and those of
// x and the taps from v. The last slabs of v wait for the next band. A name d_z is the gradient of z.
template <class S>
class MultiScaleBackward {
  using T = Compute<S>;
  static constexpr int64_t lanes = Lanes<T>::count;
  static constexpr int64_t kGroup = 8;          // slabs whose gradients one task computes
  static constexpr int64_t kBlock = 8 * lanes;  // channels whose gradients one task computes
  static constexpr int64_t kPieces = 16;        // in which v is moved
  static constexpr int64_t kStrips = 3;         // of a weight's gradient, computed by one task
  static constexpr int64_t kPositions = 256;    // that one product sums over

 public:
  MultiScaleBackward(const View<const S>& x, const View<const S>& grad, const View<const S>& between,
                     const Arriving<S>& arriving, const ScaleWeights<T>& weights, const View<S>& out,
                     const ScaleGradient<T>& gradient)
      : weights_(weights),
        out_(out),
        gradient_(gradient),
        shape_(x.shape),
        rows_(x.shape, weights.axes),
        of_x_(x),
        of_grad_(grad),
        of_between_(between),
        arriving_(arriving),
        of_value_(arriving.value),
        reach_(weights.reach()),
        out_offsets_(out),
        stride_(padded<T>(shape_.channels)),
        columns_(weights.scales * stride_),
        middle_stride_(padded<T>(weights.middle)),
        bands_(shape_, 2 * columns_ * int64_t(sizeof(T))),
        capacity_(bands_.capacity(2 * reach_)),
        pointwise_(weights.middle, columns_),
        fusion_(weights.outputs, weights.fusion ? weights.middle : 0),
        u_(capacity_, columns_),
        t_(capacity_, weights.fusion ? weights.middle : 0),
        d_t_(capacity_, weights.middle),
        d_y_(capacity_, weights.fusion ? weights.outputs : 0),
        v_(capacity_ * columns_),
        taps_(weights.scales * 3 * rows_.taps()),
        d_taps_(shape_.batch * taps_ * stride_),
        d_bias_(shape_.batch * middle_stride_),
        d_fusion_bias_(of_grad_.stride()) {
    factors_.fill(3 * of_grad_.stride(), T(0));
    const T* given[] = {arriving.factor, arriving.slope, arriving.addend};
    for (int i = 0; i < 3; ++i)
      if (given[i]) std::copy_n(given[i], grad.shape.channels, &factors_[i * of_grad_.stride()]);
    d_pointwise_.fill(weights.middle * columns_, T(0));
    if (weights.fusion) d_fusion_.fill(weights.outputs * middle_stride_, T(0));
    if (!of_x_.in_place()) staged_x_.resize(capacity_of_samples() * of_x_.stride());
    tap_sums_.resize((capacity_ / bands_.slab() + kGroup) * taps_ * stride_);
    bias_sums_.resize((capacity_ / kScaleTile + shape_.batch + 1) * (middle_stride_ + of_grad_.stride()));
  }

  void run(int threads) {
#pragma omp parallel num_threads(threads)
    {
      pack_weights();
      Workspace own(*this);
      for (const Band& band : bands_) {
        const Kept kept = kept_before(band);
        if (band.begin == 0) stage_samples(band);
        transform(band, kept, own);
        add_products(band, u_, d_t_, d_pointwise_.data(), columns_);
        if (weights_.fusion) add_products(band, t_, d_y_, d_fusion_.data(), middle_stride_);
        through_convolutions(band, kept, own);
        add_sums(band, kept);
        keep(band, kept);
#pragma omp barrier
      }
      finish();
    }
  }

 private:
  // What one thread needs for itself.
  struct Workspace {
    explicit Workspace(const MultiScaleBackward& of)
        : taps(of.weights_, of.shape_.channels, of.rows_.taps()),
          grad(of.of_grad_.in_place() ? 0 : kScaleTile * of.of_grad_.stride()),
          value(of.passes_through() && !of.of_value_.in_place() ? kScaleTile * of.of_grad_.stride() : 0),
          arriving(of.passes_through() ? kScaleTile * of.of_grad_.stride() : 0),
          d_t(of.weights_.fusion ? kScaleTile * of.middle_stride_ : 0),
          row(of.rows_.width() * lanes),
          tap_sums(of.taps_ * lanes) {
      if (of.weights_.fusion) zeros.fill(of.middle_stride_, T(0));
      if (of.weights_.fusion && !of.of_between_.in_place()) between.resize(kScaleTile * of.middle_stride_);
    }
    TapTable<T> taps;
    Scratch<T> grad, value, arriving, d_t, between, zeros;
    Scratch<T> row;       // of the gradient of x, one vector of channels
    Scratch<T> tap_sums;  // one vector of channels
    int64_t sample = -1;

    void set_sample(int64_t b) {
      if (b != sample) taps.set_sample(sample = b);
    }
  };

  // Slabs whose v is there from the band before, and where the gradient of x begins and ends.
  struct Kept {
    int64_t first;       // slab with which v begins
    int64_t begin, end;  // slabs whose gradient of x this band completes
  };

  Kept kept_before(const Band& band) const {
    const int64_t begin = band.begin == 0 ? 0 : std::max<int64_t>(0, band.begin - reach_);
    const int64_t end = band.end == bands_.slabs() ? band.end : std::max<int64_t>(begin, band.end - reach_);
    return {std::max<int64_t>(0, begin - reach_), begin, end};
  }
  // Of a sample's position among the band's u, and among its v.
  int64_t of_u(const Band& band, int64_t b, int64_t n) const {
    return (b - band.sample) * shape_.positions() + n - band.begin * bands_.slab();
  }
  int64_t of_v(const Band& band, const Kept& kept, int64_t b, int64_t n) const {
    return (b - band.sample) * shape_.positions() + n - kept.first * bands_.slab();
  }
  int64_t capacity_of_samples() const {
    int64_t most = 1;
    for (const Band& band : bands_) most = std::max(most, band.samples);
    return most * shape_.positions();
  }
  int64_t tiles(const Band& band) const {
    const int64_t size = scale_tile(length(band));
    return (length(band) + size - 1) / size;
  }
  int64_t length(const Band& band) const { return (band.end - band.begin) * bands_.slab(); }
  int64_t groups(const Kept& kept) const { return (kept.end - kept.begin + kGroup - 1) / kGroup; }

  void pack_weights() {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pointwise_.count(); ++p) {
      pointwise_.clear(p);
      const int64_t first = pointwise_.first_column(p);
      for (int64_t j = first; j < first + pointwise_.width(p); ++j) {
        const int64_t scale = j / stride_, c = j % stride_;
        if (c >= shape_.channels) continue;
        for (int64_t o = 0; o < weights_.middle; ++o)
          pointwise_.panel(p)[o * pointwise_.kWidth + j - first] =
              weights_.pointwise[scale][o * weights_.pointwise_stride + c];
      }
    }
    if (!weights_.fusion) return;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < fusion_.count(); ++p) {
      fusion_.clear(p);
      const int64_t first = fusion_.first_column(p), wide = std::min(fusion_.kWidth, weights_.middle - first);
      for (int64_t o = 0; o < weights_.outputs; ++o)
        std::copy_n(weights_.fusion + o * weights_.middle + first, wide, fusion_.panel(p) + o * fusion_.kWidth);
    }
  }

  void stage_samples(const Band& band) {
    if (of_x_.in_place()) return;
    const int64_t tiles = (shape_.positions() + kScaleTile - 1) / kScaleTile;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < band.samples * tiles; ++index) {
      const int64_t b = index / tiles, begin = index % tiles * kScaleTile;
      of_x_.copy({band.sample + b, begin, std::min(begin + kScaleTile, shape_.positions())},
                 &staged_x_[(b * shape_.positions() + begin) * of_x_.stride()]);
    }
  }
  PositionRows<T> x_of(const Band& band, int64_t b) const {
    if (of_x_.in_place()) return of_x_.of_sample(b);
    return {&staged_x_[(b - band.sample) * shape_.positions() * of_x_.stride()], of_x_.stride(), 0};
  }

  // A tile of a tensor in rows, copied into scratch where it does not lie so.
  static PositionRows<T> rows_of(const RowsOf<S>& of, const Range& tile, Scratch<T>& scratch) {
    if (of.in_place()) return of.of_sample(tile.sample);
    of.copy(tile, scratch.data());
    return {scratch.data(), of.stride(), tile.begin};
  }

  // u, v and what the weights' gradients are made of, tile by tile.
  void transform(const Band& band, const Kept& kept, Workspace& own) {
    const int64_t per_sample = tiles(band), size = scale_tile(length(band)), last = band.end * bands_.slab();
#pragma omp for schedule(static)
    for (int64_t index = 0; index < band.samples * per_sample; ++index) {
      const int64_t b = band.sample + index / per_sample;
      const int64_t begin = band.begin * bands_.slab() + index % per_sample * size;
      const Range tile{b, begin, std::min(begin + size, last)};
      const int64_t count = tile.end - tile.begin, at = of_u(band, b, begin);
      own.set_sample(b);
      convolve(
          x_of(band, b), rows_, weights_, own.taps, shape_.channels, tile.begin, tile.end,
          [&](int scale, int64_t c) { return u_.at(scale * stride_ + c) + at * u_.kWidth; }, u_.kWidth);
      T* sums = &bias_sums_[index * (middle_stride_ + of_grad_.stride())];
      PositionRows<T> d_t = arriving_at(tile, own);
      if (weights_.fusion) {
        d_y_.set_rows(at, count, d_t.at(begin), d_t.step);
        add_rows(d_t, tile, of_grad_.stride(), sums + middle_stride_);
        const PositionRows<T> t = rows_of(of_between_, tile, own.between);
        for (int64_t c = 0; c < middle_stride_; c += lanes)
          for (int64_t n = 0; n < count; ++n) store(t_.at(c) + (at + n) * t_.kWidth, load(t.at(begin + n) + c));
        multiply_panels(Left<T>{d_t.at(begin), d_t.step, 1}, fusion_, count, own.zeros.data(), own.d_t.data(),
                        middle_stride_);
        d_t = {own.d_t.data(), middle_stride_, begin};
      }
      d_t_.set_rows(at, count, d_t.at(begin), d_t.step);
      add_rows(d_t, tile, middle_stride_, sums);
      T* v = &v_[of_v(band, kept, b, begin) * lanes];
      for (int64_t p = 0; p < pointwise_.count(); ++p)
        multiply(Left<T>{d_t.at(begin), d_t.step, 1}, pointwise_.right(p), count, weights_.middle, pointwise_.width(p),
                 StoreByVector<T>{v + pointwise_.first_column(p) / lanes * run(), run()});
    }
  }

  // A tile of the gradient that reaches what the product gave.
  PositionRows<T> arriving_at(const Range& tile, Workspace& own) {
    const PositionRows<T> grad = rows_of(of_grad_, tile, own.grad);
    if (!passes_through()) return grad;
    const PositionRows<T> value = rows_of(of_value_, tile, own.value);
    const int64_t stride = of_grad_.stride();
    for (int64_t n = tile.begin; n < tile.end; ++n) {
      T* to = &own.arriving[(n - tile.begin) * stride];
      for (int64_t c = 0; c < stride; c += lanes) {
        const Vector<T> of_value = load(value.at(n) + c);
        Vector<T> sum = load(grad.at(n) + c);
        if (arriving_.factor)
          sum = load(&factors_[c]) * sum + load(&factors_[stride + c]) * of_value + load(&factors_[2 * stride + c]);
        if (arriving_.relu) sum = of_value <= T(0) ? Vector<T>{} : sum;
        store(to + c, sum);
      }
    }
    return {own.arriving.data(), stride, tile.begin};
  }
  bool passes_through() const { return arriving_.relu || arriving_.factor; }

  // out = the sums of the tile's rows.
  static void add_rows(const PositionRows<T>& rows, const Range& tile, int64_t columns, T* out) {
    for (int64_t c = 0; c < columns; c += lanes) {
      Vector<T> sum = {};
      for (int64_t n = tile.begin; n < tile.end; ++n) sum += load(rows.at(n) + c);
      store(out + c, sum);
    }
  }

  int64_t run() const { return capacity_ * lanes; }

  // out [columns of left, columns of right] += the products of the band's positions.
  void add_products(const Band& band, const Panels<T>& right, const Strips<T>& left, T* out, int64_t stride) {
    const int64_t strips = (left.columns() + kRows - 1) / kRows, tasks = (strips + kStrips - 1) / kStrips;
    const int64_t positions = band.samples * length(band);
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < right.count() * tasks; ++task) {
      const int64_t p = task / tasks, begin = task % tasks * kStrips;
      for (int64_t n = 0; n < positions; n += kPositions)
        for (int64_t strip = begin; strip < std::min(begin + kStrips, strips); ++strip) {
          const int64_t row = strip * kRows;
          multiply(left.left(row, n), right.right(p, n), std::min<int64_t>(kRows, left.columns() - row),
                   std::min(kPositions, positions - n), right.width(p),
                   AddTo<T>{out + row * stride + right.first_column(p), stride});
        }
    }
  }

  // The gradients of x and of the taps, by groups of slabs and vectors of channels.
  void through_convolutions(const Band& band, const Kept& kept, Workspace& own) {
    const int64_t vectors = stride_ / lanes, per_sample = groups(kept) * vectors;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < band.samples * per_sample; ++task) {
      const int64_t b = band.sample + task / per_sample, group = task % per_sample / vectors,
                    c = task % vectors * lanes;
      const int64_t begin = kept.begin + group * kGroup, end = std::min(begin + kGroup, kept.end);
      own.set_sample(b);
      std::fill_n(own.tap_sums.data(), taps_ * lanes, T(0));
      const int64_t rows_of_slab = bands_.slab() / rows_.width();
      for (int64_t row = begin * rows_of_slab; row < end * rows_of_slab; ++row)
        gradient_of_row(band, kept, b, row, c, own);
      T* sums = &tap_sums_[((b - band.sample) * groups(kept) + group) * taps_ * stride_];
      for (int64_t t = 0; t < taps_; ++t) store(sums + t * stride_ + c, load(&own.tap_sums[t * lanes]));
    }
  }

  void gradient_of_row(const Band& band, const Kept& kept, int64_t b, int64_t row, int64_t c, Workspace& own) {
    const int64_t width = rows_.width();
    const PositionRows<T> x = x_of(band, b);
    for (int i = 0; i < weights_.scales; ++i) {
      const T* v = &v_[(i * stride_ + c) / lanes * run()];
      const auto row_of = [&](int r) -> const T* {
        const int64_t other = rows_.neighbour(row, r, -weights_.dilations[i]);
        return other < 0 ? nullptr : v + of_v(band, kept, b, other * width) * lanes;
      };
      for_each_tap_rows(own.taps, rows_.taps(), i, c, row_of, [&](const auto& taps, const int* which, auto add) {
        constexpr int N = std::extent_v<std::remove_reference_t<decltype(taps.row)>>;
        Vector<T> sums[N][3] = {};
        const auto gradient = [&](auto adds) {
          gradient_row<decltype(adds)::value>(taps, weights_.dilations[i], width, x.at(row * width) + c, x.step,
                                              own.row.data(), sums);
        };
        if (i == 0)
          gradient(add);
        else
          gradient(std::true_type{});
        for (int n = 0; n < N; ++n)
          for (int t = 0; t < 3; ++t) {
            T* total = &own.tap_sums[((i * rows_.taps() + which[n]) * 3 + t) * lanes];
            store(total, load(total) + sums[n][t]);
          }
      });
    }
    store_tile(out_, out_offsets_, {b, row * width, row * width + width}, c, std::min(lanes, shape_.channels - c),
               own.row.data(), lanes);
  }

  // In the order of the batch, whoever computed them.
  void add_sums(const Band& band, const Kept& kept) {
    const int64_t size = taps_ * stride_;
#pragma omp for schedule(static) nowait
    for (int64_t k = 0; k < size; ++k)
      for (int64_t index = 0; index < band.samples * groups(kept); ++index)
        d_taps_[(band.sample + index / groups(kept)) * size + k] += tap_sums_[index * size + k];
#pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < middle_stride_ + of_grad_.stride(); ++o)
      for (int64_t index = 0; index < band.samples * tiles(band); ++index) {
        const T sum = bias_sums_[index * (middle_stride_ + of_grad_.stride()) + o];
        if (o < middle_stride_)
          d_bias_[(band.sample + index / tiles(band)) * middle_stride_ + o] += sum;
        else if (weights_.fusion)
          d_fusion_bias_[o - middle_stride_] += sum;
      }
  }

  // Moves the slabs of v that the next band reads to its beginning.
  void keep(const Band& band, const Kept& kept) {
    if (band.end == bands_.slabs()) return;
    const int64_t first = std::max<int64_t>(0, kept.end - reach_);
    const int64_t from = (first - kept.first) * bands_.slab() * lanes,
                  count = (band.end - first) * bands_.slab() * lanes;
#pragma omp for schedule(static) nowait
    for (int64_t vector = 0; vector < columns_ / lanes; ++vector)
      std::memmove(&v_[vector * run()], &v_[vector * run() + from], count * sizeof(T));
  }

  void finish() {
    const int64_t channels = shape_.channels, of_scale = taps_ / weights_.scales;
#pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < weights_.middle; ++o) {
      for (int i = 0; i < weights_.scales; ++i)
        std::copy_n(&d_pointwise_[o * columns_ + i * stride_], channels,
                    gradient_.pointwise[i] + o * gradient_.pointwise_stride);
      double sum = 0;
      for (int64_t b = 0; b < shape_.batch; ++b) {
        sum += d_bias_[b * middle_stride_ + o];
        if (weights_.share) gradient_.bias[b * weights_.middle + o] = T(d_bias_[b * middle_stride_ + o]);
      }
      if (!weights_.share && gradient_.bias) gradient_.bias[o] = T(sum);  // an empty batch has neither
    }
    if (weights_.fusion) {
#pragma omp for schedule(static) nowait
      for (int64_t o = 0; o < weights_.outputs; ++o) {
        std::copy_n(&d_fusion_[o * middle_stride_], weights_.middle, gradient_.fusion + o * weights_.middle);
        gradient_.fusion_bias[o] = T(d_fusion_bias_[o]);
      }
    }
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < taps_; ++t)
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t b = 0; b < shape_.batch; ++b)
          sum += share(b, t / of_scale) * d_taps_[(b * taps_ + t) * stride_ + c];
        gradient_.taps[t / of_scale][c * of_scale + t % of_scale] = T(sum);
      }
    if (!gradient_.share) return;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < shape_.batch * weights_.scales; ++index) {
      const int64_t b = index / weights_.scales, i = index % weights_.scales;
      double sum = 0;
      for (int64_t t = i * of_scale; t < (i + 1) * of_scale; ++t)
        for (int64_t c = 0; c < channels; ++c)
          sum += weights_.taps[i][c * of_scale + t % of_scale] * d_taps_[(b * taps_ + t) * stride_ + c];
      gradient_.share[index] = T(sum);
    }
  }

  double share(int64_t b, int64_t scale) const {
    return weights_.share ? weights_.share[b * weights_.scales + scale] : 1.0;
  }

  const ScaleWeights<T>& weights_;
  const View<S>& out_;
  const ScaleGradient<T>& gradient_;
  const Shape shape_;
  const ImageRows rows_;
  const RowsOf<S> of_x_, of_grad_, of_between_;
  const Arriving<S>& arriving_;
  const RowsOf<S> of_value_;
  const int64_t reach_;  // slabs
  const Offsets out_offsets_;
  const int64_t stride_, columns_, middle_stride_;  // channels of x, of all scales, of t, in whole vectors
  const Bands bands_;
  const int64_t capacity_;             // positions
  Panels<T> pointwise_, fusion_;       // [middle, columns], [outputs, middle]
  Panels<T> u_, t_;                    // [positions, columns], [positions, middle]
  Strips<T> d_t_, d_y_;                // [positions, middle], [positions, outputs]
  Scratch<T> v_;                       // [columns / lanes, positions, lanes]
  Scratch<T> d_pointwise_, d_fusion_;  // [middle, columns], [outputs, middle_stride]
  Scratch<T> staged_x_, tap_sums_, bias_sums_;
  Scratch<T> factors_;  // factor, slope, addend [3, outputs]
  const int64_t taps_;  // of all scales
  std::vector<double> d_taps_, d_bias_, d_fusion_bias_;
};

template <class S>
void multi_scale_backward(const View<const S>& x, const View<const S>& grad, const View<const S>& between,
                          const Arriving<S>& arriving, const ScaleWeights<Compute<S>>& weights, const View<S>& out,
                          const ScaleGradient<Compute<S>>& gradient, int threads) {
  MultiScaleBackward<S>(x, grad, between, arriving, weights, out, gradient).run(threads);
}

}  // namespace BTINET_ISA
}  // namespace btinet
