// The rows of maps that the filters see at a time, and the filters. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kReach = 2;                // of the curvature filter
constexpr int64_t kWindow = 2 * kReach + 1;  // rows

// The last five rows of a map, with zeros on both sides. Rows are counted from -kWindow on.
template <class T>
class RowWindow {
 public:
  explicit RowWindow(int64_t width) : stride_(padded<T>(width) + 2 * kMargin), width_(width) {
    data_.fill(kWindow * stride_, T(0));
  }

  T* operator[](int64_t y) { return data_.data() + (y + kWindow) % kWindow * stride_ + kMargin; }
  const T* operator[](int64_t y) const { return data_.data() + (y + kWindow) % kWindow * stride_ + kMargin; }
  void clear(int64_t y) { std::fill_n((*this)[y], width_, T(0)); }

 private:
  static constexpr int64_t kMargin = Lanes<T>::count;
  static_assert(kMargin >= kReach);
  int64_t stride_, width_;
  Scratch<T> data_;
};

// What a filter at row y sees.
template <class T>
class Around {
 public:
  Around(const RowWindow<T>& window, int64_t y) {
    for (int64_t dy = -kReach; dy <= kReach; ++dy) row_[kReach + dy] = window[y + dy];
  }
  Vector<T> at(int64_t dy, int64_t x) const { return load(row_[kReach + dy] + x); }
  // The two neighbours at a distance of dx along the row, of the row below or above.
  Vector<T> sum(int64_t dy, int64_t x, int64_t dx) const { return at(dy, x - dx) + at(dy, x + dx); }
  Vector<T> difference(int64_t dy, int64_t x, int64_t dx) const { return at(dy, x + dx) - at(dy, x - dx); }

 private:
  const T* row_[kWindow];
};

// Exactly zero wherever the map is constant: what is added is what is subtracted, in the same order.
template <class T>
inline Vector<T> curvature(const Around<T>& map, int64_t x, const double (&weight)[3]) {
  const Vector<T> near = map.sum(0, x, 1) - (map.at(-1, x) + map.at(1, x));
  const Vector<T> far = map.sum(0, x, 2) - (map.at(-2, x) + map.at(2, x));
  const Vector<T> oblique = (map.sum(-1, x, 2) + map.sum(1, x, 2)) - (map.sum(-2, x, 1) + map.sum(2, x, 1));
  return T(weight[0]) * near + T(weight[1]) * far + T(weight[2]) * oblique;
}

template <class T>
inline Vector<T> sobel(const Around<T>& map, int64_t x) {
  return map.difference(-1, x, 1) + T(2) * map.difference(0, x, 1) + map.difference(1, x, 1);
}

template <class T, class S>
inline void read_row(const View<const S>& view, int64_t sample, int64_t y, T* out) {
  const S* from = view.data + sample * view.batch_stride + y * view.spatial_stride[1];
  const int64_t width = view.shape.size[2], step = view.spatial_stride[2];
  if (step == 1)
    for (int64_t x = 0; x < width; ++x) out[x] = T(from[x]);
  else
    for (int64_t x = 0; x < width; ++x) out[x] = T(from[x * step]);
}

template <class S>
inline void write_row(const Compute<S>* row, const View<S>& view, int64_t sample, int64_t y) {
  S* to = view.data + sample * view.batch_stride + y * view.spatial_stride[1];
  const int64_t width = view.shape.size[2], step = view.spatial_stride[2];
  if (step == 1)
    for (int64_t x = 0; x < width; ++x) to[x] = stored<S>(row[x]);
  else
    for (int64_t x = 0; x < width; ++x) to[x * step] = stored<S>(row[x]);
}

// The rows of logits and target, and what follows from them position by position.
template <class S>
class MaskWindow {
  using T = Compute<S>;

 public:
  MaskWindow(const View<const S>& logits, const Target<T>& target, const MaskFilter& filter)
      : logit(width_of(logits)),
        sigmoid(width_of(logits)),
        prediction(width_of(logits)),
        target(width_of(logits)),
        difference(width_of(logits)),
        logits_(logits),
        target_(target),
        hard_(filter.hard_boundary),
        least_(T(filter.floor)),
        most_(T(1 - filter.floor)) {}

  // Row y of a sample takes the place of row y - kWindow; outside of the image all is zero.
  void read(int64_t sample, int64_t y) {
    if (y < 0 || y >= logits_.shape.size[1]) {
      for (RowWindow<T>* map : {&prediction, &target, &difference}) map->clear(y);
      return;
    }
    read_row(logits_, sample, y, logit[y]);
    if (target_.bytes.data)
      read_row(target_.bytes, sample, y, target[y]);
    else
      read_row(target_.values, sample, y, target[y]);
    for_each_vector<T>(width_of(logits_), [&](int64_t x, auto part) {
      const Vector<T> s = btinet::BTINET_ISA::sigmoid<T>(load(logit[y] + x, part));
      const Vector<T> p = s < least_ ? broadcast(least_) : s > most_ ? broadcast(most_) : s;  // a NaN stays one
      const Vector<T> seen = !hard_ ? p : p > T(0.5) ? broadcast(T(1)) : Vector<T>{};
      store(sigmoid[y] + x, s, part);
      store(prediction[y] + x, p, part);
      store(difference[y] + x, load(target[y] + x, part) - seen, part);
    });
  }

  // The derivative of the prediction with respect to the logit: none where it is cut off, nor at either end, as torch
  // 2.15 has it.
  Vector<T> slope(Vector<T> s) const { return s > least_ ? (s < most_ ? s * (T(1) - s) : Vector<T>{}) : Vector<T>{}; }

  RowWindow<T> logit, sigmoid, prediction, target, difference;

 private:
  static int64_t width_of(const View<const S>& view) { return view.shape.size[2]; }

  const View<const S>& logits_;
  const Target<T>& target_;
  bool hard_;
  T least_, most_;
};

}  // namespace BTINET_ISA
}  // namespace btinet
