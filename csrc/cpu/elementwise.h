// The passes without products: scale, interpolate, dot. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Pass 2; the ranges run backwards, so that the first reads still find what pass 1 read last.
template <class S>
void scale_channels(const View<const S>& seg, const Compute<S>* scale, const View<S>& out, int threads) {
  using T = Compute<S>;
  const int64_t channels = seg.shape.channels;
  const Partition partition(seg.shape, kTile);
  const Offsets seg_offsets(seg), out_offsets(out);
  const Layout layout = layout_of(seg, out);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = partition.ranges() - 1; index >= 0; --index) {
    const Range range = partition.range(index);
    const S* source = seg.data + range.sample * seg.batch_stride;
    const T* factor = scale + range.sample * channels;
    S* target = out.data + range.sample * out.batch_stride;
    if (layout == Layout::rows) {
      for (int64_t n = range.begin; n < range.end; ++n) {
        const S* from = source + seg_offsets[n];
        S* to = target + out_offsets[n];
        for_each_vector<T>(channels, [&](int64_t c, auto part) {
          store(to + c, load(from + c, part) * load(factor + c, part), part);
        });
      }
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const S* from = source + c * seg.channel_stride;
      S* to = target + c * out.channel_stride;
      if (layout == Layout::planes) {
        for_each_vector<T>(range.end - range.begin, [&](int64_t i, auto part) {
          store(to + range.begin + i, load(from + range.begin + i, part) * factor[c], part);
        });
      } else {
        for (int64_t n = range.begin; n < range.end; ++n)
          to[out_offsets[n]] = stored<S>(from[seg_offsets[n]] * factor[c]);
      }
    }
  }
}

template <class S>
void interpolate(const View<const S>& base, const View<const S>& enhanced, const Compute<S>* weight, const View<S>& out,
                 int threads) {
  using T = Compute<S>;
  const int64_t channels = base.shape.channels;
  const Partition partition(base.shape, kTile);
  const Offsets base_offsets(base), enhanced_offsets(enhanced), out_offsets(out);
  const Layout layout = layout_of(base, enhanced, out);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = partition.ranges() - 1; index >= 0; --index) {
    const Range range = partition.range(index);
    const S* start = base.data + range.sample * base.batch_stride;
    const S* end = enhanced.data + range.sample * enhanced.batch_stride;
    S* target = out.data + range.sample * out.batch_stride;
    const T share = weight[range.sample];
    const auto along = [&](const S* from, const S* to, S* result, int64_t count) {
      for_each_vector<T>(count, [&](int64_t i, auto part) {
        const Vector<T> value = load(from + i, part);
        store(result + i, value + share * (load(to + i, part) - value), part);
      });
    };
    if (layout == Layout::rows) {
      for (int64_t n = range.begin; n < range.end; ++n)
        along(start + base_offsets[n], end + enhanced_offsets[n], target + out_offsets[n], channels);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const S* from = start + c * base.channel_stride;
      const S* to = end + c * enhanced.channel_stride;
      S* result = target + c * out.channel_stride;
      if (layout == Layout::planes) {
        along(from + range.begin, to + range.begin, result + range.begin, range.end - range.begin);
      } else {
        for (int64_t n = range.begin; n < range.end; ++n) {
          const T value = from[base_offsets[n]];
          result[out_offsets[n]] = stored<S>(value + share * (T(to[enhanced_offsets[n]]) - value));
        }
      }
    }
  }
}

// Adds the channels' dot products of up to kTile rows, a few vectors of channels at a time.
template <class S>
void add_dot_of_rows(const S* left, const Offsets& left_offsets, const S* right, const Offsets& right_offsets,
                     const Range& range, int64_t channels, double* total) {
  using T = Compute<S>;
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t first = 0;
  for (; first + kVectors * lanes <= channels; first += kVectors * lanes) {
    Vector<T> even[kVectors] = {}, odd[kVectors] = {};  // two chains of additions hide each other's latency
    const auto add = [&](int64_t n, Vector<T>(&sum)[kVectors]) {
      const S *a = left + left_offsets[n] + first, *b = right + right_offsets[n] + first;
      for (int v = 0; v < kVectors; ++v) sum[v] += load(a + v * lanes) * load(b + v * lanes);
    };
    int64_t n = range.begin;
    for (; n + 2 <= range.end; n += 2) {
      add(n, even);
      add(n + 1, odd);
    }
    if (n < range.end) add(n, even);
    for (int v = 0; v < kVectors; ++v) add_lanes<T>(even[v] + odd[v], total + first + v * lanes, lanes);
  }
  for_each_vector<T>(channels - first, [&](int64_t c, auto part) {
    Vector<T> sum = {};
    for (int64_t n = range.begin; n < range.end; ++n)
      sum += load(left + left_offsets[n] + first + c, part) * load(right + right_offsets[n] + first + c, part);
    add_lanes<T>(sum, total + first + c, std::min(lanes, channels - first - c));
  });
}

template <class S>
void channel_dot(const View<const S>& grad, const View<const S>& seg, Compute<S>* out, int threads) {
  using T = Compute<S>;
  const int64_t channels = seg.shape.channels;
  const Partition partition(seg.shape, kTile);
  const Offsets grad_offsets(grad), seg_offsets(seg);
  const Layout layout = layout_of(grad, seg);
  std::vector<double> sums(partition.ranges() * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < partition.ranges(); ++index) {
    const Range range = partition.range(index);
    const S* left = grad.data + range.sample * grad.batch_stride;
    const S* right = seg.data + range.sample * seg.batch_stride;
    double* total = sums.data() + index * channels;
    if (layout == Layout::rows) {
      for (int64_t begin = range.begin; begin < range.end; begin += kTile)
        add_dot_of_rows(left, grad_offsets, right, seg_offsets,
                        Range{range.sample, begin, std::min(begin + kTile, range.end)}, channels, total);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const S *g = left + c * grad.channel_stride, *d = right + c * seg.channel_stride;
      if (layout == Layout::planes) {
        Vector<T> sum = {};
        for_each_vector<T>(range.end - range.begin, [&](int64_t i, auto part) {
          sum += load(g + range.begin + i, part) * load(d + range.begin + i, part);
        });
        total[c] = sum_of_lanes<T>(sum);
      } else {
        for (int64_t n = range.begin; n < range.end; ++n) total[c] += double(g[grad_offsets[n]]) * d[seg_offsets[n]];
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

}  // namespace BTINET_ISA
}  // namespace btinet
