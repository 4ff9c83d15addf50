// x times the sigmoid of a linear map of h at each position, in one pass each way: over tiles of rows, or over planes.
// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// How both passes are cut; what is summed in which order depends on the shape alone.
struct GatePlan {
  template <class S, class... Views>
  explicit GatePlan(const View<S>& out, const Views&... views)
      : planes(((layout_of(views) == Layout::planes) && ...) && layout_of(out) == Layout::planes),
        streaming(outgrows_caches(out)),
        ranges(out.shape, planes ? kPlaneTile : kTile) {}

  const bool planes;
  const bool streaming;
  const Partition ranges;
};

// gates = sigmoid(logits), over the logits.
template <class T>
inline void gates_of(T* logits, int64_t count) {
  for_each_vector<T>(count, [&](int64_t i, auto part) { store(logits + i, sigmoid<T>(load(logits + i, part)), part); });
}

template <class T>
inline T dot_row(const T* a, const T* b, int64_t count) {
  Vector<T> sum = {};
  for (int64_t i = 0; i < count; i += Lanes<T>::count) sum += load(a + i) * load(b + i);
  return sum_of_lanes<T>(sum);
}

// What one thread needs for the forward pass. Gates of a whole range come before its products: two long streams one
// after the other are fetched faster than short pieces in turn.
template <class S>
class PositionGate {
  using T = Compute<S>;

 public:
  PositionGate(const View<const S>& x, const View<const S>& h, const T* weight, T bias, const View<S>& out,
               bool streaming)
      : x_(x),
        h_(h),
        weight_(weight),
        bias_(bias),
        out_(out),
        streaming_(streaming),
        of_x_(x),
        of_h_(h),
        of_out_(out) {}

  void planes(const Range& range, T* gates) const {
    for_each_tile(range, kPlaneTile, [&](const Range& tile) {
      T* at = gates + tile.begin - range.begin;
      const int64_t count = tile.end - tile.begin;
      std::fill_n(at, count, bias_);
      for_each_planes<4>(h_.shape.channels, [&](int64_t first, auto number) {
        for_each_vector<T>(count, [&](int64_t i, auto part) {
          Vector<T> sum = load(at + i, part);
          for (int64_t k = first; k < first + number; ++k) sum += weight_[k] * load(run_of(h_, tile, k) + i, part);
          store(at + i, sum, part);
        });
      });
      gates_of(at, count);
      for (int64_t c = 0; c < x_.shape.channels; ++c) {
        const S* from = run_of(x_, tile, c);
        store_run(run_of(out_, tile, c), count, streaming_,
                  [&](int64_t i, auto part) { return load(from + i, part) * load(at + i, part); });
      }
    });
  }

  void rows(const Range& range, T* gates) {
    for_each_tile(range, kTile, [&](const Range& tile) {
      const Tile<T> h = of_h_.read(tile);
      T* at = gates + tile.begin - range.begin;
      for (int64_t r = 0; r < tile.end - tile.begin; ++r)
        at[r] = bias_ + dot_row(h.data + r * h.stride, weight_, h_.shape.channels);
      gates_of(at, tile.end - tile.begin);
    });
    for_each_tile(range, kTile, [&](const Range& tile) {
      const Tile<T> x = of_x_.read(tile);
      of_out_.begin(tile);
      for (int64_t r = 0; r < tile.end - tile.begin; ++r) {
        const T *from = x.data + r * x.stride, gate = gates[tile.begin - range.begin + r];
        store_run(of_out_.row(r), x_.shape.channels, streaming_ && of_out_.direct(),
                  [&](int64_t c, auto) { return load(from + c) * gate; });
      }
      of_out_.end();
    });
  }

 private:
  const View<const S>&x_, &h_;
  const T* weight_;
  const T bias_;
  const View<S>& out_;
  const bool streaming_;
  TileReader<S> of_x_, of_h_;
  TileWriter<S> of_out_;
};

template <class S>
void position_gate(const View<const S>& x, const View<const S>& h, const PositionWeights<const Compute<S>>& weights,
                   Compute<S>* gate, const View<S>& out, int threads) {
  using T = Compute<S>;
  const GatePlan plan(out, x, h);
  Scratch<T> weight;
  copy_padded(weights.weight, h.shape.channels, weight);
#pragma omp parallel num_threads(threads)
  {
    PositionGate<S> pass(x, h, weight.data(), *weights.bias, out, plan.streaming);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < plan.ranges.ranges(); ++index) {
      const Range range = plan.ranges.range(index);
      T* gates = gate + range.sample * x.shape.positions() + range.begin;
      plan.planes ? pass.planes(range, gates) : pass.rows(range, gates);
    }
    if (plan.streaming) end_streams();
  }
}

// What one thread needs for the backward pass. A name d_z is the gradient of z.
template <class S>
class PositionGateBackward {
  using T = Compute<S>;

 public:
  PositionGateBackward(const View<const S>& d_out, const View<const S>& x, const View<const S>& h, const T* gate,
                       const T* weight, const View<S>& d_x, const View<S>& d_h, bool streaming)
      : d_out_(d_out),
        x_(x),
        h_(h),
        gate_(gate),
        weight_(weight),
        d_x_(d_x),
        d_h_(d_h),
        streaming_(streaming),
        of_d_out_(d_out),
        of_x_(x),
        of_h_(h),
        of_d_x_(d_x),
        of_d_h_(d_h) {
    tile_sums_.fill(padded<T>(h.shape.channels), T(0));
  }

  // sums [K + 1] += gradients of the weight and, last, of the bias.
  void planes(const Range& tile, double* sums) {
    const int64_t count = tile.end - tile.begin, inputs = h_.shape.channels;
    const T* gates = gates_of_tile(tile);
    d_logit_.fill(kPlaneTile, T(0));
    for (int64_t c = 0; c < x_.shape.channels; ++c) {
      const S *upstream = run_of(d_out_, tile, c), *from = run_of(x_, tile, c);
      store_run(run_of(d_x_, tile, c), count, streaming_, [&](int64_t i, auto part) {
        const Vector<T> gradient = load(upstream + i, part);
        store(&d_logit_[i], load(&d_logit_[i], part) + gradient * load(from + i, part), part);
        return gradient * load(gates + i, part);
      });
    }
    Vector<T> of_bias = {};
    for_each_vector<T>(count, [&](int64_t i, auto part) {
      const Vector<T> at = load(gates + i, part), gradient = load(&d_logit_[i], part) * (at * (T(1) - at));
      store(&d_logit_[i], gradient, part);
      of_bias += gradient;
    });
    sums[inputs] += sum_of_lanes<T>(of_bias);
    for (int64_t k = 0; k < inputs; ++k) {
      const S* from = run_of(h_, tile, k);
      S* to = run_of(d_h_, tile, k);
      Vector<T> sum = {};
      for_each_vector<T>(count, [&](int64_t i, auto part) {
        const Vector<T> gradient = load(&d_logit_[i], part);
        sum += gradient * load(from + i, part);
        store(to + i, gradient * weight_[k], part);
      });
      sums[k] += sum_of_lanes<T>(sum);
    }
  }

  void rows(const Range& tile, double* sums) {
    const int64_t channels = x_.shape.channels, inputs = h_.shape.channels;
    const Tile<T> d_out = of_d_out_.read(tile), x = of_x_.read(tile), h = of_h_.read(tile);
    const T* gates = gates_of_tile(tile);
    of_d_x_.begin(tile);
    of_d_h_.begin(tile);
    for (int64_t r = 0; r < tile.end - tile.begin; ++r) {
      const T *upstream = d_out.data + r * d_out.stride, *from = x.data + r * x.stride, *of_h = h.data + r * h.stride;
      Vector<T> product = {};
      store_run(of_d_x_.row(r), channels, streaming_ && of_d_x_.direct(), [&](int64_t c, auto) {
        const Vector<T> gradient = load(upstream + c);
        product += gradient * load(from + c);
        return gradient * gates[r];
      });
      const T d_logit = sum_of_lanes<T>(product) * (gates[r] * (T(1) - gates[r]));
      sums[inputs] += d_logit;
      S* to = of_d_h_.row(r);
      for_each_vector<T>(inputs, [&](int64_t k, auto part) {
        store(&tile_sums_[k], load(&tile_sums_[k]) + load(of_h + k) * d_logit);
        store(to + k, load(weight_ + k) * d_logit, part);
      });
    }
    of_d_x_.end();
    of_d_h_.end();
    move_sums(tile_sums_.data(), sums, inputs);
  }

 private:
  const T* gates_of_tile(const Range& tile) const { return gate_ + tile.sample * x_.shape.positions() + tile.begin; }

  const View<const S>&d_out_, &x_, &h_;
  const T *gate_, *weight_;
  const View<S>&d_x_, &d_h_;
  const bool streaming_;
  TileReader<S> of_d_out_, of_x_, of_h_;
  TileWriter<S> of_d_x_, of_d_h_;
  Scratch<T> d_logit_, tile_sums_;
};

template <class S>
void position_gate_backward(const View<const S>& d_out, const View<const S>& x, const View<const S>& h,
                            const Compute<S>* gate, const PositionWeights<const Compute<S>>& weights,
                            const View<S>& d_x, const View<S>& d_h, const PositionWeights<Compute<S>>& d_weights,
                            int threads) {
  using T = Compute<S>;
  const int64_t sizes = h.shape.channels + 1;
  const GatePlan plan(d_x, d_out, x, h, d_h);
  Scratch<T> weight;
  copy_padded(weights.weight, h.shape.channels, weight);
  std::vector<double> sums(plan.ranges.ranges() * sizes);
#pragma omp parallel num_threads(threads)
  {
    PositionGateBackward<S> pass(d_out, x, h, gate, weight.data(), d_x, d_h, plan.streaming);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < plan.ranges.ranges(); ++index)
      for_each_tile(plan.ranges.range(index), plan.planes ? kPlaneTile : kTile, [&](const Range& tile) {
        plan.planes ? pass.planes(tile, &sums[index * sizes]) : pass.rows(tile, &sums[index * sizes]);
      });
    if (plan.streaming) end_streams();
  }
  std::vector<T> total(sizes);
  sum_ranges(sums.data(), plan.ranges.ranges(), sizes, 1.0, total.data());
  std::copy_n(total.data(), sizes - 1, d_weights.weight);
  *d_weights.bias = total.back();
}

}  // namespace BTINET_ISA
}  // namespace btinet
