// Images of one vector of channels for depthwise convolutions: which taps meet where, rows with zeros around them, and
// the taps of a few channels side by side. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

inline int64_t floor_of(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}
inline int64_t ceil_of(int64_t a, int64_t b) {
  return -floor_of(-a, b);
}

// One axis of a convolution: result n reads the input at n stride + tap dilation - padding.
struct Axis {
  int64_t inputs, outputs, kernel, stride, padding, dilation;

  // Zeros that the taps read before and after the inputs.
  int64_t before_inputs() const { return padding; }
  int64_t after_inputs() const {
    return std::max<int64_t>(0, (outputs - 1) * stride + (kernel - 1) * dilation - padding - (inputs - 1));
  }
  // The first result that reads input n or a later one, the last that reads it or an earlier one; some may not exist.
  int64_t first_output(int64_t n) const { return ceil_of(n + padding - (kernel - 1) * dilation, stride); }
  int64_t last_output(int64_t n) const { return floor_of(n + padding, stride); }
  // Zeros that the gradient's taps read before and after the results.
  int64_t before_outputs() const { return std::max<int64_t>(0, -first_output(0)); }
  int64_t after_outputs() const { return std::max<int64_t>(0, last_output(inputs - 1) - (outputs - 1)); }
  // Whether input n goes into some result through this tap, existing or not, and into which.
  bool meets(int64_t n, int64_t tap) const { return (n + padding - tap * dilation) % stride == 0; }
  int64_t output(int64_t n, int64_t tap) const { return floor_of(n + padding - tap * dilation, stride); }
  int64_t input(int64_t n, int64_t tap) const { return n * stride + tap * dilation - padding; }
};

inline Axis axis_of(const Geometry& geometry, const Shape& in, const Shape& out, int i) {
  return {in.size[i + 1],     out.size[i + 1],     geometry.kernel[i],
          geometry.stride[i], geometry.padding[i], geometry.dilation[i]};
}

// Brings the channels [first, last) of the rows [begin, end) near, in the order in which they lie: taken a vector of
// channels at a time, they lie too far apart to be foreseen. Loads, because prefetches of so many lines are given up.
template <class S>
inline void touch_rows(const View<const S>& view, const Offsets& offsets, int64_t sample, int64_t first, int64_t last,
                       int64_t begin, int64_t end) {
  constexpr int64_t line = 64 / sizeof(S);
  if (view.channel_stride != 1) return;
  const S* from = view.data + sample * view.batch_stride;
  for (int64_t n = begin * view.shape.size[2]; n < end * view.shape.size[2]; ++n)
    for (int64_t c = first; c < last; c += line)
      static_cast<void>(*reinterpret_cast<const volatile char*>(from + offsets[n] + c));
}

// Some rows of an image and one vector of channels, with zeros before and after each row.
template <class S>
class ImageBand {
 public:
  using T = Compute<S>;
  static constexpr int64_t kLanes = Lanes<T>::count;

  ImageBand(const View<const S>& view, int64_t before, int64_t after, int64_t most_rows)
      : view_(view), offsets_(view), width_(view.shape.size[2]), before_(before), pitch_(before + width_ + after) {
    values_.fill(most_rows * pitch_ * kLanes, T(0));
  }

  // Reads the rows [begin, end).
  void read(int64_t sample, int64_t c, int64_t begin, int64_t end) {
    set_begin(begin);
    const int64_t columns = std::min(kLanes, view_.shape.channels - c);
    const bool rows = view_.channel_stride == 1 && offsets_.even() && columns == kLanes;
    const S* first = view_.data + sample * view_.batch_stride + c;
    for (int64_t y = begin; y < end; ++y)
      if (rows)
        for (int64_t n = y * width_; n < (y + 1) * width_; ++n)
          store(at(y, n - y * width_), load(first + n * offsets_.step()));
      else
        load_tile(view_, offsets_, Range{sample, y * width_, (y + 1) * width_}, c, columns, at(y, 0), kLanes);
  }
  // Where rows from `begin` on lie, before they are read.
  void set_begin(int64_t begin) { begin_ = begin; }
  void touch(int64_t sample, int64_t first, int64_t last, int64_t begin, int64_t end) const {
    touch_rows(view_, offsets_, sample, first, last, begin, end);
  }
  T* at(int64_t y, int64_t x) { return values_.data() + ((y - begin_) * pitch_ + before_ + x) * kLanes; }

 private:
  const View<const S>& view_;
  Offsets offsets_;
  int64_t width_, before_, pitch_, begin_ = 0;
  Scratch<T> values_;
};

// The taps of all channels in vectors of channels: [vector][tap][lane].
template <class T>
class TapVectors {
 public:
  TapVectors(const T* taps, int64_t channels, int64_t count) : count_(count) {
    constexpr int64_t lanes = Lanes<T>::count;
    values_.resize(padded<T>(channels) * count);
    for (int64_t c = 0; c < channels; c += lanes)
      transpose(taps + c * count, count, std::min(lanes, channels - c), count, values_.data() + c * count, lanes);
  }
  // Of the vector of channels at c.
  const T* at(int64_t c) const { return values_.data() + c * count_; }

 private:
  int64_t count_;
  Scratch<T> values_;
};

// For each run of positions of a band, the taps that meet there: where they read first, and which they are.
template <class T>
class MeetingTaps {
 public:
  void clear() {
    from_.clear();
    tap_.clear();
    ends_.assign(1, 0);
  }
  void add(const T* first, int64_t which) {
    from_.push_back(first);
    tap_.push_back(which);
  }
  void end_run() { ends_.push_back(tap_.size()); }

  int64_t count(int64_t run) const { return ends_[run + 1] - ends_[run]; }
  const T* const* from(int64_t run) const { return from_.data() + ends_[run]; }
  const int64_t* tap(int64_t run) const { return tap_.data() + ends_[run]; }

 private:
  std::vector<const T*> from_;
  std::vector<int64_t> tap_, ends_;
};

// The batch in bands of rows, and the bands in groups whose sums are kept apart; and the channels in blocks.
struct RowBands {
  int64_t rows, of_image, count, groups, blocks;
  static constexpr int64_t kBlock = 64;  // channels

  // `bytes_of_row`: what a band holds of each row; `bytes_of_sums`: what a group keeps.
  RowBands(int64_t batch, int64_t channels, int64_t all_rows, int64_t bytes_of_row, int64_t bytes_of_sums) {
    rows = std::min(all_rows, std::max(kFewestRows, kBytes / bytes_of_row));
    of_image = (all_rows + rows - 1) / rows;
    rows = (all_rows + of_image - 1) / of_image;
    count = batch * of_image;
    groups = std::min(count, std::max(kFewestGroups, std::min(kMostGroups, kSumBytes / bytes_of_sums)));
    blocks = (channels + kBlock - 1) / kBlock;
  }

  // Calls task(group, first channel, channels' end) in a team of threads, which share the work.
  template <class F>
  void for_each_task(int64_t channels, const F& task) const {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < groups * blocks; ++i) {
      const int64_t first = i % blocks * kBlock;
      task(i / blocks, first, std::min(first + kBlock, channels));
    }
  }
  // Calls band(sample, first row, rows' end, whether it is the group's first).
  template <class F>
  void for_each_band(int64_t group, int64_t all_rows, const F& band) const {
    const int64_t first = group * count / groups, last = (group + 1) * count / groups;
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % of_image * rows;
      band(i / of_image, begin, std::min(begin + rows, all_rows), i == first);
    }
  }

 private:
  static constexpr int64_t kBytes = 128 << 10;  // of an outer cache
  static constexpr int64_t kFewestRows = 4;
  static constexpr int64_t kFewestGroups = 8, kMostGroups = 32;
  static constexpr int64_t kSumBytes = 4 << 20;
};

}  // namespace BTINET_ISA
}  // namespace btinet
