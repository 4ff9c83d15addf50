// One level's vectors, computed by a team of threads. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr double kNormaliseEpsilon = 1e-12;  // tf.math.l2_normalize bounds the squared norm from below by this
constexpr double kVarianceEpsilon = 1e-8;

// Everything between inputs and results that the gradient needs too. Every thread of a team calls `run`.
template <class T>
class LevelForward {
 public:
  LevelForward(const LevelOptions& options, const LevelInputs<T>& in, const LevelWeights<const T>& weights)
      : o(options), in(in), w(weights) {
    for (auto* values : {&hidden, &normal, &context, &clf_gate, &gained, &enhanced})
      values->resize(o.batch * o.features);
    for (auto* values : {&seg_gate, &clf_context, &amplified, &residual}) values->resize(o.batch * o.channels);
    for (auto* values : {&seg_side, &clf_side}) values->resize(o.batch * o.projection);
    for (auto* values : {&seg_inverse, &clf_inverse, &clf_variance}) values->resize(o.batch);
    for (auto* values : {&batch_mean, &batch_var, &inverse}) values->resize(o.features);
    signals.resize(o.batch * signal_count());
    gate_hidden.resize(o.batch * o.gate_hidden);
    gates.resize(2 * o.batch);
  }

  int64_t signal_count() const { return o.signals == Signals::proxies ? 3 : 2; }
  bool proxies() const { return o.signals == Signals::proxies; }

  void run() {
    linear(in.pooled, w.dense_weight, w.dense_bias, o.batch, o.features, o.hidden, hidden.data());
    linear(in.mean, w.seg_gate_weight, w.seg_gate_bias, o.batch, o.channels, o.channels, seg_gate.data());
    linear(in.clf, w.clf_to_seg_weight, w.clf_to_seg_bias, o.batch, o.channels, o.features, clf_context.data());
#pragma omp barrier
    normalise_context();
    modulate();
#pragma omp barrier
    linear(context.data(), w.clf_gate_weight, w.clf_gate_bias, o.batch, o.features, o.features, clf_gate.data());
    if (proxies())
      linear<T>(residual.data(), w.seg_projection, nullptr, o.batch, o.projection, o.channels, seg_side.data());
#pragma omp barrier
    enhance();
    if (o.signals == Signals::none) return;
    if (proxies())
      linear<T>(gained.data(), w.clf_projection, nullptr, o.batch, o.projection, o.features, clf_side.data());
#pragma omp barrier
    gate();
  }

  const LevelOptions& o;
  const LevelInputs<T>& in;
  const LevelWeights<const T>& w;
  Scratch<T> hidden;                     // [B, K], before its ReLU
  Scratch<T> normal, context, clf_gate;  // [B, K]
  Scratch<T> gained, enhanced;           // [B, K]: clf' - clf, clf'
  Scratch<T> seg_gate, clf_context;      // [B, C]
  Scratch<T> amplified, residual;        // [B, C]: modulation - 1, and times the mean
  Scratch<T> seg_side, clf_side;         // [B, P], unit vectors
  Scratch<T> seg_inverse, clf_inverse;   // [B], of their norms; negative where the norm was too small to be used
  Scratch<T> clf_variance;               // [B]
  Scratch<T> batch_mean, batch_var, inverse;
  Scratch<T> signals, gate_hidden, gates;  // [B, signals], [B, H] before its ReLU, [B, 2]
  T typical[2];                            // the batch's mean signals (variance gate)

  static T relu(T value) { return value < T(0) ? T(0) : value; }

 private:
  void normalise_context() {
    constexpr int64_t kBlock = 64;
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < o.features; first += kBlock) {
      const int64_t last = std::min(first + kBlock, o.features);
      for (int64_t k = first; k < last; ++k) {
        double mean = 0, variance = 0;
        for (int64_t b = 0; b < o.batch; ++b) mean += relu(hidden[b * o.features + k]);
        mean /= double(o.batch);
        for (int64_t b = 0; b < o.batch; ++b) {
          const double centred = relu(hidden[b * o.features + k]) - mean;
          variance += centred * centred;
        }
        batch_mean[k] = o.training ? T(mean) : w.running_mean[k];
        batch_var[k] = o.training ? T(variance / double(o.batch)) : w.running_var[k];
        inverse[k] = T(1) / std::sqrt(batch_var[k] + T(o.eps));
      }
      for (int64_t b = 0; b < o.batch; ++b)
        for (int64_t k = first; k < last; ++k) {
          const int64_t i = b * o.features + k;
          normal[i] = (relu(hidden[i]) - batch_mean[k]) * inverse[k];
          context[i] = normal[i] * w.norm_weight[k] + w.norm_bias[k];
        }
    }
  }

  void modulate() {
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < o.batch; ++b)
      for_each_vector<T>(o.channels, [&](int64_t c, auto part) {
        const int64_t i = b * o.channels + c;
        const Vector<T> seg = sigmoid<T>(load(&seg_gate[i], part)), clf = sigmoid<T>(load(&clf_context[i], part));
        const Vector<T> more = T(o.strength) * seg * clf;
        store(&seg_gate[i], seg, part);
        store(&clf_context[i], clf, part);
        store(&amplified[i], more, part);
        store(&residual[i], more * load(in.mean + i, part), part);
      });
  }

  void enhance() {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < o.batch; ++b)
      for_each_vector<T>(o.features, [&](int64_t k, auto part) {
        const int64_t i = b * o.features + k;
        const Vector<T> share = sigmoid<T>(load(&clf_gate[i], part)), more = share * load(&context[i], part);
        store(&clf_gate[i], share, part);
        store(&gained[i], more, part);
        store(&enhanced[i], load(in.clf + i, part) + more, part);
      });
  }

  // Population variance of one sample's features.
  T variance_of(const T* values) const {
    double mean = 0, variance = 0;
    for (int64_t k = 0; k < o.features; ++k) mean += values[k];
    mean /= double(o.features);
    for (int64_t k = 0; k < o.features; ++k) variance += (values[k] - mean) * (values[k] - mean);
    return T(variance / double(o.features));
  }

  // Turns `side` into a unit vector.
  T normalise(T* side) const {
    T squared = 0;
    for (int64_t p = 0; p < o.projection; ++p) squared += side[p] * side[p];
    const bool clipped = squared < T(kNormaliseEpsilon);
    const T inverse_norm = T(1) / std::sqrt(clipped ? T(kNormaliseEpsilon) : squared);
    for (int64_t p = 0; p < o.projection; ++p) side[p] *= inverse_norm;
    return clipped ? -inverse_norm : inverse_norm;
  }

  void gate() {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < o.batch; ++b) {
      T* signal = &signals[b * signal_count()];
      clf_variance[b] = variance_of(&enhanced[b * o.features]);
      if (proxies()) {
        T *seg = &seg_side[b * o.projection], *clf = &clf_side[b * o.projection];
        seg_inverse[b] = normalise(seg);
        clf_inverse[b] = normalise(clf);
        T alignment = 0;
        for (int64_t p = 0; p < o.projection; ++p) alignment += seg[p] * clf[p];
        signal[0] = alignment;
        signal[1] = in.edges[b];
        signal[2] = std::log1p(clf_variance[b]);
        run_network(b);
      } else {
        T sum = 0;
        for (int64_t c = 0; c < o.channels; ++c) {
          const T modulation = T(1) + amplified[b * o.channels + c];
          sum += modulation * modulation * in.variance[b * o.channels + c];
        }
        signal[0] = sum / T(o.channels);
        signal[1] = clf_variance[b];
      }
    }
    if (proxies()) return;
#pragma omp single
    for (int i = 0; i < 2; ++i) {
      T sum = 0;
      for (int64_t b = 0; b < o.batch; ++b) sum += signals[2 * b + i];
      typical[i] = sum / T(o.batch) + T(kVarianceEpsilon);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < o.batch; ++b) {
      for (int i = 0; i < 2; ++i) signals[2 * b + i] /= typical[i];
      run_network(b);
    }
  }

  void run_network(int64_t b) {
    const int64_t count = signal_count();
    const T* signal = &signals[b * count];
    T logits[2] = {w.output_bias[0], w.output_bias[1]};
    for (int64_t j = 0; j < o.gate_hidden; ++j) {
      T sum = w.hidden_bias[j];
      for (int64_t i = 0; i < count; ++i) sum += w.hidden_weight[j * count + i] * signal[i];
      gate_hidden[b * o.gate_hidden + j] = sum;
      for (int i = 0; i < 2; ++i) logits[i] += w.output_weight[i * o.gate_hidden + j] * relu(sum);
    }
    if (proxies()) {
      for (int i = 0; i < 2; ++i) gates[2 * b + i] = T(1) / (T(1) + std::exp(-logits[i]));
    } else {
      const T first = T(1) / (T(1) + std::exp(logits[1] - logits[0]));
      gates[2 * b] = first;
      gates[2 * b + 1] = T(1) / (T(1) + std::exp(logits[0] - logits[1]));
    }
  }
};

// A few samples' vectors take less time than threads need to wait for one another.
inline int team_size(const LevelOptions& o, int threads) {
  const double weights = double(o.features) * (o.hidden + o.features + o.channels) + double(o.channels) * o.channels +
                         double(o.projection) * (o.channels + o.features);
  constexpr double kWorthSharing = 1e7;  // multiplications
  return double(o.batch) * weights < kWorthSharing ? 1 : threads;
}

template <class T>
void level_vectors(const LevelOptions& options, const LevelInputs<T>& in, const LevelWeights<const T>& weights,
                   const LevelResult<T>& out, int threads) {
  LevelForward<T> level(options, in, weights);
  const LevelOptions& o = options;
  const bool gated = o.signals != Signals::none;
#pragma omp parallel num_threads(team_size(options, threads))
  {
    level.run();
#pragma omp for schedule(static)
    for (int64_t b = 0; b < o.batch; ++b) {
      const T seg_share = gated ? level.gates[2 * b] : T(1), clf_share = gated ? level.gates[2 * b + 1] : T(1);
      for (int64_t i = b * o.channels; i < (b + 1) * o.channels; ++i)
        out.scale[i] = T(1) + seg_share * level.amplified[i];
      for (int64_t i = b * o.features; i < (b + 1) * o.features; ++i)
        out.clf[i] = in.clf[i] + clf_share * level.gained[i];
      if (!gated) continue;
      std::copy_n(&level.gates[2 * b], 2, out.gates + 2 * b);
      std::copy_n(&level.signals[b * level.signal_count()], level.signal_count(),
                  out.proxies + b * level.signal_count());
    }
  }
  if (!options.training) return;
  std::copy_n(level.batch_mean.data(), o.features, out.batch_mean);
  std::copy_n(level.batch_var.data(), o.features, out.batch_var);
}

}  // namespace BTINET_ISA
}  // namespace btinet
