// Images of one vector of channels for depthwise convolutions: which taps meet where, rows with zeros around them, and
// the taps of a few channels side by side. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

inline int64_t floor_of(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int64_t ceil_of(int64_t a, int64_t b) { return -floor_of(-a, b); }

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
  return {in.size[i + 1],      out.size[i + 1],      geometry.kernel[i],
          geometry.stride[i], geometry.padding[i], geometry.dilation[i]};
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
    begin_ = begin;
    const int64_t columns = std::min(kLanes, view_.shape.channels - c);
    if (pitch_ == width_) {
      load_tile(view_, offsets_, Range{sample, begin * width_, end * width_}, c, columns, values_.data(), kLanes);
      return;
    }
    for (int64_t y = begin; y < end; ++y)
      load_tile(view_, offsets_, Range{sample, y * width_, (y + 1) * width_}, c, columns, at(y, 0), kLanes);
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

// Where the taps that meet at a run of positions read first, and which they are.
template <class T>
struct MeetingTaps {
  std::vector<const T*> from;
  std::vector<int64_t> tap;

  void clear() {
    from.clear();
    tap.clear();
  }
  void add(const T* first, int64_t which) {
    from.push_back(first);
    tap.push_back(which);
  }
};

// The batch in bands of rows, and the bands in groups whose sums are kept apart; and the channels in blocks.
struct RowBands {
  int64_t rows, of_image, count, groups, blocks;
  static constexpr int64_t kBlock = 128;  // channels

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
  static constexpr int64_t kBytes = 192 << 10;  // of an outer cache
  static constexpr int64_t kFewestRows = 4;
  static constexpr int64_t kFewestGroups = 8, kMostGroups = 32;
  static constexpr int64_t kSumBytes = 4 << 20;
};

}  // namespace BTINET_ISA
}  // namespace btinet
