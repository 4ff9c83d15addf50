// The gradient of one level's vectors: computes them again and goes back through them. A name d_x is the gradient with
// respect to x. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

template <class T>
class LevelBackward {
 public:
  LevelBackward(const LevelForward<T>& level, const LevelUpstream<T>& upstream, const LevelGradient<T>& gradient,
                const LevelWeights<T>& weight_gradient)
      : f(level), o(level.o), w(level.w), up(upstream), out(gradient), d(weight_gradient) {
    for (auto* values : {&d_hidden, &d_context, &d_clf_gate, &d_gained}) values->resize(o.batch * o.features);
    for (auto* values : {&d_residual, &d_seg_gate, &d_clf_context}) values->resize(o.batch * o.channels);
    for (auto* values : {&d_seg_side, &d_clf_side}) values->resize(o.batch * o.projection);
    d_gate_hidden.resize(o.batch * o.gate_hidden);
    gate_active.resize(o.batch * o.gate_hidden);
    d_logits.resize(2 * o.batch);
    d_signals.resize(o.batch * f.signal_count());
  }

  // Every thread of a team calls this, after the level itself has been run by the same team.
  void run() {
    if (o.signals != Signals::none) through_gate();
    through_modulation();
    linear_input_gradient<T, true>(d_clf_gate.data(), w.clf_gate_weight, o.batch, o.features, o.features,
                                   d_context.data());
    linear_input_gradient<T, true>(d_seg_gate.data(), w.seg_gate_weight, o.batch, o.channels, o.channels, out.mean);
    linear_input_gradient<T, true>(d_clf_context.data(), w.clf_to_seg_weight, o.batch, o.channels, o.features, out.clf);
    linear_weight_gradient(d_clf_gate.data(), f.context.data(), o.batch, o.features, o.features, d.clf_gate_weight,
                           d.clf_gate_bias);
    linear_weight_gradient(d_seg_gate.data(), f.in.mean, o.batch, o.channels, o.channels, d.seg_gate_weight,
                           d.seg_gate_bias);
    linear_weight_gradient(d_clf_context.data(), f.in.clf, o.batch, o.channels, o.features, d.clf_to_seg_weight,
                           d.clf_to_seg_bias);
#pragma omp barrier
    through_norm();
    linear_input_gradient<T, false>(d_hidden.data(), w.dense_weight, o.batch, o.features, o.hidden, out.pooled);
    linear_weight_gradient(d_hidden.data(), f.in.pooled, o.batch, o.features, o.hidden, d.dense_weight, d.dense_bias);
  }

 private:
  void through_gate() {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < o.batch; ++b) {
      T d_gates[2] = {up.gates[2 * b], up.gates[2 * b + 1]};
      for (int64_t i = b * o.channels; i < (b + 1) * o.channels; ++i) d_gates[0] += up.scale[i] * f.amplified[i];
      for (int64_t i = b * o.features; i < (b + 1) * o.features; ++i) d_gates[1] += up.clf[i] * f.gained[i];
      through_network(b, d_gates);
      if (f.proxies()) through_alignment(b);
    }
    if (f.proxies()) {
      linear_input_gradient<T, false>(d_seg_side.data(), w.seg_projection, o.batch, o.projection, o.channels,
                                      d_residual.data());
      linear_input_gradient<T, false>(d_clf_side.data(), w.clf_projection, o.batch, o.projection, o.features,
                                      d_gained.data());
      linear_weight_gradient<T>(d_seg_side.data(), f.residual.data(), o.batch, o.projection, o.channels,
                                d.seg_projection, nullptr);
      linear_weight_gradient<T>(d_clf_side.data(), f.gained.data(), o.batch, o.projection, o.features, d.clf_projection,
                                nullptr);
    } else {
      through_typical();
    }
    linear_weight_gradient(d_gate_hidden.data(), f.signals.data(), o.batch, o.gate_hidden, f.signal_count(),
                           d.hidden_weight, d.hidden_bias);
    linear_weight_gradient(d_logits.data(), gate_active.data(), o.batch, int64_t(2), o.gate_hidden, d.output_weight,
                           d.output_bias);
#pragma omp barrier
  }

  void through_network(int64_t b, const T (&d_gates)[2]) {
    const int64_t count = f.signal_count();
    const T first = f.gates[2 * b], second = f.gates[2 * b + 1];
    if (f.proxies()) {
      d_logits[2 * b] = d_gates[0] * first * (T(1) - first);
      d_logits[2 * b + 1] = d_gates[1] * second * (T(1) - second);
    } else {
      const T shared = first * d_gates[0] + second * d_gates[1];
      d_logits[2 * b] = first * (d_gates[0] - shared);
      d_logits[2 * b + 1] = second * (d_gates[1] - shared);
    }
    T* d_signal = &d_signals[b * count];
    for (int64_t i = 0; i < count; ++i) d_signal[i] = up.proxies[b * count + i];
    for (int64_t j = 0; j < o.gate_hidden; ++j) {
      const int64_t n = b * o.gate_hidden + j;
      T through = 0;
      for (int i = 0; i < 2; ++i) through += d_logits[2 * b + i] * w.output_weight[i * o.gate_hidden + j];
      gate_active[n] = f.relu(f.gate_hidden[n]);
      d_gate_hidden[n] = f.gate_hidden[n] > T(0) ? through : T(0);
      for (int64_t i = 0; i < count; ++i) d_signal[i] += d_gate_hidden[n] * w.hidden_weight[j * count + i];
    }
  }

  void through_alignment(int64_t b) {
    const T *seg = &f.seg_side[b * o.projection], *clf = &f.clf_side[b * o.projection];
    T *d_seg = &d_seg_side[b * o.projection], *d_clf = &d_clf_side[b * o.projection];
    const T d_alignment = d_signals[3 * b];
    T along = 0;  // of each unit vector, the part of its gradient along itself: the alignment, twice
    for (int64_t p = 0; p < o.projection; ++p) along += seg[p] * clf[p];
    // A clipped norm is a constant.
    const T along_seg = f.seg_inverse[b] < T(0) ? T(0) : along, along_clf = f.clf_inverse[b] < T(0) ? T(0) : along;
    for (int64_t p = 0; p < o.projection; ++p) {
      d_seg[p] = d_alignment * (clf[p] - seg[p] * along_seg) * std::abs(f.seg_inverse[b]);
      d_clf[p] = d_alignment * (seg[p] - clf[p] * along_clf) * std::abs(f.clf_inverse[b]);
    }
    if (out.edges) out.edges[b] = d_signals[3 * b + 1];
  }

  // Of the variance gate: each signal was divided by the batch's mean.
  void through_typical() {
#pragma omp single
    for (int i = 0; i < 2; ++i) {
      T shared = 0;
      for (int64_t b = 0; b < o.batch; ++b) shared += d_signals[2 * b + i] * f.signals[2 * b + i];
      shared /= T(o.batch);
      for (int64_t b = 0; b < o.batch; ++b) d_signals[2 * b + i] = (d_signals[2 * b + i] - shared) / f.typical[i];
    }
  }

  void through_modulation() {
    const bool gated = o.signals != Signals::none, proxies = f.proxies(), variance = o.signals == Signals::variance;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < o.batch; ++b) {
      const T seg_share = gated ? f.gates[2 * b] : T(1), clf_share = gated ? f.gates[2 * b + 1] : T(1);
      const T d_seg_variance = variance ? d_signals[2 * b] / T(o.channels) : T(0);
      for (int64_t i = b * o.channels; i < (b + 1) * o.channels; ++i) {
        const T modulation = T(1) + f.amplified[i];
        T d_amplified = up.scale[i] * seg_share;
        if (proxies) d_amplified += d_residual[i] * f.in.mean[i];
        if (variance) {
          d_amplified += T(2) * d_seg_variance * modulation * f.in.variance[i];
          out.variance[i] = d_seg_variance * modulation * modulation;
        }
        out.mean[i] = proxies ? d_residual[i] * f.amplified[i] : T(0);
        const T both = T(o.strength) * d_amplified * f.seg_gate[i] * f.clf_context[i];
        d_seg_gate[i] = both * (T(1) - f.seg_gate[i]);
        d_clf_context[i] = both * (T(1) - f.clf_context[i]);
      }
      T d_energy = 0, centre = 0;  // of the clf features' variance, by feature
      if (gated) {
        d_energy = proxies ? d_signals[3 * b + 2] / (T(1) + f.clf_variance[b]) : d_signals[2 * b + 1];
        d_energy *= T(2) / T(o.features);
        for (int64_t k = 0; k < o.features; ++k) centre += f.enhanced[b * o.features + k];
        centre /= T(o.features);
      }
      for (int64_t i = b * o.features; i < (b + 1) * o.features; ++i) {
        const T d_enhanced = d_energy * (f.enhanced[i] - centre);
        T d_more = up.clf[i] * clf_share + d_enhanced;
        if (proxies) d_more += d_gained[i];
        out.clf[i] = up.clf[i] + d_enhanced;
        d_clf_gate[i] = d_more * f.gained[i] * (T(1) - f.clf_gate[i]);
        d_context[i] = d_more * f.clf_gate[i];
      }
    }
  }

  void through_norm() {
    constexpr int64_t kBlock = 64;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < o.features; first += kBlock)
      for (int64_t k = first; k < std::min(first + kBlock, o.features); ++k) {
        double sum = 0, product = 0;
        for (int64_t i = k; i < o.batch * o.features; i += o.features) {
          sum += d_context[i];
          product += double(d_context[i]) * f.normal[i];
        }
        d.norm_bias[k] = T(sum);
        d.norm_weight[k] = T(product);
        const T mean = o.training ? T(sum / double(o.batch)) : T(0);
        const T slope = o.training ? T(product / double(o.batch)) : T(0);
        const T factor = w.norm_weight[k] * f.inverse[k];
        for (int64_t i = k; i < o.batch * o.features; i += o.features)
          d_hidden[i] = f.hidden[i] > T(0) ? factor * (d_context[i] - mean - f.normal[i] * slope) : T(0);
      }
  }

  const LevelForward<T>& f;
  const LevelOptions& o;
  const LevelWeights<const T>& w;
  const LevelUpstream<T>& up;
  const LevelGradient<T>& out;
  const LevelWeights<T>& d;
  Scratch<T> d_hidden, d_context, d_clf_gate, d_gained;  // [B, K]
  Scratch<T> d_residual, d_seg_gate, d_clf_context;      // [B, C]; the gates' before their sigmoid
  Scratch<T> d_seg_side, d_clf_side;                     // [B, P]
  Scratch<T> d_gate_hidden, gate_active;                 // [B, H]
  Scratch<T> d_logits, d_signals;                        // [B, 2], [B, signals]
};

template <class T>
void level_backward(const LevelOptions& options, const LevelInputs<T>& in, const LevelWeights<const T>& weights,
                    const LevelUpstream<T>& upstream, const LevelGradient<T>& gradient,
                    const LevelWeights<T>& weight_gradient, int threads) {
  LevelForward<T> level(options, in, weights);
  LevelBackward<T> backward(level, upstream, gradient, weight_gradient);
#pragma omp parallel num_threads(team_size(options, threads))
  {
    level.run();
    backward.run();
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
