// Backward pass B: the gradient of the dense tensor and of the context's weights. Compiled once per instruction set
// (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Gradients of the context's weights, summed over one group of ranges; see Partition::groups.
template <class T>
struct ContextSums {
  T* weight;  // [hidden, padded channels]
  double* bias;
  double* pool_weight;
  bool empty = true;  // nothing has been written to `weight`

  void add_row(int64_t j, int64_t stride, int64_t first, int64_t columns, const T* row, T factor) {
    T* to = weight + j * stride + first;
    for_each_vector<T>(columns, [&](int64_t c, auto) {
      store(to + c, empty ? factor * load(row + c) : load(to + c) + factor * load(row + c));
    });
  }
};

template <class S>
class ContextGradientPass {
  using T = Compute<S>;
  static constexpr int64_t kChunk = kVectors * Lanes<T>::count;  // channels treated together

 public:
  ContextGradientPass(const View<const S>& seg, const Context<T>& context, const Statistics<const T>& saved,
                      const T* pooled_gradient, const DenseGradient<S>& dense, const PaddedRows<T>& weight_rows,
                      const ContextOperand<T>& operand)
      : seg_(seg),
        context_(context),
        saved_(saved),
        pooled_gradient_(pooled_gradient),
        dense_(dense),
        weight_rows_(weight_rows),
        operand_(operand),
        bits_(context.hidden),
        share_(context.hidden) {}

  void run(const Range& range, ContextSums<T>& sums) {
    dense_.set_sample(range.sample, sample_);
    if (!context_.hidden)
      run_without_context(range);
    else if (context_.pool_weight)
      run_softmax(range, sums);
    else
      run_mean(range, sums);
  }

 private:
  // Calls chunk(first channel, channels, number of vectors as a constant).
  template <class F>
  void for_each_chunk(const F& chunk) const {
    const int64_t channels = seg_.shape.channels;
    for (int64_t first = 0; first < channels; first += kChunk) {
      const int64_t columns = std::min(kChunk, channels - first);
      switch (padded<T>(columns) / Lanes<T>::count) {
        case 1:
          chunk(first, columns, std::integral_constant<int, 1>{});
          break;
        case 2:
          chunk(first, columns, std::integral_constant<int, 2>{});
          break;
        default:
          chunk(first, columns, std::integral_constant<int, kVectors>{});
      }
    }
  }

  void run_without_context(const Range& range) {
    for_each_tile(range, dense_.longest_tile(), [&](const Range& tile) {
      for_each_chunk(
          [&](int64_t first, int64_t columns, auto) { dense_.write(tile, first, columns, nullptr, 0, sample_); });
    });
  }

  // Average pooling: every active position has the same gradient, so that the products are sums of chosen rows.
  void run_mean(const Range& range, ContextSums<T>& sums) {
    const int64_t hidden = context_.hidden, bytes = (hidden + 7) / 8, count = seg_.shape.positions();
    const uint8_t* active = saved_.active + range.sample * count * bytes;
    bits_.turn(active + range.begin * bytes, range.end - range.begin);
    for (int64_t j = 0; j < hidden; ++j) {
      share_[j] = pooled_gradient_[range.sample * hidden + j] / T(count);
      sums.bias[j] += double(share_[j]) * bits_.count(j);
    }
    for_each_chunk([&](int64_t first, int64_t columns, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t lanes = Lanes<T>::count, width = V * lanes, table = kSubsets * width;
      weight_tables_.resize(2 * bytes * table);
      for (int64_t group = 0; group < 2 * bytes; ++group)
        tabulate_subsets<T, V>(
            [&](int64_t i, int64_t v) {
              const int64_t j = 4 * group + i;
              return j < hidden ? share_[j] * load(weight_rows_.row(j) + first + v * lanes) : Vector<T>{};
            },
            &weight_tables_[group * table]);
      seg_tables_.resize(kTile / 4 * table);
      products_.resize(dense_.longest_tile() * width);
      tile_.resize(kTile * width);
      seg_sums_.fill(hidden * width, T(0));
      for_each_tile(range, dense_.longest_tile(), [&](const Range& tile) {
        sum_of_chosen_rows<T, V>(active + tile.begin * bytes, bytes, tile.end - tile.begin, bytes,
                                 weight_tables_.data(), products_.data(), width);
        dense_.write(tile, first, columns, products_.data(), width, sample_);
        for_each_tile(tile, kTile, [&](const Range& part) {
          add_seg_sums<V>(part, first, columns, bits_.choice((part.begin - range.begin) / 4));
        });
      });
      for (int64_t j = 0; j < hidden; ++j)
        sums.add_row(j, weight_rows_.stride(), first, columns, &seg_sums_[j * width], share_[j]);
    });
    sums.empty = false;
  }

  // seg_sums_[j] += the sum of seg over the positions where output j is active.
  template <int V>
  void add_seg_sums(const Range& tile, int64_t first, int64_t columns, const uint8_t* choice) {
    constexpr int64_t lanes = Lanes<T>::count, width = V * lanes;
    const int64_t rows = tile.end - tile.begin, groups = (rows + 3) / 4;
    const Tile<T> seg = read_tile(seg_, dense_.seg_offsets(), tile, first, columns, tile_.data(), width);
    for (int64_t group = 0; group < groups; ++group)
      tabulate_subsets<T, V>(
          [&](int64_t i, int64_t v) {
            const int64_t r = 4 * group + i;
            return r < rows ? load(seg.data + r * seg.stride + v * lanes) : Vector<T>{};
          },
          &seg_tables_[group * kSubsets * width]);
    add_chosen_sums<T, V>(choice, bits_.stride(), groups, context_.hidden, seg_tables_.data(), seg_sums_.data(), width);
  }

  // Softmax pooling: the activations are computed again, for their logits' sake.
  void run_softmax(const Range& range, ContextSums<T>& sums) {
    const int64_t hidden = context_.hidden, channels = seg_.shape.channels;
    const int64_t stride = weight_rows_.stride(), hidden_stride = operand_.stride;
    const T* pooled_gradient = pooled_gradient_ + range.sample * hidden;
    T pooled_dot = 0;  // dp . p, the softmax's share of the gradient of every logit
    for (int64_t j = 0; j < hidden; ++j) pooled_dot += pooled_gradient[j] * saved_.pooled[range.sample * hidden + j];
    tile_.resize(kTile * stride);
    products_.resize(kTile * stride);
    activations_.resize(kTile * hidden_stride);
    if (sums.empty) std::fill_n(sums.weight, hidden * stride, T(0));
    sums.empty = false;
    for_each_tile(range, kTile, [&](const Range& tile) {
      const int64_t rows = tile.end - tile.begin;
      const Tile<T> seg = read_tile(seg_, dense_.seg_offsets(), tile, 0, channels, tile_.data(), stride);
      multiply(Left<T>{seg.data, seg.stride, 1}, operand_.right(), rows, channels, hidden_stride,
               StoreReLU<T>{operand_.bias.data(), activations_.data(), hidden_stride});
      for (int64_t r = 0; r < rows; ++r) {
        T* active = &activations_[r * hidden_stride];
        T logit = 0, dot = 0;
        for (int64_t j = 0; j < hidden; ++j) {
          logit += context_.pool_weight[j] * active[j];
          dot += pooled_gradient[j] * active[j];
        }
        const T share = std::exp(logit - saved_.log_sum_exp[range.sample]);
        const T logit_gradient = share * (dot - pooled_dot);
        for (int64_t j = 0; j < hidden; ++j) {
          sums.pool_weight[j] += logit_gradient * active[j];
          const T through = share * pooled_gradient[j] + logit_gradient * context_.pool_weight[j];
          active[j] = active[j] > T(0) ? through : T(0);
          sums.bias[j] += active[j];
        }
      }
      multiply(Left<T>{activations_.data(), hidden_stride, 1}, Right<T>{weight_rows_.data(), stride}, rows, hidden,
               stride, Store<T, false>{products_.data(), stride});
      multiply(Left<T>{activations_.data(), 1, hidden_stride}, Right<T>{seg.data, seg.stride}, hidden, rows, stride,
               Store<T, true>{sums.weight, stride});
      for_each_chunk([&](int64_t first, int64_t columns, auto) {
        dense_.write(tile, first, columns, &products_[first], stride, sample_);
      });
    });
  }

  const View<const S>& seg_;
  const Context<T>& context_;
  const Statistics<const T>& saved_;
  const T* pooled_gradient_;
  const DenseGradient<S>& dense_;
  const PaddedRows<T>& weight_rows_;
  const ContextOperand<T>& operand_;
  typename DenseGradient<S>::Sample sample_;
  BitsByOutput bits_;
  Scratch<T> share_, weight_tables_, seg_tables_, seg_sums_, products_, tile_, activations_;
};

template <class S>
void statistics_backward(const View<const S>& seg, const View<const S>& grad, const Compute<S>* scale,
                         const Context<Compute<S>>& context, const Statistics<const Compute<S>>& saved,
                         const StatisticsGradient<Compute<S>>& gradient, const View<S>& out,
                         const ContextGradient<Compute<S>>& context_gradient, int threads) {
  using T = Compute<S>;
  const int64_t channels = seg.shape.channels, hidden = context.hidden;
  const Partition partition(seg.shape, kTile);
  const DenseGradient<S> dense(seg, grad, scale, saved.mean, gradient, out);
  const PaddedRows<T> weight_rows(context.weight, hidden, channels);
  const ContextOperand<T> operand(context.pool_weight ? context : Context<T>{}, channels);
  const int64_t stride = weight_rows.stride();
  const int64_t groups = partition.groups(hidden * stride * int64_t(sizeof(T)));
  Scratch<T> weight_sums(groups * hidden * stride);
  std::vector<double> bias_sums(groups * hidden), pool_sums(groups * hidden);

#pragma omp parallel num_threads(threads)
  {
    ContextGradientPass<S> pass(seg, context, saved, gradient.pooled, dense, weight_rows, operand);
#pragma omp for schedule(static)
    for (int64_t group = groups - 1; group >= 0; --group) {  // backwards: pass A has just read the end
      ContextSums<T> sums{weight_sums.data() + group * hidden * stride, bias_sums.data() + group * hidden,
                          pool_sums.data() + group * hidden};
      partition.for_each_stretch(group, groups, [&](const Range& range) { pass.run(range, sums); });
    }
#pragma omp for schedule(static)
    for (int64_t j = 0; j < hidden; ++j) {
      double bias = 0, pool = 0;
      std::vector<double> row(channels);
      for (int64_t group = 0; group < groups; ++group) {
        bias += bias_sums[group * hidden + j];
        pool += pool_sums[group * hidden + j];
        const T* part = weight_sums.data() + (group * hidden + j) * stride;
        for (int64_t c = 0; c < channels; ++c) row[c] += part[c];
      }
      context_gradient.bias[j] = T(bias);
      if (context.pool_weight) context_gradient.pool_weight[j] = T(pool);
      std::copy(row.begin(), row.end(), context_gradient.weight + j * channels);
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
