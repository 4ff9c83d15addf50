// The passes of batch normalisation: over rows of channels, a few positions at a time, or over planes, a channel at a
// time while it is in the caches. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kBlockRows = 16;        // each row of a block is a stream that the hardware fetches ahead of time
constexpr int64_t kPlaneChunk = 512;      // positions whose sum is not yet added up in double
constexpr int64_t kFewestPositions = 48;  // that are worth sums of their own

// Positions with their channels side by side.
template <class S>
struct Rows {
  S* data;
  int64_t step;

  S* at(int64_t r, int64_t c) const { return data + r * step + c; }
};

// Two sums for each channel of each group of positions, in double.
class PairSums {
 public:
  PairSums(int64_t groups, int64_t channels) : groups_(groups), channels_(channels), values_(2 * groups * channels) {}

  double* first(int64_t group) { return values_.data() + 2 * group * channels_; }
  double* second(int64_t group) { return first(group) + channels_; }
  std::pair<double, double> total(int64_t c) const {
    double sums[2] = {};
    for (int64_t i = 0; i < 2 * groups_; ++i) sums[i % 2] += values_[i * channels_ + c];
    return {sums[0], sums[1]};
  }

 private:
  int64_t groups_, channels_;
  std::vector<double> values_;
};

// Adds term(r, c, part, a, b) up over the rows of a block, one row after the other: the hardware fetches a few streams
// ahead of time. `term` adds to a and to b of the vector of channels at c.
template <class T, class Term>
inline void add_pairs_of_rows(int64_t rows, int64_t channels, Scratch<T>& sums, double* first, double* second,
                              const Term& term) {
  const int64_t stride = padded<T>(channels);
  sums.fill(2 * stride, T(0));
  for (int64_t r = 0; r < rows; ++r)
    for_each_vector<T>(channels, [&](int64_t c, auto part) {
      Vector<T> a = load(&sums[c]), b = load(&sums[stride + c]);
      term(r, c, part, a, b);
      store(&sums[c], a);
      store(&sums[stride + c], b);
    });
  for (int64_t c = 0; c < channels; c += Lanes<T>::count) {
    const int64_t count = std::min(Lanes<T>::count, channels - c);
    add_lanes<T>(load(&sums[c]), first + c, count);
    add_lanes<T>(load(&sums[stride + c]), second + c, count);
  }
}

// The same over consecutive positions of one channel; `term` leaves lanes beyond `count` out.
template <class T, class Term>
inline std::pair<double, double> pairs_of_plane(int64_t count, const Term& term) {
  double sums[2] = {};
  for (int64_t begin = 0; begin < count; begin += kPlaneChunk) {
    Vector<T> a = {}, b = {};
    for_each_vector<T>(std::min(kPlaneChunk, count - begin),
                       [&](int64_t i, auto part) { term(begin + i, part, a, b); });
    sums[0] += sum_of_lanes<T>(a);
    sums[1] += sum_of_lanes<T>(b);
  }
  return {sums[0], sums[1]};
}

// How the passes reach positions of x, of the gradient of the result, and of what they write; the gradient may be null.
template <class S>
class Operands {
 public:
  using T = Compute<S>;

  Operands(const View<const S>& x, const View<const S>& grad, const View<S>& out)
      : x_(x), grad_(grad), out_(out), partition_(x.shape, kBlockRows), x_at_(x), grad_at_(grad), out_at_(out) {
    const Layout layout = grad.data ? layout_of(x, grad, out) : layout_of(x, out);
    planes_ = layout == Layout::planes;
    in_place_ = layout == Layout::rows && x_at_.even() && grad_at_.even() && out_at_.even();
    const int64_t worth = x.shape.batch * x.shape.positions() / kFewestPositions;
    groups_ = std::max<int64_t>(1, std::min(worth, partition_.groups(2 * sizeof(double) * channels())));
  }

  bool planes() const { return planes_; }
  int64_t groups() const { return groups_; }
  int64_t channels() const { return x_.shape.channels; }
  int64_t positions() const { return x_.shape.positions(); }
  int64_t samples() const { return x_.shape.batch; }
  const S* x(int64_t sample, int64_t c) const { return plane(x_, sample, c); }
  const S* grad(int64_t sample, int64_t c) const { return plane(grad_, sample, c); }
  S* out(int64_t sample, int64_t c) const { return plane(out_, sample, c); }

  // Calls pass(x, grad, out, count of rows) for the blocks of a group: rows in place, or copies of them, of which `out`
  // is stored if kWrites.
  template <bool kWrites, class Pass>
  void for_each_block(int64_t group, const Pass& pass) const {
    const int64_t stride = padded<T>(channels());
    Scratch<T> copies(in_place_ ? 0 : 3 * kBlockRows * stride);
    partition_.for_each_stretch(group, groups_, [&](const Range& stretch) {
      for_each_tile(stretch, kBlockRows, [&](const Range& block) {
        const int64_t rows = block.end - block.begin;
        if (in_place_)
          return pass(rows_of(x_, x_at_, block), rows_of(grad_, grad_at_, block), rows_of(out_, out_at_, block), rows);
        T* copy[3];
        for (int i = 0; i < 3; ++i) copy[i] = copies.data() + i * kBlockRows * stride;
        load_tile(x_, x_at_, block, 0, channels(), copy[0], stride);
        if (grad_.data) load_tile(grad_, grad_at_, block, 0, channels(), copy[1], stride);
        pass(Rows<const T>{copy[0], stride}, Rows<const T>{copy[1], stride}, Rows<T>{copy[2], stride}, rows);
        if (kWrites) store_tile(out_, out_at_, block, 0, channels(), copy[2], stride);
      });
    });
  }

 private:
  template <class U>
  static U* plane(const View<U>& view, int64_t sample, int64_t c) {
    return view.data + sample * view.batch_stride + c * view.channel_stride;
  }
  template <class U>
  static Rows<U> rows_of(const View<U>& view, const Offsets& offsets, const Range& block) {
    return {plane(view, block.sample, 0) + offsets[block.begin], offsets.step()};
  }

  View<const S> x_, grad_;
  View<S> out_;
  Partition partition_;
  Offsets x_at_, grad_at_, out_at_;
  bool planes_, in_place_;
  int64_t groups_;
};

// Adds up the values less `shift`, and their squares: nothing cancels where the mean is far from 0.
template <class T, class U>
inline void add_shifted(Vector<T> value, U part, Vector<T> shift, Vector<T>& sum, Vector<T>& square) {
  const Vector<T> centred = filled<T>(value - shift, part, T(0));
  sum += centred;
  square += centred * centred;
}

template <class T>
void set_moments(const Moments<T>& moments, int64_t c, T shift, std::pair<double, double> sums, double count) {
  const double mean = sums.first / count;
  moments.mean[c] = T(shift + mean);
  const double variance = sums.second / count - mean * mean;
  moments.variance[c] = T(variance < 0 ? 0.0 : variance);  // a NaN stays one
}

template <class S, class Act>
void normalise(const View<const S>& x, const NormWeights<Compute<S>>& weights, bool training,
               const Moments<Compute<S>>& moments, const View<S>& out, int threads, Act act) {
  using T = Compute<S>;
  const Operands<S> operands(x, View<const S>{nullptr, x.shape, 0, 0, {}}, out);
  const int64_t channels = operands.channels(), positions = operands.positions(), samples = operands.samples();
  const double count = double(samples) * positions;
  ConstantsTable<T> table(channels);
  Scratch<T> shift;  // the first position of each channel
  shift.fill(padded<T>(channels), T(0));
  for (int64_t c = 0; c < channels; ++c) shift[c] = *operands.x(0, c);
  PairSums sums(operands.planes() || !training ? 0 : operands.groups(), channels);
  const auto activated = [&](const Constants<T>& of, Vector<T> value) {
    return act.template of<T>(of.normalised(of.centred(value)));
  };

#pragma omp parallel num_threads(threads)
  if (operands.planes()) {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
      std::pair<double, double> total;
      for (int64_t b = 0; training && b < samples; ++b) {
        const S* from = operands.x(b, c);
        const auto [sum, square] = pairs_of_plane<T>(positions, [&](int64_t i, auto part, auto& a, auto& b) {
          add_shifted<T>(load(from + i, part), part, broadcast(shift[c]), a, b);
        });
        total.first += sum;
        total.second += square;
      }
      if (training) set_moments(moments, c, shift[c], total, count);
      table.set_forward(c, weights, moments.mean[c], moments.variance[c]);
      const Constants<T> of = table.channel(c);
      for (int64_t b = samples - 1; b >= 0; --b) {
        const S* from = operands.x(b, c);
        S* to = operands.out(b, c);
        for_each_vector<T>(positions,
                           [&](int64_t i, auto part) { store(to + i, activated(of, load(from + i, part)), part); });
      }
    }
  } else {
    if (training) {
#pragma omp for schedule(static)
      for (int64_t group = 0; group < operands.groups(); ++group) {
        Scratch<T> block_sums;
        operands.template for_each_block<false>(group, [&](auto from, auto, auto, int64_t rows) {
          const auto term = [&](int64_t r, int64_t c, auto part, auto& a, auto& b) {
            add_shifted<T>(load(from.at(r, c), part), Whole{}, load(&shift[c]), a, b);
          };
          add_pairs_of_rows<T>(rows, channels, block_sums, sums.first(group), sums.second(group), term);
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
      if (training) set_moments(moments, c, shift[c], sums.total(c), count);
      table.set_forward(c, weights, moments.mean[c], moments.variance[c]);
    }
    // Backwards: the first reads still find what the pass before read last.
#pragma omp for schedule(static)
    for (int64_t group = operands.groups() - 1; group >= 0; --group)
      operands.template for_each_block<true>(group, [&](auto from, auto, auto to, int64_t rows) {
        for (int64_t r = 0; r < rows; ++r)
          for_each_vector<T>(channels, [&](int64_t c, auto part) {
            store(to.at(r, c), activated(table.channels(c), load(from.at(r, c), part)), part);
          });
      });
  }
}

template <class S, class Act>
void normalise_backward(const View<const S>& x, const View<const S>& grad, const NormWeights<Compute<S>>& weights,
                        bool training, const Moments<const Compute<S>>& moments, const View<S>& out,
                        Compute<S>* d_weight, Compute<S>* d_bias, int threads, Act act) {
  using T = Compute<S>;
  // An exponential costs more than writing d_z where the gradient of x goes, which pass 2 reads and writes anyway.
  constexpr bool kKeeps = std::is_same_v<Act, SiLU> && std::is_same_v<S, T>;
  const std::conditional_t<kKeeps, Identity, Act> left{};  // to go through in pass 2
  const View<const S> kept{out.data,
                           out.shape,
                           out.batch_stride,
                           out.channel_stride,
                           {out.spatial_stride[0], out.spatial_stride[1], out.spatial_stride[2]}};
  const Operands<S> operands(x, grad, out), again(x, kKeeps ? kept : grad, out);
  const int64_t channels = operands.channels(), positions = operands.positions(), samples = operands.samples();
  ConstantsTable<T> table(channels);
  for (int64_t c = 0; c < channels; ++c) table.set_forward(c, weights, moments.mean[c], moments.variance[c]);
  PairSums sums(operands.planes() ? 0 : operands.groups(), channels);
  const auto add_term = [&](const Constants<T>& of, Vector<T> value, Vector<T> upstream, auto& a, auto& b) {
    const Vector<T> centred = of.centred(value), d_z = act.template gradient<T>(of.normalised(centred), upstream);
    a += d_z;
    b += d_z * centred;
    return d_z;
  };
  const auto finish = [&](int64_t c, std::pair<double, double> total) {
    d_bias[c] = T(total.first);
    d_weight[c] = T(total.second * table.inverse_deviation(weights, moments.variance[c]));
    if (training)
      table.set_backward(c, weights, moments.variance[c], total.first, total.second, double(samples) * positions);
  };
  const auto gradient = [&](const Constants<T>& of, Vector<T> value, Vector<T> upstream) {
    const Vector<T> centred = of.centred(value);
    return of.gradient(centred, left.template gradient<T>(of.normalised(centred), upstream));
  };

#pragma omp parallel num_threads(threads)
  if (operands.planes()) {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
      const Constants<T> forward = table.channel(c);
      std::pair<double, double> total;
      for (int64_t b = 0; b < samples; ++b) {
        const S *from = operands.x(b, c), *above = operands.grad(b, c);
        S* to = operands.out(b, c);
        const auto [sum, product] = pairs_of_plane<T>(positions, [&](int64_t i, auto part, auto& a, auto& b) {
          const Vector<T> d_z = add_term(forward, load(from + i, part), load(above + i, part), a, b);
          if (kKeeps) store(to + i, d_z, part);
        });
        total.first += sum;
        total.second += product;
      }
      finish(c, total);
      const Constants<T> of = table.channel(c);
      for (int64_t b = samples - 1; b >= 0; --b) {
        const S *from = again.x(b, c), *above = again.grad(b, c);
        S* to = again.out(b, c);
        for_each_vector<T>(positions, [&](int64_t i, auto part) {
          store(to + i, gradient(of, load(from + i, part), load(above + i, part)), part);
        });
      }
    }
  } else {
#pragma omp for schedule(static)
    for (int64_t group = 0; group < operands.groups(); ++group) {
      Scratch<T> block_sums;
      operands.template for_each_block<kKeeps>(group, [&](auto from, auto above, auto to, int64_t rows) {
        const auto term = [&](int64_t r, int64_t c, auto part, auto& a, auto& b) {
          const Vector<T> d_z =
              add_term(table.channels(c), load(from.at(r, c), part), load(above.at(r, c), part), a, b);
          if (kKeeps) store(to.at(r, c), d_z, part);
        };
        add_pairs_of_rows<T>(rows, channels, block_sums, sums.first(group), sums.second(group), term);
      });
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) finish(c, sums.total(c));
#pragma omp for schedule(static)
    for (int64_t group = again.groups() - 1; group >= 0; --group)
      again.template for_each_block<true>(group, [&](auto from, auto above, auto to, int64_t rows) {
        for (int64_t r = 0; r < rows; ++r)
          for_each_vector<T>(channels, [&](int64_t c, auto part) {
            store(to.at(r, c), gradient(table.channels(c), load(from.at(r, c), part), load(above.at(r, c), part)),
                  part);
          });
      });
  }
}

template <class S>
void batch_norm(const View<const S>& x, const NormWeights<Compute<S>>& weights, bool training,
                const Moments<Compute<S>>& moments, const View<S>& out, int threads) {
  with_activation(weights.act, [&](auto act) { normalise(x, weights, training, moments, out, threads, act); });
}

template <class S>
void batch_norm_backward(const View<const S>& x, const View<const S>& grad, const NormWeights<Compute<S>>& weights,
                         bool training, const Moments<const Compute<S>>& moments, const View<S>& out,
                         Compute<S>* d_weight, Compute<S>* d_bias, int threads) {
  with_activation(weights.act, [&](auto act) {
    normalise_backward(x, grad, weights, training, moments, out, d_weight, d_bias, threads, act);
  });
}

}  // namespace BTINET_ISA
}  // namespace btinet
