// The passes of dual-path attention over planes, K channels at a time: what belongs to a position stays in the first
// cache while the channels go by. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Positions a pass over planes treats together: runs long enough for the hardware to fetch ahead.
constexpr int64_t kPlaneTile = 4096;

// The part of a channel's plane that a range covers.
template <class S>
inline S* run_of(const View<S>& view, const Range& range, int64_t channel) {
  return view.data + range.sample * view.batch_stride + channel * view.channel_stride + range.begin;
}

// Calls planes(first channel, number of channels as a constant).
template <int K, class F>
inline void for_each_planes(int64_t channels, const F& planes) {
  int64_t c = 0;
  for (; c + K <= channels; c += K) planes(c, std::integral_constant<int, K>{});
  for (; c < channels; ++c) planes(c, std::integral_constant<int, 1>{});
}

// channel_sums[c] = sums of K planes; top and total, which the caller starts, go on to maximum and sum over channels.
template <int K, class S>
inline void summarise_planes(const View<const S>& x, const Range& range, int64_t first, double* channel_sums,
                             Compute<S>* top, Compute<S>* total) {
  using T = Compute<S>;
  const S* plane[K];
  Vector<T> sum[K] = {};
  for (int k = 0; k < K; ++k) plane[k] = run_of(x, range, first + k);
  for_each_vector<T>(range.end - range.begin, [&](int64_t i, auto part) {
    Vector<T> largest = load(top + i, part), of_channels = load(total + i, part);
    for (int k = 0; k < K; ++k) {
      const Vector<T> value = load(plane[k] + i, part);
      largest = larger<T>(value, largest);
      of_channels += value;
      sum[k] += value;
    }
    store(top + i, largest, part);
    store(total + i, of_channels, part);
  });
  for (int k = 0; k < K; ++k) channel_sums[first + k] += sum_of_lanes<T>(sum[k]);
}

// A range of one channel of the result; `residual.data` is null where there is none.
template <class S>
inline void gate_plane(const View<const S>& x, const View<const S>& residual, const Range& range, int64_t channel,
                       Compute<S> channel_gate, const Compute<S>* spatial_gate, const View<S>& out, bool streaming) {
  using T = Compute<S>;
  const S *from = run_of(x, range, channel), *added = residual.data ? run_of(residual, range, channel) : nullptr;
  store_run(run_of(out, range, channel), range.end - range.begin, streaming, [&](int64_t i, auto part) {
    Vector<T> value = load(from + i, part) * (channel_gate * load(spatial_gate + i, part));
    if (added) value = larger<T>(Vector<T>{}, value + load(added + i, part));  // lets NaN through, as torch does
    return value;
  });
}

template <class S>
struct PlanesBackward {
  const View<const S>&d_out, &x, &out;  // `out` only with a residual
  const View<S>& d_residual;
  const Compute<S>* channel_gate;       // [C]
  const Compute<S>*spatial_gate, *top;  // of the positions
  double* channel_sums;                 // [C], += sum over the positions of dz x spatial_gate
  Compute<S>*spatial_sums, *ties;       // of the positions; the caller starts them at zero
};

// See reduce_rows.
template <int K, class S>
inline void reduce_planes(const PlanesBackward<S>& in, const Range& range, int64_t first) {
  using T = Compute<S>;
  const S *upstream[K], *from[K], *result[K];
  S* masked[K];
  T gate[K];
  Vector<T> sum[K] = {};
  for (int k = 0; k < K; ++k) {
    upstream[k] = run_of(in.d_out, range, first + k);
    from[k] = run_of(in.x, range, first + k);
    result[k] = in.out.data ? run_of(in.out, range, first + k) : nullptr;
    masked[k] = in.out.data ? run_of(in.d_residual, range, first + k) : nullptr;
    gate[k] = in.channel_gate[first + k];
  }
  for_each_vector<T>(range.end - range.begin, [&](int64_t i, auto part) {
    const Vector<T> spatial_gate = load(in.spatial_gate + i, part), top = load(in.top + i, part);
    Vector<T> of_channels = load(in.spatial_sums + i, part), equal = load(in.ties + i, part);
    for (int k = 0; k < K; ++k) {
      const Vector<T> x = load(from[k] + i, part);
      Vector<T> dz = load(upstream[k] + i, part);
      if (masked[0]) {
        dz = load(result[k] + i, part) <= T(0) ? Vector<T>{} : dz;
        store(masked[k] + i, dz, part);
      }
      const Vector<T> product = dz * x;
      of_channels += product * gate[k];
      sum[k] += product * spatial_gate;
      equal += x == top ? broadcast(T(1)) : Vector<T>{};
    }
    store(in.spatial_sums + i, of_channels, part);
    store(in.ties + i, equal, part);
  });
  for (int k = 0; k < K; ++k) in.channel_sums[first + k] += sum_of_lanes<T>(sum[k]);
}

// A range of one channel of the gradient of x; d_top and d_mean_map belong to the positions.
template <class S>
inline void gradient_plane(const View<const S>& dz, const View<const S>& x, const Range& range, int64_t channel,
                           Compute<S> channel_gate, const Compute<S>* spatial_gate, Compute<S> d_mean,
                           const Compute<S>* top, const Compute<S>* d_top, const Compute<S>* d_mean_map,
                           const View<S>& d_x, bool streaming) {
  using T = Compute<S>;
  const S *upstream = run_of(dz, range, channel), *from = run_of(x, range, channel);
  store_run(run_of(d_x, range, channel), range.end - range.begin, streaming, [&](int64_t i, auto part) {
    const Vector<T> gate = channel_gate * load(spatial_gate + i, part);
    const Vector<T> constant = d_mean + load(d_mean_map + i, part);
    const Vector<T> of_top = load(from + i, part) == load(top + i, part) ? load(d_top + i, part) : Vector<T>{};
    return load(upstream + i, part) * gate + (constant + of_top);
  });
}

}  // namespace BTINET_ISA
}  // namespace btinet
