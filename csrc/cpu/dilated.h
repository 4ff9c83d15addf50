// Depthwise convolutions of three taps along each axis, dilated and padded with zeros, of several scales, and their
// gradients. Channels lie side by side. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Positions in rows of channels, from position `first` of a sample on.
template <class T>
struct PositionRows {
  const T* data;
  int64_t step;
  int64_t first;

  const T* at(int64_t position) const { return data + (position - first) * step; }
};

// Rows of an image: runs of positions along the last axis.
class ImageRows {
 public:
  ImageRows(const Shape& shape, int axes)
      : depth_(shape.size[0]), height_(shape.size[1]), width_(shape.size[2]), axes_(axes) {}

  int64_t width() const { return width_; }
  int64_t count() const { return depth_ * height_; }
  // Rows of taps of one scale; each has three.
  int taps() const { return axes_ == 1 ? 1 : axes_ == 2 ? 3 : 9; }
  // The image row that lies under tap row r, `direction` times the dilation away from `row`; -1 outside the image.
  int64_t neighbour(int64_t row, int r, int64_t distance) const {
    if (axes_ == 1) return row;
    const int64_t y = row % height_ + (r % 3 - 1) * distance,
                  z = row / height_ + (axes_ == 3 ? r / 3 - 1 : 0) * distance;
    return y < 0 || y >= height_ || z < 0 || z >= depth_ ? -1 : z * height_ + y;
  }
  // The rows [first, last) that taps of [begin, end) reach that lie `distance` apart.
  std::pair<int64_t, int64_t> reached(int64_t begin, int64_t end, int64_t distance) const {
    const int64_t reach = distance * (axes_ == 3 ? height_ + 1 : axes_ == 2 ? 1 : 0);
    return {std::max<int64_t>(0, begin - reach), std::min(count(), end + reach)};
  }

 private:
  int64_t depth_, height_, width_;
  int axes_;
};

// The taps of all scales by channel, in whole vectors.
template <class T>
class TapTable {
 public:
  TapTable(const ScaleWeights<T>& weights, int64_t channels, int rows)
      : weights_(weights), channels_(channels), stride_(padded<T>(channels)), taps_(3 * rows) {
    values_.fill(weights.scales * taps_ * stride_, T(0));
  }

  // Multiplied by the sample's shares.
  void set_sample(int64_t sample) {
    for (int i = 0; i < weights_.scales; ++i) {
      const T share = weights_.share ? weights_.share[sample * weights_.scales + i] : T(1);
      for (int64_t c = 0; c < channels_; ++c)
        for (int t = 0; t < taps_; ++t)
          values_[(i * taps_ + t) * stride_ + c] = weights_.taps[i][c * taps_ + t] * share;
    }
  }
  // Tap t of all channels; taps lie `stride` apart.
  const T* tap(int scale, int t) const { return &values_[(scale * taps_ + t) * stride_]; }
  int64_t stride() const { return stride_; }

 private:
  const ScaleWeights<T>& weights_;
  int64_t channels_, stride_;
  int taps_;
  Scratch<T> values_;
};

constexpr int kRowsAtOnce = 3;  // of taps: their nine coefficients stay in registers

// Rows of taps that lie within the image, with their coefficients.
template <class T, int N>
struct TapRows {
  const T* row[N];  // the image row, at its first position
  Vector<T> k[N][3];
};

// Calls at(x, std::true_type) where all taps lie within the row, and at(x, std::false_type) at its ends.
template <class F>
inline void for_each_column(int64_t begin, int64_t end, int64_t width, int64_t dilation, const F& at) {
  int64_t x = begin;
  for (; x < std::min(dilation, end); ++x) at(x, std::false_type{});
  for (; x < std::min(width - dilation, end); ++x) at(x, std::true_type{});
  for (; x < end; ++x) at(x, std::false_type{});
}

// The transposed convolution and the taps' gradient share their reads of v, the gradient of the convolution's result:
// out[x] (+)= sum over taps k[n][t] * v[n][x - (t - 1) dilation], and sums[n][t] += value[x] * v[n][...].
template <bool kAdd, class T, int N>
inline void gradient_row(const TapRows<T, N>& taps, int64_t dilation, int64_t width, const T* value, int64_t step,
                         T* out, Vector<T> (&sums)[N][3]) {
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t reach = dilation * lanes;
  for_each_column(0, width, width, dilation, [&](int64_t x, auto whole) {
    T* to = out + x * lanes;
    Vector<T> sum = kAdd ? load(to) : Vector<T>{};
    const Vector<T> factor = load(value + x * step);
    for (int n = 0; n < N; ++n) {
      const T* here = taps.row[n] + x * lanes;
      const auto tap = [&](int t, const T* from) {
        const Vector<T> v = load(from);
        sum += taps.k[n][t] * v;
        sums[n][t] += factor * v;
      };
      if (whole || x + dilation < width) tap(0, here + reach);
      tap(1, here);
      if (whole || x >= dilation) tap(2, here - reach);
    }
    store(to, sum);
  });
}

// Calls rows(TapRows<T, N>, indices of the tap rows, whether they are the first) for the rows of taps of one scale that
// lie within the image, a few at a time. `row_of(r)` says where the image row under tap row r lies, null outside.
template <class T, class RowOf, class F>
inline void for_each_tap_rows(const TapTable<T>& table, int rows_of_taps, int scale, int64_t c, const RowOf& row_of,
                              const F& rows) {
  int inside[9], count = 0;
  const T* row[9];
  for (int r = 0; r < rows_of_taps; ++r)
    if (const T* at = row_of(r)) {
      inside[count] = r;
      row[count++] = at;
    }
  const auto some = [&](int from, auto number) {
    constexpr int N = decltype(number)::value;
    TapRows<T, N> taps;
    for (int n = 0; n < N; ++n) {
      taps.row[n] = row[from + n];
      for (int t = 0; t < 3; ++t) taps.k[n][t] = load(table.tap(scale, 3 * inside[from + n] + t) + c);
    }
    if (from == 0)
      rows(taps, inside, std::false_type{});
    else
      rows(taps, inside + from, std::true_type{});
  };
  int from = 0;
  for (; from + kRowsAtOnce <= count; from += kRowsAtOnce) some(from, std::integral_constant<int, kRowsAtOnce>{});
  if (count - from == 2) some(from, std::integral_constant<int, 2>{});
  if (count - from == 1) some(from, std::integral_constant<int, 1>{});
}

constexpr int kAtOnce = 4;     // positions whose sums stay in registers
constexpr int64_t kAhead = 8;  // positions, in which memory answers

// Calls at(x, how many, std::true_type) for positions all of whose taps lie within the row, and one by one at its ends,
// with std::false_type.
template <class F>
inline void for_each_block(int64_t begin, int64_t end, int64_t width, int64_t dilation, const F& at) {
  using one = std::integral_constant<int, 1>;
  const int64_t whole = std::min(width - dilation, end);
  int64_t x = begin;
  for (; x < std::min(dilation, end); ++x) at(x, one{}, std::false_type{});
  for (; x + kAtOnce <= whole; x += kAtOnce) at(x, std::integral_constant<int, kAtOnce>{}, std::true_type{});
  for (; x < whole; ++x) at(x, one{}, std::true_type{});
  for (; x < end; ++x) at(x, one{}, std::false_type{});
}

// The convolutions of the positions [begin, end) of a sample, of all scales, each with whole vectors of channels.
// `out(scale, c)` is where the vector of channels c of the first position goes, rounded if it is of another type;
// positions lie out_step apart.
template <class T, class Out>
void convolve(const PositionRows<T>& x, const ImageRows& rows, const ScaleWeights<T>& weights, const TapTable<T>& table,
              int64_t channels, int64_t begin, int64_t end, const Out& out, int64_t out_step) {
  constexpr int64_t lanes = Lanes<T>::count;
  // What a store of a vector may alias is read anew after it, so the inner loop reads copies.
  const int64_t width = rows.width(), step = x.step, tap_step = table.stride();
  for (int64_t n = begin; n < end;) {
    const int64_t row = n / width, first = n - row * width, last = std::min(width, first + end - n);
    for (int i = 0; i < weights.scales; ++i) {
      const int64_t dilation = weights.dilations[i], reach = dilation * step;
      const T *under[9], *taps[9];  // of the rows of taps that lie within the image
      int count = 0;
      for (int r = 0; r < rows.taps(); ++r) {
        const int64_t other = rows.neighbour(row, r, dilation);
        if (other < 0) continue;
        under[count] = x.at(other * width);
        taps[count++] = table.tap(i, 3 * r);
      }
      const bool fetches = i + 1 == weights.scales;
      for_each_block(first, last, width, dilation, [&, count](int64_t at, auto number, auto whole) {
        constexpr int P = decltype(number)::value;
        const bool left = whole || at >= dilation, right = whole || at + dilation < width;
        const int64_t from = at * step, to = (n - begin + at - first) * out_step;
        for (int64_t c = 0; c < channels; c += lanes) {
          Vector<T> sums[P] = {};
          for (int r = 0; r < count; ++r) {
            const T *here = under[r] + from + c, *k = taps[r] + c;
            const auto add = [&](const T* there, Vector<T> factor) {
              for (int p = 0; p < P; ++p) sums[p] += factor * load(there + p * step);
            };
            if (left) add(here - reach, load(k));
            add(here, load(k + tap_step));
            if (right) add(here + reach, load(k + 2 * tap_step));
          }
          if (fetches)
            for (int p = 0; p < P; ++p) __builtin_prefetch(under[count - 1] + from + reach + (kAhead + p) * step + c);
          auto* target = out(i, c) + to;
          for (int p = 0; p < P; ++p) store(target + p * out_step, sums[p]);
        }
      });
    }
    n += last - first;
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
