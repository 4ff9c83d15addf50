// Pass 1: everything one read of the dense tensor yields. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Sum of exp(logit - top) * values over a range of positions, kept stable by the largest logit seen so far.
struct SoftmaxSum {
  double top = -std::numeric_limits<double>::infinity();
  double weight = 0;

  // Returns the factor by which everything summed so far shrinks.
  double raise(double candidate) {
    if (candidate <= top) return 1;
    const double factor = std::exp(top - candidate);
    top = candidate;
    weight *= factor;
    return factor;
  }
};

template <class T>
Scratch<T> with_padding(const T* values, int64_t count, int64_t size) {
  Scratch<T> result;
  result.fill(size, T(0));
  std::copy(values, values + count, result.data());
  return result;
}

// The context's weights as the right operand of a product with rows of channels.
template <class T>
struct ContextOperand {
  int64_t hidden;
  int64_t stride;     // hidden, in whole vectors
  Scratch<T> weight;  // [channels, stride]
  Scratch<T> bias;    // [stride]
  const T* pool_weight;

  ContextOperand(const Context<T>& context, int64_t channels)
      : hidden(context.hidden), stride(padded<T>(context.hidden)), pool_weight(context.pool_weight) {
    if (!hidden) return;
    weight.resize(channels * stride);
    transpose(context.weight, channels, hidden, channels, weight.data(), stride);
    bias = with_padding(context.bias, hidden, stride);
  }
  Right<T> right() const { return {weight.data(), stride}; }
};

// Adds the sums of (value - shift) and of its square over a tile's rows, for V vectors of channels: no cancellation
// when the mean is far from 0.
template <class T, int V, bool kSquares>
inline void add_moments_of(const Tile<T>& tile, int64_t rows, int64_t first, int64_t channels, const T* shift,
                           double* sums, double* squares) {
  constexpr int64_t lanes = Lanes<T>::count;
  Vector<T> sum[V] = {}, square[V] = {}, origin[V];
  for (int v = 0; v < V; ++v) origin[v] = load(shift + first + v * lanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < V; ++v) {
      const Vector<T> value = load(tile.data + r * tile.stride + first + v * lanes) - origin[v];
      sum[v] += value;
      if (kSquares) square[v] += value * value;
    }
  for (int v = 0; v < V; ++v) {
    const int64_t c = first + v * lanes, count = std::min(lanes, channels - c);
    add_lanes<T>(sum[v], sums + c, count);
    if (kSquares) add_lanes<T>(square[v], squares + c, count);
  }
}

template <class T, bool kSquares>
void add_moments(const Tile<T>& tile, int64_t rows, int64_t channels, const T* shift, double* sums, double* squares) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t first = 0;
  for (; first + kVectors * lanes <= channels; first += kVectors * lanes)
    add_moments_of<T, kVectors, kSquares>(tile, rows, first, channels, shift, sums, squares);
  for (; first < channels; first += lanes)
    add_moments_of<T, 1, kSquares>(tile, rows, first, channels, shift, sums, squares);
}

// What one range of positions contributes. Sums of many terms are kept in double.
template <class T>
struct RangeSums {
  double* sums;
  double* squares;  // null: not wanted
  double* pooled;
  SoftmaxSum* softmax;
};

template <class T>
class ContextPool {
 public:
  ContextPool(const ContextOperand<T>& context, int64_t channels)
      : context_(context), channels_(channels), tile_pooled_(context.stride) {
    if (context.pool_weight) activations_.resize(kTile * context.stride);
  }

  // `active`: where the bits of the tile's first position go, or null.
  void add(const Tile<T>& tile, int64_t rows, const RangeSums<T>& range, uint8_t* active) {
    const Left<T> left{tile.data, tile.stride, 1};
    tile_pooled_.fill(context_.stride, T(0));
    if (context_.pool_weight)
      add_softmax(left, rows, range);
    else if (active)
      multiply(left, context_.right(), rows, channels_, context_.stride,
               PoolReLU<T, true>{context_.bias.data(), tile_pooled_.data(), active, (context_.hidden + 7) / 8});
    else
      multiply(left, context_.right(), rows, channels_, context_.stride,
               PoolReLU<T, false>{context_.bias.data(), tile_pooled_.data(), nullptr, 0});
    for (int64_t j = 0; j < context_.hidden; ++j) range.pooled[j] += tile_pooled_[j];
  }

 private:
  void add_softmax(const Left<T>& left, int64_t rows, const RangeSums<T>& range) {
    const int64_t hidden = context_.hidden, stride = context_.stride;
    multiply(left, context_.right(), rows, channels_, stride,
             StoreReLU<T>{context_.bias.data(), activations_.data(), stride});
    T logits[kTile], top = -std::numeric_limits<T>::infinity();
    for (int64_t r = 0; r < rows; ++r) {
      T logit = 0;
      for (int64_t j = 0; j < hidden; ++j) logit += context_.pool_weight[j] * activations_[r * stride + j];
      logits[r] = logit;
      top = std::max(top, logit);
    }
    const double shrink = range.softmax->raise(top);
    for (int64_t j = 0; j < hidden; ++j) range.pooled[j] *= shrink;
    for (int64_t r = 0; r < rows; ++r) {
      const T share = T(std::exp(logits[r] - range.softmax->top));
      range.softmax->weight += share;
      for (int64_t j = 0; j < hidden; ++j) tile_pooled_[j] += share * activations_[r * stride + j];
    }
  }

  const ContextOperand<T>& context_;
  int64_t channels_;
  Scratch<T> tile_pooled_, activations_;
};

template <class S>
void statistics(const View<const S>& seg, const Context<Compute<S>>& context, const Statistics<Compute<S>>& out,
                int threads) {
  using T = Compute<S>;
  const int64_t channels = seg.shape.channels, hidden = context.hidden, count = seg.shape.positions();
  const int64_t stride = padded<T>(channels), active_bytes = (hidden + 7) / 8;
  const Partition partition(seg.shape, kTile);
  const Neighbours<T> neighbours(seg.shape, out.edges && layout_of(seg) == Layout::planes);
  const Offsets offsets(seg);
  const ContextOperand<T> operand(context, channels);

  const int64_t ranges = partition.ranges();
  std::vector<double> sums(ranges * channels), squares(out.variance ? ranges * channels : 0);
  std::vector<double> edges(ranges), pooled(ranges * hidden);
  std::vector<SoftmaxSum> softmax(ranges);

#pragma omp parallel num_threads(threads)
  {
    Scratch<T> scratch(kTile * stride), shift;
    shift.fill(stride, T(0));
    ContextPool<T> pool(operand, channels);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < ranges; ++index) {
      const Range range = partition.range(index);
      const S* first = seg.data + range.sample * seg.batch_stride;
      for (int64_t c = 0; c < channels; ++c) shift[c] = first[c * seg.channel_stride];
      const RangeSums<T> of_range{&sums[index * channels], out.variance ? &squares[index * channels] : nullptr,
                                  pooled.data() + index * hidden, &softmax[index]};
      for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
        const Range positions{range.sample, begin, std::min(begin + kTile, range.end)};
        const int64_t rows = positions.end - begin;
        const Tile<T> tile = read_tile(seg, offsets, positions, 0, channels, scratch.data(), stride);
        if (out.variance)
          add_moments<T, true>(tile, rows, channels, shift.data(), of_range.sums, of_range.squares);
        else
          add_moments<T, false>(tile, rows, channels, shift.data(), of_range.sums, nullptr);
        if (!hidden) continue;
        pool.add(tile, rows, of_range,
                 out.active ? out.active + (range.sample * count + begin) * active_bytes : nullptr);
      }
      if (out.edges) edges[index] = edge_sum(seg, offsets, neighbours, range);
    }
  }

  for (int64_t b = 0; b < seg.shape.batch; ++b) {
    const int64_t first = b * partition.per_sample(), last = first + partition.per_sample();
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, square = 0;
      for (int64_t i = first; i < last; ++i) {
        sum += sums[i * channels + c];
        if (out.variance) square += squares[i * channels + c];
      }
      const T origin = seg.data[b * seg.batch_stride + c * seg.channel_stride];
      const double shifted_mean = sum / count;
      out.mean[b * channels + c] = T(origin + shifted_mean);
      if (out.variance) out.variance[b * channels + c] = T(std::max(0.0, square / count - shifted_mean * shifted_mean));
    }
    if (out.edges) {
      double sum = 0;
      for (int64_t i = first; i < last; ++i) sum += edges[i];
      out.edges[b] = T(sum / (double(channels) * count));
    }
    if (!hidden) continue;
    SoftmaxSum all;
    if (context.pool_weight) {
      for (int64_t i = first; i < last; ++i) all.raise(softmax[i].top);
      for (int64_t i = first; i < last; ++i) all.weight += softmax[i].weight * std::exp(softmax[i].top - all.top);
      out.log_sum_exp[b] = T(all.top + std::log(all.weight));
    }
    for (int64_t j = 0; j < hidden; ++j) {
      double sum = 0;
      for (int64_t i = first; i < last; ++i)
        sum += pooled[i * hidden + j] * (context.pool_weight ? std::exp(softmax[i].top - all.top) : 1.0);
      out.pooled[b * hidden + j] = T(sum / (context.pool_weight ? all.weight : double(count)));
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
