// One pass over logits and target each way, a few rows at a time. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kRowsTogether = 16;  // at least so many are worked off by a thread: their neighbours are read twice
constexpr int64_t kStretch = 1024;     // positions whose sums stay in vectors; beyond that they are added in double
// target p, (1 - target) p, target (1 - p), target, cross-entropy, |r|, s(target) and its square, s(p) and its square
constexpr int kMaskSums = 10;

// Ranges of rows of the images.
inline Partition rows_of(const Shape& shape) {
  return Partition({shape.batch, 1, {1, 1, shape.size[1]}}, kRowsTogether);
}

// log(1 + e) for 0 <= e <= 1: 2 artanh(e / (2 + e)), whose first terms have a relative error below 2e-8.
inline Vector<float> log_of_one_plus(Vector<float> e) {
  const Vector<float> ratio = e / (2.0f + e), square = ratio * ratio;
  Vector<float> sum = broadcast(1.0f / 13);
  for (const float factor : {1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f}) sum = sum * square + factor;
  return 2.0f * ratio * sum;
}

inline Vector<double> log_of_one_plus(Vector<double> e) {
  for (int64_t i = 0; i < Lanes<double>::count; ++i) e[i] = std::log1p(e[i]);
  return e;
}

// Binary cross-entropy of a logit. Where the target is 0 or 1 the first two terms cancel exactly on its side.
template <class T>
inline Vector<T> cross_entropy(Vector<T> logit, Vector<T> target) {
  const Vector<T> negative = logit < T(0) ? logit : Vector<T>{};
  return ((T(1) - target) * logit - negative) + log_of_one_plus(exponential(-absolute<T>(logit)));
}

// Adds row y, whose neighbours are in the window, to the sums.
template <class S>
void add_row(const MaskWindow<S>& window, int64_t y, int64_t width, const MaskFilter& filter, double* sums) {
  using T = Compute<S>;
  const Around<T> difference(window.difference, y), prediction(window.prediction, y), target(window.target, y);
  const T* logit = window.logit[y];
  for (int64_t begin = 0; begin < width; begin += kStretch) {
    Vector<T> sum[kMaskSums] = {};
    for_each_vector<T>(std::min(kStretch, width - begin), [&](int64_t i, auto part) {
      const int64_t x = begin + i;
      const Vector<T> p = prediction.at(0, x), t = target.at(0, x);
      const Vector<T> of_p = sobel(prediction, x), of_target = sobel(target, x);
      const Vector<T> entropy = filter.cross_entropy ? cross_entropy<T>(load(logit + x), t) : Vector<T>{};
      const Vector<T> r = curvature(difference, x, filter.curvature);
      const Vector<T> terms[kMaskSums] = {t * p,          (T(1) - t) * p, t * (T(1) - p),        t,    entropy,
                                          absolute<T>(r), of_target,      of_target * of_target, of_p, of_p * of_p};
      for (int k = 0; k < kMaskSums; ++k) sum[k] += filled<T>(terms[k], part, T(0));
    });
    for (int k = 0; k < kMaskSums; ++k) sums[k] += sum_of_lanes<T>(sum[k]);
  }
}

template <class S>
void mask_statistics(const View<const S>& logits, const Target<Compute<S>>& target, const MaskFilter& filter,
                     double* statistics, double* sobel_mean, int threads) {
  const int64_t width = logits.shape.size[2];
  const Partition partition = rows_of(logits.shape);
  std::vector<double> parts(partition.ranges() * kMaskSums);
#pragma omp parallel num_threads(threads)
  {
    MaskWindow<S> window(logits, target, filter);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < partition.ranges(); ++index) {
      const Range rows = partition.range(index);
      for (int64_t y = rows.begin - kReach; y < rows.begin + kReach; ++y) window.read(rows.sample, y);
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        window.read(rows.sample, y + kReach);
        add_row(window, y, width, filter, &parts[index * kMaskSums]);
      }
    }
  }
  const double positions = double(logits.shape.positions());
  for (int64_t b = 0; b < logits.shape.batch; ++b) {
    double sum[kMaskSums] = {};
    for (int64_t i = 0; i < partition.per_sample(); ++i)
      for (int k = 0; k < kMaskSums; ++k) sum[k] += parts[(b * partition.per_sample() + i) * kMaskSums + k];
    double* of_image = statistics + b * kMaskStatistics;
    std::copy_n(sum, 3, of_image);
    for (int k = 3; k < 6; ++k) of_image[k] = sum[k] / positions;
    const auto variance = [&](double total, double squares) {
      const double mean = total / positions;
      return squares / positions - mean * mean;
    };
    of_image[6] = variance(sum[6], sum[7]);
    of_image[7] = variance(sum[8], sum[9]);
    sobel_mean[b] = sum[8] / positions;
  }
}

// What the statistics' gradient means for the positions of one image.
template <class T>
struct PositionGradient {
  T prediction, overlap, response, entropy;  // of p, of target p, of |r|, of the cross-entropy
  T sobel, sobel_mean;                       // of s(p), per deviation from its mean

  PositionGradient(const double* d, double mean, double positions)
      : prediction(T(d[1])),
        overlap(T(d[0] - d[1] - d[2])),
        response(T(d[5] / positions)),
        entropy(T(d[4] / positions)),
        sobel(T(2 * d[7] / positions)),
        sobel_mean(T(mean)) {}
};

// Gradients of the filters' responses at row y, whose neighbours are in the window.
template <class S, class T>
void response_gradient(const MaskWindow<S>& window, int64_t y, int64_t width, const MaskFilter& filter,
                       const PositionGradient<T>& d, RowWindow<T>& d_response, RowWindow<T>& d_sobel) {
  const Around<T> difference(window.difference, y), prediction(window.prediction, y);
  for_each_vector<T>(width, [&](int64_t x, auto part) {
    store(d_sobel[y] + x, d.sobel * (sobel(prediction, x) - d.sobel_mean), part);
    if (filter.hard_boundary) return;  // whose prediction is constant wherever it has a derivative
    const Vector<T> r = curvature(difference, x, filter.curvature);
    store(d_response[y] + x, with_sign_of<T>(broadcast(-d.response), r), part);
  });
}

// The gradient of row y of the logits. The curvature filter is its own transpose, the Sobel filter its negative one.
template <class S, class T>
void logit_gradient(const MaskWindow<S>& window, int64_t y, int64_t width, const MaskFilter& filter,
                    const PositionGradient<T>& d, const RowWindow<T>& d_response, const RowWindow<T>& d_sobel, T* out) {
  const Around<T> responses(d_response, y), sobels(d_sobel, y);
  const T *sigmoid = window.sigmoid[y], *target = window.target[y];
  for_each_vector<T>(width, [&](int64_t x, auto part) {
    const Vector<T> s = load(sigmoid + x), t = load(target + x);
    const Vector<T> d_prediction =
        d.prediction + d.overlap * t + curvature(responses, x, filter.curvature) - sobel(sobels, x);
    store(out + x, d_prediction * window.slope(s) + d.entropy * (s - t), part);
  });
}

template <class S>
void mask_statistics_backward(const double* d_statistics, const View<const S>& logits, const Target<Compute<S>>& target,
                              const MaskFilter& filter, const double* sobel_mean, const View<S>& d_logits,
                              int threads) {
  using T = Compute<S>;
  const int64_t height = logits.shape.size[1], width = logits.shape.size[2];
  const Partition partition = rows_of(logits.shape);
#pragma omp parallel num_threads(threads)
  {
    MaskWindow<S> window(logits, target, filter);
    RowWindow<T> d_response(width), d_sobel(width);
    Scratch<T> gradient(width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < partition.ranges(); ++index) {
      const Range rows = partition.range(index);
      const PositionGradient<T> d(d_statistics + rows.sample * kMaskStatistics, sobel_mean[rows.sample],
                                  double(logits.shape.positions()));
      for (int64_t y = rows.begin - 2 * kReach; y < rows.end + 2 * kReach; ++y) {
        window.read(rows.sample, y);
        const int64_t filtered = y - kReach, done = filtered - kReach;
        if (filtered < rows.begin - kReach) continue;
        if (filtered >= 0 && filtered < height) {
          response_gradient(window, filtered, width, filter, d, d_response, d_sobel);
        } else {
          d_response.clear(filtered);
          d_sobel.clear(filtered);
        }
        if (done < rows.begin) continue;
        logit_gradient(window, done, width, filter, d, d_response, d_sobel, gradient.data());
        write_row(gradient.data(), d_logits, rows.sample, done);
      }
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
