// Edge energy: absolute forward differences, and their gradient. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// The neighbours of positions along each spatial axis of more than one position.
template <class T>
class Neighbours {
  struct Axis {
    int64_t step;
    int64_t size;
  };

 public:
  using bits = typename Lanes<T>::integer;

  // `masks`: also as masks over all positions, for planes.
  Neighbours(const Shape& shape, bool masks) : count_(shape.positions()) {
    int64_t step = 1;
    for (int d = 2; d >= 0; --d) {
      if (shape.size[d] > 1) axes_.push_back({step, shape.size[d]});
      step *= shape.size[d];
    }
    if (!masks) return;
    const int64_t reach = axes_.empty() ? 0 : axes_.back().step;
    for (const Axis& axis : axes_) {
      std::vector<bits> mask(reach + count_ + Lanes<T>::count, bits(0));  // so that whole vectors can be read around
      const int64_t period = axis.step * axis.size;
      for (int64_t begin = 0; begin < count_; begin += period)
        std::fill_n(mask.begin() + reach + begin, period - axis.step, ~bits(0));
      has_next_.push_back(std::move(mask));
    }
    reach_ = reach;
  }

  int axes() const { return int(axes_.size()); }
  int64_t step(int axis) const { return axes_[axis].step; }
  int64_t count() const { return count_; }

  // Goes through the positions one by one. Axes without neighbours have size 1.
  class Walk {
   public:
    Walk(const Neighbours& neighbours, int64_t n) {
      for (int a = 0; a < neighbours.axes(); ++a) {
        size_[a] = neighbours.axes_[a].size;
        coordinate_[a] = n / neighbours.axes_[a].step % size_[a];
      }
    }
    bool has_next(int axis) const { return coordinate_[axis] + 1 < size_[axis]; }
    bool has_previous(int axis) const { return coordinate_[axis] > 0; }
    void advance() {
      if (++coordinate_[0] < size_[0]) return;
      coordinate_[0] = 0;
      if (++coordinate_[1] < size_[1]) return;
      coordinate_[1] = 0;
      ++coordinate_[2];
    }

   private:
    int64_t size_[3] = {1, 1, 1};
    int64_t coordinate_[3] = {0, 0, 0};
  };
  Walk walk_from(int64_t n) const { return Walk(*this, n); }
  // All ones in the lanes of the positions from n on that have a next one, else zero; n may lie a step outside.
  typename Lanes<T>::bits has_next(int axis, int64_t n) const {
    return *reinterpret_cast<const typename Lanes<T>::bits*>(has_next_[axis].data() + reach_ + n);
  }

 private:
  int64_t count_;
  int64_t reach_ = 0;
  std::vector<Axis> axes_;
  std::vector<std::vector<bits>> has_next_;
};

// Sum over the channels of |next - here|, for A neighbours at once. A missing neighbour is `here` itself.
template <int A, class S, class T>
inline void add_row_edges(const S* here, const S* const (&next)[3], int64_t channels, Vector<T>& sum) {
  for_each_vector<T>(channels, [&](int64_t c, auto part) {
    const Vector<T> value = load(here + c, part);
    for (int a = 0; a < A; ++a) sum += absolute<T>(load(next[a] + c, part) - value);
  });
}

template <int A, class S>
double edge_sum_of_rows(const View<const S>& view, const Offsets& offsets, const Neighbours<Compute<S>>& neighbours,
                        const Range& range) {
  using T = Compute<S>;
  const S* base = view.data + range.sample * view.batch_stride;
  double total = 0;
  auto walk = neighbours.walk_from(range.begin);
  for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
    Vector<T> sum = {};
    for (int64_t n = begin; n < std::min(begin + kTile, range.end); ++n, walk.advance()) {
      const S* here = base + offsets[n];
      const S* next[3] = {here, here, here};
      for (int a = 0; a < A; ++a)
        if (walk.has_next(a)) next[a] = base + offsets[n + neighbours.step(a)];
      add_row_edges<A, S, T>(here, next, view.shape.channels, sum);
    }
    total += sum_of_lanes<T>(sum);
  }
  return total;
}

template <class S>
double edge_sum_of_planes(const View<const S>& view, const Neighbours<Compute<S>>& neighbours, const Range& range) {
  using T = Compute<S>;
  using bits = typename Lanes<T>::bits;
  double total = 0;
  for (int64_t c = 0; c < view.shape.channels; ++c) {
    const S* plane = view.data + range.sample * view.batch_stride + c * view.channel_stride;
    Vector<T> sum = {};
    for (int a = 0; a < neighbours.axes(); ++a) {
      const int64_t step = neighbours.step(a);
      const S* here = plane + range.begin;
      const int64_t count = std::min(range.end, neighbours.count() - step) - range.begin;
      for_each_vector<T>(count, [&](int64_t n, auto part) {
        const bits difference = bits(absolute<T>(load(here + n + step, part) - load(here + n, part)));
        sum += Vector<T>(difference & neighbours.has_next(a, range.begin + n));
      });
    }
    total += sum_of_lanes<T>(sum);
  }
  return total;
}

// Sum of |forward differences| of a range of one sample, over all axes and channels.
template <class S>
double edge_sum(const View<const S>& view, const Offsets& offsets, const Neighbours<Compute<S>>& neighbours,
                const Range& range) {
  switch (layout_of(view)) {
    case Layout::rows:
      if (neighbours.axes() == 1) return edge_sum_of_rows<1>(view, offsets, neighbours, range);
      if (neighbours.axes() == 2) return edge_sum_of_rows<2>(view, offsets, neighbours, range);
      if (neighbours.axes() == 3) return edge_sum_of_rows<3>(view, offsets, neighbours, range);
      return 0;
    case Layout::planes:
      return edge_sum_of_planes(view, neighbours, range);
    case Layout::scattered:
      break;
  }
  double total = 0;
  const S* base = view.data + range.sample * view.batch_stride;
  auto walk = neighbours.walk_from(range.begin);
  for (int64_t n = range.begin; n < range.end; ++n, walk.advance())
    for (int a = 0; a < neighbours.axes(); ++a) {
      if (!walk.has_next(a)) continue;
      const int64_t here = offsets[n], next = offsets[n + neighbours.step(a)];
      for (int64_t c = 0; c < view.shape.channels; ++c) {
        const S* channel = base + c * view.channel_stride;
        total += std::abs(Compute<S>(channel[next]) - Compute<S>(channel[here]));
      }
    }
  return total;
}

}  // namespace BTINET_ISA
}  // namespace btinet
