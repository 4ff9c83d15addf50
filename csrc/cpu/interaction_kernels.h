// The passes, compiled once per instruction set: the including file sets the compiler target, BTINET_ISA (the
// namespace), BTINET_VECTOR_BYTES and the register block BTINET_ROWS x BTINET_VECTORS of the matrix product.
// Every standard header comes before that target is set (interaction_prelude.h).
#pragma once

#include "../common/product.h"

#include "../common/access.h"
#include "edges.h"

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
std::vector<T> with_padding(const T* values, int64_t count, int64_t size) {
  std::vector<T> result(size, T(0));
  std::copy(values, values + count, result.begin());
  return result;
}

template <class T>
std::vector<T> transposed(const T* matrix, int64_t rows, int64_t columns, int64_t stride) {
  std::vector<T> result(columns * stride, T(0));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) result[c * stride + r] = matrix[r * columns + c];
  return result;
}

// Sums of (value - shift) and of its square over a range: no cancellation when the mean is far from zero.
template <class T>
void add_moments(const View<const T>& view, const std::vector<int64_t>& offsets, const Range& range, const T* shift,
                 double* sums, double* squares) {
  const int64_t channels = view.shape.channels;
  const T* base = view.data + range.sample * view.batch_stride;
  if (view.channel_stride == 1) {
    std::vector<T> sum(channels), square(channels);
    for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
      std::fill(sum.begin(), sum.end(), T(0));
      std::fill(square.begin(), square.end(), T(0));
      for (int64_t n = begin; n < std::min(begin + kTile, range.end); ++n) {
        const T* row = base + offsets[n];
        for (int64_t c = 0; c < channels; ++c) sum[c] += row[c] - shift[c];
        if (squares)
          for (int64_t c = 0; c < channels; ++c) square[c] += (row[c] - shift[c]) * (row[c] - shift[c]);
      }
      for (int64_t c = 0; c < channels; ++c) sums[c] += sum[c];
      if (squares)
        for (int64_t c = 0; c < channels; ++c) squares[c] += square[c];
    }
    return;
  }
  const bool dense = view.positions_lie_apart_by(1);
  for (int64_t c = 0; c < channels; ++c) {
    const T* plane = base + c * view.channel_stride;
    const T origin = shift[c];
    T sum = 0, square = 0;
    if (dense) {
#pragma omp simd reduction(+ : sum, square)
      for (int64_t n = range.begin; n < range.end; ++n) {
        sum += plane[n] - origin;
        square += (plane[n] - origin) * (plane[n] - origin);
      }
    } else {
      for (int64_t n = range.begin; n < range.end; ++n) {
        const T difference = plane[offsets[n]] - origin;
        sum += difference;
        square += difference * difference;
      }
    }
    sums[c] += sum;
    if (squares) squares[c] += square;
  }
}

template <class T>
void statistics(const View<const T>& seg, const Context<T>& context, const Statistics<T>& out, int threads) {
  const int64_t channels = seg.shape.channels, hidden = context.hidden, count = seg.shape.positions();
  const int64_t channel_stride = padded<T>(channels), hidden_stride = padded<T>(hidden);
  const Partition partition(seg.shape, kTile);
  const Positions<T> positions(seg.shape);
  const std::vector<int64_t> offsets = offsets_of(seg);
  const Rows<T> seg_rows(seg, offsets);
  std::vector<T> weight, bias;
  if (hidden) {
    weight = transposed(context.weight, hidden, channels, hidden_stride);
    bias = with_padding(context.bias, hidden, hidden_stride);
  }

  const int64_t ranges = partition.ranges();
  std::vector<double> sums(ranges * channels), squares(out.variance ? ranges * channels : 0);
  std::vector<double> edges(ranges), pooled(ranges * hidden);
  std::vector<SoftmaxSum> softmax(ranges);

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < ranges; ++index) {
    const Range range = partition.range(index);
    std::vector<T> tile(hidden ? kTile * channel_stride : 0), shift(channels);
    std::vector<T> activations(context.pool_weight ? kTile * hidden_stride : 0), tile_pooled(hidden_stride);
    const T* first = seg.data + range.sample * seg.batch_stride;
    for (int64_t c = 0; c < channels; ++c) shift[c] = first[c * seg.channel_stride];
    double* range_pooled = pooled.data() + index * hidden;

    for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
      const int64_t rows = std::min(kTile, range.end - begin);
      add_moments(seg, offsets, Range{range.sample, begin, begin + rows}, shift.data(), &sums[index * channels],
                  out.variance ? &squares[index * channels] : nullptr);
      if (!hidden) continue;
      const Left<T> left = seg_rows.left(range.sample, begin, rows, tile.data(), channel_stride);
      const Right<T> right{weight.data(), hidden_stride};
      std::fill(tile_pooled.begin(), tile_pooled.end(), T(0));
      if (!context.pool_weight) {
        multiply(left, right, rows, channels, hidden_stride, PoolReLU<T>{bias.data(), tile_pooled.data()});
      } else {
        multiply(left, right, rows, channels, hidden_stride,
                 StoreReLU<T>{bias.data(), activations.data(), hidden_stride});
        T logits[kTile], top = -std::numeric_limits<T>::infinity();
        for (int64_t r = 0; r < rows; ++r) {
          T logit = 0;
          for (int64_t j = 0; j < hidden; ++j) logit += context.pool_weight[j] * activations[r * hidden_stride + j];
          logits[r] = logit;
          top = std::max(top, logit);
        }
        const double shrink = softmax[index].raise(top);
        for (int64_t j = 0; j < hidden; ++j) range_pooled[j] *= shrink;
        for (int64_t r = 0; r < rows; ++r) {
          const T share = T(std::exp(logits[r] - softmax[index].top));
          softmax[index].weight += share;
          for (int64_t j = 0; j < hidden; ++j) tile_pooled[j] += share * activations[r * hidden_stride + j];
        }
      }
      for (int64_t j = 0; j < hidden; ++j) range_pooled[j] += tile_pooled[j];
    }
    if (out.edges) edges[index] = edge_sum(seg, offsets, positions, range);
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

template <class T>
void scale_channels(const View<const T>& seg, const T* scale, const View<T>& out, int threads) {
  const Partition partition(seg.shape, kTile);
  const std::vector<int64_t> offsets[3] = {offsets_of(seg), offsets_of(seg), offsets_of(out)};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < partition.ranges(); ++index) {
    const Range range = partition.range(index);
    const T* source = seg.data + range.sample * seg.batch_stride;
    const T* factor = scale + range.sample * seg.shape.channels;
    T* target = out.data + range.sample * out.batch_stride;
    for_each_element(seg, seg, out, offsets, range,
                     [=](int64_t c, int64_t i, int64_t, int64_t k) { target[k] = source[i] * factor[c]; });
  }
}

template <class T>
void interpolate(const View<const T>& base, const View<const T>& enhanced, const T* weight, const View<T>& out,
                 int threads) {
  const Partition partition(base.shape, kTile);
  const std::vector<int64_t> offsets[3] = {offsets_of(base), offsets_of(enhanced), offsets_of(out)};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < partition.ranges(); ++index) {
    const Range range = partition.range(index);
    const T* from = base.data + range.sample * base.batch_stride;
    const T* to = enhanced.data + range.sample * enhanced.batch_stride;
    T* target = out.data + range.sample * out.batch_stride;
    const T share = weight[range.sample];
    for_each_element(base, enhanced, out, offsets, range, [=](int64_t, int64_t i, int64_t j, int64_t k) {
      target[k] = from[i] + share * (to[j] - from[i]);
    });
  }
}

template <class T>
void channel_dot(const View<const T>& grad, const View<const T>& seg, T* out, int threads) {
  const int64_t channels = seg.shape.channels;
  const Partition partition(seg.shape, kTile);
  const std::vector<int64_t> grad_offsets = offsets_of(grad), seg_offsets = offsets_of(seg);
  const bool dense = grad.positions_lie_apart_by(1) && seg.positions_lie_apart_by(1);
  std::vector<double> sums(partition.ranges() * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < partition.ranges(); ++index) {
    const Range range = partition.range(index);
    const T* left = grad.data + range.sample * grad.batch_stride;
    const T* right = seg.data + range.sample * seg.batch_stride;
    double* total = sums.data() + index * channels;
    if (grad.channel_stride == 1 && seg.channel_stride == 1) {
      std::vector<T> tile_sum(channels);
      for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
        std::fill(tile_sum.begin(), tile_sum.end(), T(0));
        for (int64_t n = begin; n < std::min(begin + kTile, range.end); ++n) {
          const T *g = left + grad_offsets[n], *d = right + seg_offsets[n];
          for (int64_t c = 0; c < channels; ++c) tile_sum[c] += g[c] * d[c];
        }
        for (int64_t c = 0; c < channels; ++c) total[c] += tile_sum[c];
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const T *g = left + c * grad.channel_stride, *d = right + c * seg.channel_stride;
        T sum = 0;
        if (dense) {
#pragma omp simd reduction(+ : sum)
          for (int64_t n = range.begin; n < range.end; ++n) sum += g[n] * d[n];
        } else {
          for (int64_t n = range.begin; n < range.end; ++n) sum += g[grad_offsets[n]] * d[seg_offsets[n]];
        }
        total[c] = sum;
      }
    }
  }
  for (int64_t b = 0; b < seg.shape.batch; ++b)
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < partition.per_sample(); ++i) sum += sums[(b * partition.per_sample() + i) * channels + c];
      out[b * channels + c] = T(sum);
    }
}

template <class T>
void statistics_backward(const View<const T>& seg, const View<const T>& grad, const T* scale, const Context<T>& context,
                         const Statistics<const T>& saved, const StatisticsGradient<T>& gradient, const View<T>& out,
                         const ContextGradient<T>& context_gradient, int threads) {
  const int64_t channels = seg.shape.channels, hidden = context.hidden, count = seg.shape.positions();
  const int64_t stride = padded<T>(channels), hidden_stride = padded<T>(hidden);
  const Partition partition(seg.shape, kTile);
  const Positions<T> positions(seg.shape);
  std::vector<T> weight_by_channel, weight_rows, bias;
  if (hidden) {
    weight_by_channel = transposed(context.weight, hidden, channels, hidden_stride);
    bias = with_padding(context.bias, hidden, hidden_stride);
    weight_rows.assign(hidden * stride, T(0));
    for (int64_t j = 0; j < hidden; ++j)
      std::copy(context.weight + j * channels, context.weight + (j + 1) * channels, &weight_rows[j * stride]);
  }
  const std::vector<int64_t> offsets[3] = {offsets_of(seg), offsets_of(grad), offsets_of(out)};
  const Rows<T> seg_rows(seg, offsets[0]);
  // Rows of the result that are whole vectors take their products in place.
  const bool whole_rows = out.channel_stride == 1 && out.positions_lie_apart_by(channels) && channels == stride;
  const int64_t groups = partition.groups();
  std::vector<T> weight_sum(groups * hidden * stride);
  std::vector<double> bias_sum(groups * hidden), pool_sum(context.pool_weight ? groups * hidden : 0);

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<T> tile(hidden ? kTile * stride : 0), result(hidden && !whole_rows ? kTile * stride : 0);
    std::vector<T> activations(kTile * hidden_stride), tile_bias(hidden_stride), pooled_share(hidden_stride);
    std::vector<T> constant(channels), slope(channels), centre(channels);
    for (int64_t index = partition.group_begin(group); index < partition.group_end(group); ++index) {
      const Range range = partition.range(index);
      const int64_t b = range.sample;
      const T* pooled_gradient = hidden ? gradient.pooled + b * hidden : nullptr;
      T pooled_dot = 0;  // dp . p, the softmax's share of the gradient of every logit
      if (hidden && context.pool_weight)
        for (int64_t j = 0; j < hidden; ++j) pooled_dot += pooled_gradient[j] * saved.pooled[b * hidden + j];
      // Through mean and variance: constant + slope * (value - mean); multiplied out it would cancel.
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t v = b * channels + c;
        slope[c] = gradient.variance ? T(2) * gradient.variance[v] / T(count) : T(0);
        centre[c] = gradient.variance ? saved.mean[v] : T(0);
        constant[c] = gradient.mean[v] / T(count);
      }

      for (int64_t j = 0; j < hidden; ++j) pooled_share[j] = pooled_gradient[j] / T(count);

      for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
        const int64_t rows = std::min(kTile, range.end - begin);
        const T *value = seg.data + b * seg.batch_stride, *up = grad.data + b * grad.batch_stride;
        const T *factor = scale + b * channels, *add = constant.data(), *times = slope.data();
        const T* origin = centre.data();
        T* target = out.data + b * out.batch_stride;
        for_each_element(seg, grad, out, offsets, Range{b, begin, begin + rows},
                         [=](int64_t c, int64_t i, int64_t j, int64_t k) {
                           target[k] = up[j] * factor[c] + (add[c] + times[c] * (value[i] - origin[c]));
                         });
        if (gradient.edges)
          add_edge_gradient(seg, offsets[0], out, offsets[2], positions, b, begin, rows,
                            gradient.edges[b] / (T(channels) * T(count)));
        if (!hidden) continue;

        const Left<T> left = seg_rows.left(b, begin, rows, tile.data(), stride);
        const Right<T> by_channel{weight_by_channel.data(), hidden_stride};
        std::fill(tile_bias.begin(), tile_bias.end(), T(0));
        if (!context.pool_weight) {
          multiply(
              left, by_channel, rows, channels, hidden_stride,
              ReLUGradient<T>{bias.data(), pooled_share.data(), activations.data(), hidden_stride, tile_bias.data()});
        } else {
          multiply(left, by_channel, rows, channels, hidden_stride,
                   StoreReLU<T>{bias.data(), activations.data(), hidden_stride});
          for (int64_t r = 0; r < rows; ++r) {
            T* active = activations.data() + r * hidden_stride;
            T logit = 0, dot = 0;
            for (int64_t j = 0; j < hidden; ++j) {
              logit += context.pool_weight[j] * active[j];
              dot += pooled_gradient[j] * active[j];
            }
            const T share = std::exp(logit - saved.log_sum_exp[b]);
            const T logit_gradient = share * (dot - pooled_dot);
            for (int64_t j = 0; j < hidden; ++j) pool_sum[group * hidden + j] += logit_gradient * active[j];
            for (int64_t j = 0; j < hidden; ++j) {
              const T through = share * pooled_gradient[j] + logit_gradient * context.pool_weight[j];
              active[j] = active[j] > T(0) ? through : T(0);
              tile_bias[j] += active[j];
            }
          }
        }
        for (int64_t j = 0; j < hidden; ++j) bias_sum[group * hidden + j] += tile_bias[j];

        // seg += activations W, and W's gradient += activations^T seg
        const Left<T> by_position{activations.data(), hidden_stride, 1};
        const Right<T> by_hidden{weight_rows.data(), stride};
        if (whole_rows) {
          multiply(by_position, by_hidden, rows, hidden, stride, Store<T, true>{target + offsets[2][begin], channels});
        } else {
          multiply(by_position, by_hidden, rows, hidden, stride, Store<T, false>{result.data(), stride});
          add_tile(out, offsets[2], b, begin, rows, result.data(), stride);
        }
        multiply(Left<T>{activations.data(), 1, hidden_stride}, seg_rows.right(b, begin, rows, tile.data(), stride),
                 hidden, rows, stride, Store<T, true>{weight_sum.data() + group * hidden * stride, stride});
      }
    }
  }

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < hidden; ++j) {
    double bias = 0, pool = 0;
    std::vector<double> row(channels);
    for (int64_t group = 0; group < groups; ++group) {
      bias += bias_sum[group * hidden + j];
      if (context.pool_weight) pool += pool_sum[group * hidden + j];
      const T* part = weight_sum.data() + (group * hidden + j) * stride;
      for (int64_t c = 0; c < channels; ++c) row[c] += part[c];
    }
    context_gradient.bias[j] = T(bias);
    if (context.pool_weight) context_gradient.pool_weight[j] = T(pool);
    std::copy(row.begin(), row.end(), context_gradient.weight + j * channels);
  }
}

BTINET_INSTANTIATE_INTERACTION_PASSES(float)
BTINET_INSTANTIATE_INTERACTION_PASSES(double)

}  // namespace BTINET_ISA
}  // namespace btinet
