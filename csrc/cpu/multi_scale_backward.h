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

// out += product: the sums over a piece of the inner dimension are added up before they meet the total.
template <class T>
struct AddTo {
  using vector = Vector<T>;
  T* out;
  int64_t stride;

  vector start(int64_t, int64_t) const { return vector{}; }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    for (int r = 0; r < R; ++r) {
      T* to = out + (row + r) * stride + column;
      store(to, load(to) + sum[r]);
    }
  }
};

// The batch is worked off in bands that fit the outer cache: some whole samples, or some of the slabs of one. A slab is
// what lies side by side along the first axis of more than one position.
struct Band {
  int64_t sample, samples;
  int64_t begin, end;  // slabs, of each sample
};

class Bands {
 public:
  Bands(const Shape& shape, int64_t bytes_of_position)
      : slab_(shape.size[0] > 1 ? shape.size[1] * shape.size[2] : shape.size[2]) {
    slabs_ = shape.positions() / slab_;
    const int64_t fit = std::max<int64_t>(1, kBytes / (slab_ * bytes_of_position));
    if (fit >= slabs_) {
      for (int64_t b = 0; b < shape.batch; b += fit / slabs_)
        bands_.push_back({b, std::min(fit / slabs_, shape.batch - b), 0, slabs_});
    } else {
      const int64_t parts = (slabs_ + fit - 1) / fit;
      for (int64_t b = 0; b < shape.batch; ++b)
        for (int64_t part = 0; part < parts; ++part)
          bands_.push_back({b, 1, part * slabs_ / parts, (part + 1) * slabs_ / parts});
    }
  }

  int64_t slab() const { return slab_; }    // positions
  int64_t slabs() const { return slabs_; }  // of a sample
  auto begin() const { return bands_.begin(); }
  auto end() const { return bands_.end(); }
  // The most positions that a band holds, with the slabs that are kept from the band before.
  int64_t capacity(int64_t kept) const {
    int64_t most = 0;
    for (const Band& band : bands_)
      most = std::max(most, band.samples * (band.end - band.begin) + (band.begin > 0 ? kept : 0));
    return most * slab_;
  }

 private:
  static constexpr int64_t kBytes = 8 << 20;
  int64_t slab_, slabs_;
  std::vector<Band> bands_;
};

// Per band: u = the convolutions, v = the gradient that reaches them through M; then the gradient of M from u, and
// those of x and the taps from v. The last slabs of v wait for the next band.
template <class S>
class MultiScaleBackward {
  using T = Compute<S>;
  static constexpr int64_t lanes = Lanes<T>::count;
  static constexpr int64_t kReach = kDilations[kScales - 1];  // slabs
  static constexpr int64_t kGroup = 8;                        // slabs whose gradients one task computes
  static constexpr int64_t kOutputRows = 24;                  // of the gradient of M, computed by one task
  static constexpr int64_t kInner = 512;                      // positions of one product

 public:
  MultiScaleBackward(const View<const S>& x, const View<const S>& grad, const ScaleWeights<T>& weights,
                     const View<S>& out, const ScaleGradient<T>& gradient)
      : x_(x),
        grad_(grad),
        weights_(weights),
        out_(out),
        gradient_(gradient),
        shape_(x.shape),
        rows_(x.shape, weights.axes),
        of_x_(x),
        of_grad_(grad),
        out_offsets_(out),
        stride_(padded<T>(shape_.channels)),
        columns_(kScales * stride_),
        bands_(shape_, 2 * columns_ * int64_t(sizeof(T))),
        capacity_(bands_.capacity(2 * kReach)),
        merged_(weights.outputs, columns_),
        u_(capacity_, columns_),
        v_(capacity_ * columns_),
        d_merged_(weights.outputs * columns_),
        taps_(kScales * 3 * rows_.taps()),
        d_taps_(shape_.batch * taps_ * stride_),
        d_bias_(shape_.batch * of_grad_.stride()) {
    d_merged_.fill(weights.outputs * columns_, T(0));
    if (!of_x_.in_place()) staged_x_.resize(capacity_of_samples() * of_x_.stride());
    if (!of_grad_.in_place()) staged_grad_.resize(capacity_ * of_grad_.stride());
    tap_sums_.resize((capacity_ / bands_.slab() + kGroup) * taps_ * stride_);
    bias_sums_.resize((capacity_ / kScaleTile + shape_.batch + 1) * of_grad_.stride());
  }

  void run(int threads) {
#pragma omp parallel num_threads(threads)
    {
      pack_merged();
      Workspace own(*this);
      for (const Band& band : bands_) {
        const Kept kept = kept_before(band);
        if (band.begin == 0) stage_samples(band);
        transform(band, kept, own);
        add_merged(band);
        through_convolutions(band, kept, own);
        add_sums(band, kept);
        keep(band, kept);
      }
      finish();
    }
  }

 private:
  // What one thread needs for itself.
  struct Workspace {
    explicit Workspace(const MultiScaleBackward& of)
        : taps(of.weights_, of.shape_.channels, of.rows_.taps()),
          row(of.rows_.width() * lanes),
          tap_sums(of.taps_ * lanes) {}
    TapTable<T> taps;
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
    const int64_t begin = band.begin == 0 ? 0 : std::max<int64_t>(0, band.begin - kReach);
    const int64_t end = band.end == bands_.slabs() ? band.end : std::max<int64_t>(begin, band.end - kReach);
    return {std::max<int64_t>(0, begin - kReach), begin, end};
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
  int64_t tiles(const Band& band) const { return (length(band) + kScaleTile - 1) / kScaleTile; }
  int64_t length(const Band& band) const { return (band.end - band.begin) * bands_.slab(); }
  int64_t groups(const Kept& kept) const { return (kept.end - kept.begin + kGroup - 1) / kGroup; }

  void pack_merged() {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < merged_.count(); ++p) {
      std::fill_n(merged_.panel(p), weights_.outputs * merged_.kWidth, T(0));
      for (int64_t j = merged_.first_column(p); j < merged_.first_column(p) + merged_.width(p); ++j) {
        const int64_t scale = j / stride_, c = j % stride_;
        if (c >= shape_.channels) continue;
        for (int64_t o = 0; o < weights_.outputs; ++o)
          merged_.panel(p)[o * merged_.kWidth + j - merged_.first_column(p)] =
              weights_.merged[(o * kScales + scale) * shape_.channels + c];
      }
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
  PositionRows<T> grad_of(const Band& band, int64_t b) const {
    if (of_grad_.in_place()) return of_grad_.of_sample(b);
    const int64_t first = band.begin * bands_.slab();
    return {&staged_grad_[of_u(band, b, first) * of_grad_.stride()], of_grad_.stride(), first};
  }

  // u, v and the sums of the upstream gradient, tile by tile.
  void transform(const Band& band, const Kept& kept, Workspace& own) {
    const int64_t per_sample = tiles(band), last = band.end * bands_.slab();
#pragma omp for schedule(static)
    for (int64_t index = 0; index < band.samples * per_sample; ++index) {
      const int64_t b = band.sample + index / per_sample;
      const int64_t begin = band.begin * bands_.slab() + index % per_sample * kScaleTile;
      const Range tile{b, begin, std::min(begin + kScaleTile, last)};
      own.set_sample(b);
      convolve(
          x_of(band, b), rows_, own.taps, shape_.channels, tile.begin, tile.end,
          [&](int scale, int64_t c) { return u_.at(scale * stride_ + c) + of_u(band, b, begin) * u_.kWidth; },
          u_.kWidth);
      const PositionRows<T> grad = grad_of(band, b);
      if (!of_grad_.in_place()) of_grad_.copy(tile, const_cast<T*>(grad.at(begin)));
      T* v = &v_[of_v(band, kept, b, begin) * lanes];
      for (int64_t p = 0; p < merged_.count(); ++p)
        multiply(Left<T>{grad.at(begin), grad.step, 1}, merged_.right(p), tile.end - tile.begin, weights_.outputs,
                 merged_.width(p), StoreByVector<T>{v + merged_.first_column(p) / lanes * run(), run()});
      T* sums = &bias_sums_[index * of_grad_.stride()];
      for (int64_t o = 0; o < of_grad_.stride(); o += lanes) {
        Vector<T> sum = {};
        for (int64_t n = tile.begin; n < tile.end; ++n) sum += load(grad.at(n) + o);
        store(sums + o, sum);
      }
    }
  }

  int64_t run() const { return capacity_ * lanes; }

  void add_merged(const Band& band) {
    const int64_t row_tasks = (weights_.outputs + kOutputRows - 1) / kOutputRows;
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < u_.count() * row_tasks; ++task) {
      const int64_t p = task / row_tasks, first = task % row_tasks * kOutputRows;
      const int64_t outputs = std::min(kOutputRows, weights_.outputs - first);
      for (int64_t b = band.sample; b < band.sample + band.samples; ++b) {
        const PositionRows<T> grad = grad_of(band, b);
        for (int64_t n = band.begin * bands_.slab(); n < band.end * bands_.slab(); n += kInner) {
          const int64_t inner = std::min(kInner, band.end * bands_.slab() - n);
          multiply(Left<T>{grad.at(n) + first, 1, grad.step}, u_.right(p, of_u(band, b, n)), outputs, inner,
                   u_.width(p), AddTo<T>{&d_merged_[first * columns_ + u_.first_column(p)], columns_});
        }
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
    for (int i = 0; i < kScales; ++i) {
      const T* v = &v_[(i * stride_ + c) / lanes * run()];
      const auto row_of = [&](int r) -> const T* {
        const int64_t other = rows_.neighbour(row, r, -kDilations[i]);
        return other < 0 ? nullptr : v + of_v(band, kept, b, other * width) * lanes;
      };
      for_each_tap_rows(own.taps, rows_.taps(), i, c, row_of, [&](const auto& taps, const int* which, auto add) {
        constexpr int N = std::extent_v<std::remove_reference_t<decltype(taps.row)>>;
        Vector<T> sums[N][3] = {};
        const auto gradient = [&](auto adds) {
          gradient_row<decltype(adds)::value>(taps, kDilations[i], width, x.at(row * width) + c, x.step, own.row.data(),
                                              sums);
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
#pragma omp for schedule(static)
    for (int64_t o = 0; o < weights_.outputs; ++o)
      for (int64_t index = 0; index < band.samples * tiles(band); ++index)
        d_bias_[(band.sample + index / tiles(band)) * of_grad_.stride() + o] +=
            bias_sums_[index * of_grad_.stride() + o];
  }

  // Moves the slabs of v that the next band reads to its beginning.
  void keep(const Band& band, const Kept& kept) {
    if (band.end == bands_.slabs()) return;
    const int64_t first = std::max<int64_t>(0, kept.end - kReach);
    const int64_t from = (first - kept.first) * bands_.slab() * lanes,
                  count = (band.end - first) * bands_.slab() * lanes;
#pragma omp for schedule(static)
    for (int64_t vector = 0; vector < columns_ / lanes; ++vector)
      std::memmove(&v_[vector * run()], &v_[vector * run() + from], count * sizeof(T));
  }

  void finish() {
    const int64_t channels = shape_.channels, of_scale = taps_ / kScales;
#pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < weights_.outputs; ++o) {
      for (int i = 0; i < kScales; ++i)
        std::copy_n(&d_merged_[o * columns_ + i * stride_], channels, gradient_.merged + (o * kScales + i) * channels);
      for (int64_t b = 0; b < shape_.batch; ++b)
        gradient_.bias[b * weights_.outputs + o] = T(d_bias_[b * of_grad_.stride() + o]);
    }
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < taps_; ++t)
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t b = 0; b < shape_.batch; ++b)
          sum += weights_.share[b * kScales + t / of_scale] * d_taps_[(b * taps_ + t) * stride_ + c];
        gradient_.taps[t / of_scale][c * of_scale + t % of_scale] = T(sum);
      }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < shape_.batch * kScales; ++index) {
      const int64_t b = index / kScales, i = index % kScales;
      double sum = 0;
      for (int64_t t = i * of_scale; t < (i + 1) * of_scale; ++t)
        for (int64_t c = 0; c < channels; ++c)
          sum += weights_.taps[i][c * of_scale + t % of_scale] * d_taps_[(b * taps_ + t) * stride_ + c];
      gradient_.share[index] = T(sum);
    }
  }

  const View<const S>&x_, &grad_;
  const ScaleWeights<T>& weights_;
  const View<S>& out_;
  const ScaleGradient<T>& gradient_;
  const Shape shape_;
  const ImageRows rows_;
  const RowsOf<S> of_x_, of_grad_;
  const Offsets out_offsets_;
  const int64_t stride_, columns_;  // channels of x, of all scales, in whole vectors
  const Bands bands_;
  const int64_t capacity_;  // positions
  Panels<T> merged_;        // [outputs, columns]
  Panels<T> u_;             // [positions, columns]
  Scratch<T> v_;            // [columns / lanes, positions, lanes]
  Scratch<T> d_merged_;     // [outputs, columns]
  Scratch<T> staged_x_, staged_grad_, tap_sums_, bias_sums_;
  const int64_t taps_;  // of all scales
  std::vector<double> d_taps_, d_bias_;
};

template <class S>
void multi_scale_backward(const View<const S>& x, const View<const S>& grad, const ScaleWeights<Compute<S>>& weights,
                          const View<S>& out, const ScaleGradient<Compute<S>>& gradient, int threads) {
  MultiScaleBackward<S>(x, grad, weights, out, gradient).run(threads);
}

}  // namespace BTINET_ISA
}  // namespace btinet
