// Edge energy: absolute forward differences, and their gradient. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

template <class T>
T sign(T value) {
  return T(value > T(0)) - T(value < T(0));
}

// Sum over the channels of |next - here|, for A neighbours at once. A missing neighbour is `here` itself.
template <class T, int A>
T row_edge_sum(const T* here, const T* const (&next)[3], int64_t channels) {
  T sum = 0;
  const T *first = next[0], *second = next[A > 1 ? 1 : 0], *third = next[A > 2 ? 2 : 0];
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < channels; ++c) {
    sum += std::abs(first[c] - here[c]);
    if (A > 1) sum += std::abs(second[c] - here[c]);
    if (A > 2) sum += std::abs(third[c] - here[c]);
  }
  return sum;
}

// out[c] += factor * (sign(here - previous) - sign(next - here)), summed over A axes.
template <class T, int A>
void add_row_edge_gradient(const T* here, const T* const (&next)[3], const T* const (&previous)[3], int64_t channels,
                           T factor, T* out) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    T slope = 0;
    for (int a = 0; a < A; ++a) slope += sign(here[c] - previous[a][c]) - sign(next[a][c] - here[c]);
    out[c] += factor * slope;
  }
}

// Sum of |forward differences| of the range [begin, end) of one sample, over all axes and channels.
template <class T>
double edge_sum(const View<const T>& view, const std::vector<int64_t>& offsets, const Positions<T>& positions,
                const Range& range) {
  const T* base = view.data + range.sample * view.batch_stride;
  const int64_t channels = view.shape.channels;
  const int axes = int(positions.axes().size());
  double total = 0;
  if (view.channel_stride == 1) {
    for (int64_t n = range.begin; n < range.end; ++n) {
      const T* here = base + offsets[n];
      const T* next[3] = {here, here, here};
      for (int a = 0; a < axes; ++a) {
        const int d = positions.axes()[a];
        if (positions.has_next(d)[n] != T(0)) next[a] = base + offsets[n + positions.step(d)];
      }
      if (axes == 1) total += row_edge_sum<T, 1>(here, next, channels);
      if (axes == 2) total += row_edge_sum<T, 2>(here, next, channels);
      if (axes == 3) total += row_edge_sum<T, 3>(here, next, channels);
    }
    return total;
  }
  const bool dense = view.positions_lie_apart_by(1);
  for (const int d : positions.axes()) {
    const int64_t step = positions.step(d);
    const T* has_next = positions.has_next(d);
    const int64_t end = std::min(range.end, view.shape.positions() - step);
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = base + c * view.channel_stride;
      T sum = 0;
      if (dense) {
#pragma omp simd reduction(+ : sum)
        for (int64_t n = range.begin; n < end; ++n) sum += has_next[n] * std::abs(plane[n + step] - plane[n]);
      } else {
        for (int64_t n = range.begin; n < end; ++n)
          sum += has_next[n] * std::abs(plane[offsets[n + step]] - plane[offsets[n]]);
      }
      total += sum;
    }
  }
  return total;
}

// out[sample, c, begin + r] += factor * d(sum of |forward differences|) / d view[...]; sign(0) = 0.
template <class T>
void add_edge_gradient(const View<const T>& view, const std::vector<int64_t>& offsets, const View<T>& out,
                       const std::vector<int64_t>& out_offsets, const Positions<T>& positions, int64_t sample,
                       int64_t begin, int64_t rows, T factor) {
  const T* base = view.data + sample * view.batch_stride;
  T* target = out.data + sample * out.batch_stride;
  const int64_t channels = view.shape.channels;
  const int axes = int(positions.axes().size());
  if (view.channel_stride == 1 && out.channel_stride == 1) {
    for (int64_t n = begin; n < begin + rows; ++n) {
      const T* here = base + offsets[n];
      const T* next[3] = {here, here, here};
      const T* previous[3] = {here, here, here};
      for (int a = 0; a < axes; ++a) {
        const int d = positions.axes()[a];
        const int64_t step = positions.step(d);
        const T* has_next = positions.has_next(d);
        if (has_next[n] != T(0)) next[a] = base + offsets[n + step];
        if (n >= step && has_next[n - step] != T(0)) previous[a] = base + offsets[n - step];
      }
      T* result = target + out_offsets[n];
      if (axes == 1) add_row_edge_gradient<T, 1>(here, next, previous, channels, factor, result);
      if (axes == 2) add_row_edge_gradient<T, 2>(here, next, previous, channels, factor, result);
      if (axes == 3) add_row_edge_gradient<T, 3>(here, next, previous, channels, factor, result);
    }
    return;
  }
  // Without branches, so that the loops over positions vectorise when those lie side by side in memory.
  const bool dense = view.positions_lie_apart_by(1), dense_out = out.positions_lie_apart_by(1);
  const int64_t* at = offsets.data() + begin;
  for (int64_t c = 0; c < channels; ++c) {
    const T* plane = base + c * view.channel_stride;
    T slope[kTile] = {};
    for (const int d : positions.axes()) {
      const int64_t step = positions.step(d);
      const T* link = positions.has_next(d) + begin;
      const int64_t with_next = std::min(rows, view.shape.positions() - step - begin);
      const int64_t with_previous = std::max<int64_t>(0, step - begin);
      if (dense) {
        const T* here = plane + begin;
        for (int64_t r = 0; r < with_next; ++r) slope[r] -= link[r] * sign(here[r + step] - here[r]);
        for (int64_t r = with_previous; r < rows; ++r) slope[r] += link[r - step] * sign(here[r] - here[r - step]);
      } else {
        for (int64_t r = 0; r < with_next; ++r) slope[r] -= link[r] * sign(plane[at[r + step]] - plane[at[r]]);
        for (int64_t r = with_previous; r < rows; ++r)
          slope[r] += link[r - step] * sign(plane[at[r]] - plane[at[r - step]]);
      }
    }
    T* result = target + c * out.channel_stride;
    if (dense_out) {
      for (int64_t r = 0; r < rows; ++r) result[begin + r] += factor * slope[r];
    } else {
      for (int64_t r = 0; r < rows; ++r) result[out_offsets[begin + r]] += factor * slope[r];
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
