// The gradient of the dense tensor, tile by tile: grad * scale, what comes through mean, variance and edges, and a
// tile of products that reach it through the context. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

template <class S>
class DenseGradient {
  using T = Compute<S>;
  static constexpr int64_t kLongTile = 4 * kTile;

 public:
  DenseGradient(const View<const S>& seg, const View<const S>& grad, const T* scale, const T* mean,
                const StatisticsGradient<T>& gradient, const View<S>& out)
      : seg_(seg),
        grad_(grad),
        out_(out),
        seg_offsets_(seg),
        grad_offsets_(grad),
        out_offsets_(out),
        layout_(layout_of(seg, out)),
        neighbours_(seg.shape, gradient.edges && layout_ == Layout::planes),
        scale_(scale),
        mean_(mean),
        gradient_(gradient) {}

  const Offsets& seg_offsets() const { return seg_offsets_; }
  // Short tiles stay in the fastest cache; planes want longer runs of memory.
  int64_t longest_tile() const { return layout_ == Layout::planes ? kLongTile : kTile; }

  // What the elements of one sample have in common, per channel in whole vectors: the gradient is
  // grad * scale + constant + slope * (value - centre) + edges; multiplied out it would cancel.
  struct Sample {
    Scratch<T> scale, constant, slope, centre;
    T edges;
    bool has_slope;
    Scratch<T> turned;    // the products of a tile by channel
    Scratch<S> repacked;  // a gradient that lies in another layout
  };

  void set_sample(int64_t b, Sample& sample) const {
    const int64_t channels = seg_.shape.channels, stride = padded<T>(channels), count = seg_.shape.positions();
    for (auto* values : {&sample.scale, &sample.constant, &sample.slope, &sample.centre}) values->fill(stride, T(0));
    sample.has_slope = gradient_.variance;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t v = b * channels + c;
      sample.scale[c] = scale_[v];
      sample.constant[c] = gradient_.mean[v] / T(count);
      if (!sample.has_slope) continue;
      sample.slope[c] = T(2) * gradient_.variance[v] / T(count);
      sample.centre[c] = mean_[v];
    }
    sample.edges = gradient_.edges ? gradient_.edges[b] / (T(channels) * T(count)) : T(0);
  }

  // Writes the channels [first, first + columns) of up to longest_tile() positions; `products` [positions, stride] or
  // null.
  void write(const Range& positions, int64_t first, int64_t columns, const T* products, int64_t stride,
             Sample& sample) const {
    const Block block{positions, first, columns, products, stride};
    switch (layout_) {
      case Layout::rows:
        switch (gradient_.edges ? neighbours_.axes() : 0) {
          case 0:
            return write_rows<0>(block, sample);
          case 1:
            return write_rows<1>(block, sample);
          case 2:
            return write_rows<2>(block, sample);
          default:
            return write_rows<3>(block, sample);
        }
      case Layout::planes:
        return write_planes(block, sample);
      case Layout::scattered:
        return write_scattered(block, sample);
    }
  }

 private:
  struct Block {
    Range positions;
    int64_t first;
    int64_t columns;
    const T* products;
    int64_t stride;

    int64_t rows() const { return positions.end - positions.begin; }
  };

  // The gradient's values of a block with steps between positions and channels: in place, or brought into the layout.
  struct Upstream {
    const S* data;
    int64_t position_step;
    int64_t channel_step;
  };

  Upstream upstream(const Block& block, Sample& sample) const {
    const S* base = grad_.data + block.positions.sample * grad_.batch_stride + block.first * grad_.channel_stride;
    if (layout_of(grad_) == layout_ && grad_offsets_.even())
      return {base + grad_offsets_[block.positions.begin], grad_offsets_.step(), grad_.channel_stride};
    const bool rows = layout_ == Layout::rows;
    const int64_t position_step = rows ? block.columns : 1, channel_step = rows ? 1 : kLongTile;
    sample.repacked.resize(kLongTile * block.columns);
    for (int64_t c = 0; c < block.columns; ++c)
      for (int64_t r = 0; r < block.rows(); ++r)
        sample.repacked[r * position_step + c * channel_step] =
            base[grad_offsets_[block.positions.begin + r] + c * grad_.channel_stride];
    return {sample.repacked.data(), position_step, channel_step};
  }

  // Pointers to a position's values and to those of its neighbours along A axes; one that is missing is itself.
  template <int A>
  struct Star {
    const S* here;
    const S* next[A + 1];
    const S* previous[A + 1];
  };

  template <int A>
  void write_rows(const Block& block, Sample& sample) const {
    const int64_t begin = block.positions.begin;
    const S* base = seg_.data + block.positions.sample * seg_.batch_stride + block.first;
    S* target = out_.data + block.positions.sample * out_.batch_stride + block.first;
    const Upstream up = upstream(block, sample);
    const bool whole = block.columns == kVectors * Lanes<T>::count && !sample.has_slope && block.products;
    Vector<T> carried[kVectors] = {};
    bool carries = false;
    auto walk = neighbours_.walk_from(begin);
    for (int64_t r = 0; r < block.rows(); ++r, walk.advance()) {
      Star<A> star;
      star.here = base + seg_offsets_[begin + r];
      for (int a = 0; a < A; ++a) {
        const int64_t step = neighbours_.step(a);
        star.next[a] = walk.has_next(a) ? base + seg_offsets_[begin + r + step] : star.here;
        star.previous[a] = walk.has_previous(a) ? base + seg_offsets_[begin + r - step] : star.here;
      }
      const S* from = up.data + r * up.position_step;
      S* to = target + out_offsets_[begin + r];
      if (whole)
        write_row<A>(star, from, block, r, sample, carries, carried, to);
      else
        write_any_row<A>(star, from, block, r, sample, to);
      carries = A > 0 && walk.has_next(0);
    }
  }

  template <int A, class P>
  static Vector<T> edges_of(const Star<A>& star, Vector<T> value, Vector<T> edges, int64_t c, P part) {
    Vector<T> sum = {};
    for (int a = 0; a < A; ++a)
      sum += with_sign_of<T>(edges, value - load(star.previous[a] + c, part)) -
             with_sign_of<T>(edges, load(star.next[a] + c, part) - value);
    return sum;
  }

  // A whole chunk of channels, without a gradient of the variance: the case that matters, unrolled. The slope towards
  // the next position along the first axis is carried over to that position.
  template <int A>
  static void write_row(const Star<A>& star, const S* from, const Block& block, int64_t r, const Sample& sample,
                        bool carries, Vector<T> (&carried)[kVectors], S* to) {
    constexpr int64_t lanes = Lanes<T>::count;
    const T *products = block.products + r * block.stride, *scale = &sample.scale[block.first];
    const T* constant = &sample.constant[block.first];
    const Vector<T> edges = broadcast(sample.edges);
    if (A > 0 && !carries)
      for (int v = 0; v < kVectors; ++v)
        carried[v] = with_sign_of<T>(edges, load(star.here + v * lanes) - load(star.previous[0] + v * lanes));
    Vector<T> result[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = v * lanes;
      result[v] = load(from + c) * load(scale + c) + load(constant + c) + load(products + c);
      if (A == 0) continue;
      const Vector<T> value = load(star.here + c);
      const Vector<T> slope = with_sign_of<T>(edges, load(star.next[0] + c) - value);
      result[v] += carried[v] - slope;
      carried[v] = slope;
      for (int a = 1; a < A; ++a)
        result[v] += with_sign_of<T>(edges, value - load(star.previous[a] + c)) -
                     with_sign_of<T>(edges, load(star.next[a] + c) - value);
    }
    for (int v = 0; v < kVectors; ++v) store(to + v * lanes, result[v]);
  }

  template <int A>
  static void write_any_row(const Star<A>& star, const S* from, const Block& block, int64_t r, const Sample& sample,
                            S* to) {
    const Vector<T> edges = broadcast(sample.edges);
    for_each_vector<T>(block.columns, [&](int64_t c, auto part) {
      const int64_t channel = block.first + c;
      const Vector<T> value = load(star.here + c, part);
      Vector<T> result = load(from + c, part) * load(&sample.scale[channel]) + load(&sample.constant[channel]);
      if (sample.has_slope) result += load(&sample.slope[channel]) * (value - load(&sample.centre[channel]));
      if (A > 0) result += edges_of<A>(star, value, edges, c, part);
      if (block.products) result += load(block.products + r * block.stride + c);
      store(to + c, result, part);
    });
  }

  // The vector at plane[n] of `count` values; zero before the first and after the last.
  static Vector<T> load_within(const S* plane, int64_t n, int64_t count) {
    if (n >= 0 && n + Lanes<T>::count <= count) return load(plane + n);
    S buffer[Lanes<T>::count] = {};
    const int64_t start = std::max<int64_t>(0, -n), end = std::min(Lanes<T>::count, count - n);
    for (int64_t i = start; i < end; ++i) buffer[i] = plane[n + i];
    return load(buffer);
  }

  void write_planes(const Block& block, Sample& sample) const {
    if (block.products) {
      sample.turned.resize(block.columns * kLongTile);
      transpose(block.products, block.stride, block.rows(), block.columns, sample.turned.data(), kLongTile);
    }
    switch (gradient_.edges ? neighbours_.axes() : 0) {
      case 0:
        return write_turned<0>(block, sample);
      case 1:
        return write_turned<1>(block, sample);
      case 2:
        return write_turned<2>(block, sample);
      default:
        return write_turned<3>(block, sample);
    }
  }

  template <int A>
  void write_turned(const Block& block, Sample& sample) const {
    using bits = typename Lanes<T>::bits;
    const Upstream up = upstream(block, sample);
    const int64_t begin = block.positions.begin, count = neighbours_.count();
    const int64_t reach = A > 0 ? neighbours_.step(A - 1) : 0;
    const Vector<T> edges = broadcast(sample.edges);
    for (int64_t i = 0; i < block.columns; ++i) {
      const int64_t c = block.first + i;
      const S* plane = seg_.data + block.positions.sample * seg_.batch_stride + c * seg_.channel_stride;
      S* to = out_.data + block.positions.sample * out_.batch_stride + c * out_.channel_stride + begin;
      const S* from = up.data + i * up.channel_step;
      const T* products = block.products ? &sample.turned[i * kLongTile] : nullptr;
      prefetch_run<false>(plane + seg_.channel_stride + begin + reach, block.rows());
      prefetch_run<false>(from + up.channel_step, block.rows());
      prefetch_run<true>(to + out_.channel_stride, block.rows());
      const T scale = sample.scale[c], constant = sample.constant[c], slope = sample.slope[c];
      const T centre = sample.centre[c];
      for_each_vector<T>(block.rows(), [&](int64_t r, auto part) {
        const int64_t n = begin + r;
        Vector<T> result = load(from + r, part) * scale + constant;
        if (A > 0 || sample.has_slope) {
          const Vector<T> value = load_within(plane, n, count);
          if (sample.has_slope) result += slope * (value - centre);
          for (int a = 0; a < A; ++a) {
            const int64_t step = neighbours_.step(a);
            const bits down = bits(with_sign_of<T>(edges, value - load_within(plane, n - step, count)));
            const bits up = bits(with_sign_of<T>(edges, load_within(plane, n + step, count) - value));
            result += Vector<T>(down & neighbours_.has_next(a, n - step)) - Vector<T>(up & neighbours_.has_next(a, n));
          }
        }
        if (products) result += load(products + r);
        store(to + r, result, part);
      });
    }
  }

  void write_scattered(const Block& block, const Sample& sample) const {
    const int64_t b = block.positions.sample;
    auto walk = neighbours_.walk_from(block.positions.begin);
    for (int64_t r = 0; r < block.rows(); ++r, walk.advance()) {
      const int64_t n = block.positions.begin + r;
      for (int64_t i = 0; i < block.columns; ++i) {
        const int64_t c = block.first + i;
        const S* channel = seg_.data + b * seg_.batch_stride + c * seg_.channel_stride;
        const T value = channel[seg_offsets_[n]];
        const T up = grad_.data[b * grad_.batch_stride + c * grad_.channel_stride + grad_offsets_[n]];
        T result = up * sample.scale[c] + (sample.constant[c] + sample.slope[c] * (value - sample.centre[c]));
        for (int a = 0; gradient_.edges && a < neighbours_.axes(); ++a) {
          const int64_t step = neighbours_.step(a);
          if (walk.has_previous(a)) result += sample.edges * sign(value - T(channel[seg_offsets_[n - step]]));
          if (walk.has_next(a)) result -= sample.edges * sign(T(channel[seg_offsets_[n + step]]) - value);
        }
        if (block.products) result += block.products[r * block.stride + i];
        out_.data[b * out_.batch_stride + c * out_.channel_stride + out_offsets_[n]] = stored<S>(result);
      }
    }
  }

  static T sign(T value) { return T(value > T(0)) - T(value < T(0)); }

  View<const S> seg_, grad_;
  View<S> out_;
  Offsets seg_offsets_, grad_offsets_, out_offsets_;
  Layout layout_;
  Neighbours<T> neighbours_;
  const T *scale_, *mean_;
  StatisticsGradient<T> gradient_;
};

}  // namespace BTINET_ISA
}  // namespace btinet
