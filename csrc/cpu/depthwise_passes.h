// Depthwise convolution forward and backward, a vector of channels at a time in a band of rows. The gradients of x and
// of the taps share one read of x and of the result's gradient. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int kTapsAtOnce = BTINET_VECTOR_BYTES == 64 ? 9 : 5;  // what they hold stays in registers

// A run of positions in whole vectors.
template <class T>
struct VectorRun {
  T* data;
  int64_t step, count;
};

// out (+)= sum over the taps k[n] * from[n].
template <class T, int N, bool kAdd>
inline void convolve_run(const T* const* from, const int64_t* tap, const T* taps, int64_t step, Vector<T> start,
                         const VectorRun<T>& out) {
  constexpr int64_t lanes = Lanes<T>::count;
  Vector<T> k[N];
  const T* at[N];
  for (int n = 0; n < N; ++n) {
    k[n] = load(taps + tap[n] * lanes);
    at[n] = from[n];
  }
  for (int64_t i = 0; i < out.count; ++i) {
    Vector<T> sum = kAdd ? load(out.data + i * out.step) : start;
    for (int n = 0; n < N; ++n) sum += k[n] * load(at[n] + i * step);
    store(out.data + i * out.step, sum);
  }
}

// d_x (+)= sum over the taps k[n] * from[n], and sums[n] += sum over the run of x * from[n]; `from` holds the gradient
// of the result, whose positions lie side by side.
template <class T, int N, bool kAdd>
inline void gradient_run(const T* const* from, const int64_t* tap, const T* taps, T* sums, const Tile<T>& x,
                         const VectorRun<T>& d_x) {
  constexpr int64_t lanes = Lanes<T>::count;
  Vector<T> k[N], sum_of_tap[N] = {};
  const T* at[N];
  for (int n = 0; n < N; ++n) {
    k[n] = load(taps + tap[n] * lanes);
    at[n] = from[n];
  }
  for (int64_t i = 0; i < d_x.count; ++i) {
    const Vector<T> value = load(x.data + i * x.stride);
    Vector<T> sum = kAdd ? load(d_x.data + i * d_x.step) : Vector<T>{};
    for (int n = 0; n < N; ++n) {
      const Vector<T> upstream = load(at[n] + i * lanes);
      sum += k[n] * upstream;
      sum_of_tap[n] += value * upstream;
    }
    store(d_x.data + i * d_x.step, sum);
  }
  for (int n = 0; n < N; ++n) {
    T* to = sums + tap[n] * lanes;
    store(to, load(to) + sum_of_tap[n]);
  }
}

// Where a band of the result goes: in place where vectors of channels lie in memory as they are, else into scratch.
template <class S>
class BandWriter {
 public:
  using T = Compute<S>;
  static constexpr int64_t kLanes = Lanes<T>::count;

  BandWriter(const View<S>& view, int64_t most_rows) : view_(view), offsets_(view) {
    scratch_.resize(most_rows * view.shape.size[2] * kLanes);
  }

  // The first position of the rows [begin, end), and how far apart they lie.
  VectorRun<T> begin(int64_t sample, int64_t c, int64_t begin, int64_t end) {
    const int64_t width = view_.shape.size[2];
    range_ = {sample, begin * width, end * width};
    first_ = c;
    columns_ = std::min(kLanes, view_.shape.channels - c);
    in_place_ = std::is_same_v<S, T> && columns_ == kLanes && view_.channel_stride == 1 && offsets_.even();
    if constexpr (std::is_same_v<S, T>)
      if (in_place_) return {view_.data + sample * view_.batch_stride + offsets_[range_.begin] + c, offsets_.step(), 0};
    return {scratch_.data(), kLanes, 0};
  }
  void end() {
    if (!in_place_) store_tile(view_, offsets_, range_, first_, columns_, scratch_.data(), kLanes);
  }

 private:
  const View<S>& view_;
  Offsets offsets_;
  Scratch<T> scratch_;
  Range range_{};
  int64_t first_ = 0, columns_ = 0;
  bool in_place_ = false;
};

// Calls some(first tap, number of taps as a constant, whether it adds as a constant) until no tap is left.
template <int N = kTapsAtOnce, class F>
inline void for_taps(int64_t first, int64_t count, const F& some) {
  if constexpr (N > 0) {
    for (; count - first >= N; first += N) {
      if (first == 0)
        some(first, std::integral_constant<int, N>{}, std::false_type{});
      else
        some(first, std::integral_constant<int, N>{}, std::true_type{});
    }
    for_taps<N - 1>(first, count, some);
  }
}

template <class S>
void depthwise(const View<const S>& x, const Geometry& geometry, const Compute<S>* taps, const Compute<S>* bias,
               const View<S>& out, int threads) {
  using T = Compute<S>;
  constexpr int64_t lanes = Lanes<T>::count;
  const Axis down = axis_of(geometry, x.shape, out.shape, 0), across = axis_of(geometry, x.shape, out.shape, 1);
  const int64_t channels = x.shape.channels, before = across.before_inputs(), after = across.after_inputs();
  const int64_t reach = (down.kernel - 1) * down.dilation;
  const RowBands bands(x.shape.batch, channels, down.outputs,
                       int64_t(sizeof(T)) * lanes * (down.stride * (before + across.inputs + after) + across.outputs),
                       1);
  const TapVectors<T> table(taps, channels, down.kernel * across.kernel);

#pragma omp parallel num_threads(threads)
  {
    const int64_t most_rows = std::min(down.inputs, (bands.rows - 1) * down.stride + reach + 1);
    ImageBand<S> source(x, before, after, most_rows);
    BandWriter<S> result(out, bands.rows);
    MeetingTaps<T> meeting;
    const auto list_taps = [&](int64_t begin, int64_t end, int64_t top) {
      meeting.clear();
      source.set_begin(top);
      for (int64_t y = begin; y < end; ++y) {
        for (int64_t ky = 0; ky < down.kernel; ++ky) {
          const int64_t from = down.input(y, ky);
          for (int64_t kx = 0; kx < across.kernel && from >= 0 && from < down.inputs; ++kx)
            meeting.add(source.at(from, kx * across.dilation - before), ky * across.kernel + kx);
        }
        meeting.end_run();
      }
    };
    const auto convolve_row = [&](int64_t row, const T* of_channels, Vector<T> start, VectorRun<T> run) {
      run.data += row * across.outputs * run.step;
      run.count = across.outputs;
      if (meeting.count(row) == 0)
        for (int64_t i = 0; i < run.count; ++i) store(run.data + i * run.step, start);
      for_taps(0, meeting.count(row), [&](int64_t tap, auto number, auto add) {
        convolve_run<T, decltype(number)::value, decltype(add)::value>(meeting.from(row) + tap, meeting.tap(row) + tap,
                                                                       of_channels, across.stride * lanes, start, run);
      });
    };
    bands.for_each_task(channels, [&](int64_t group, int64_t first, int64_t last) {
      bands.for_each_band(group, down.outputs, [&](int64_t sample, int64_t begin, int64_t end, bool) {
        const int64_t top = std::max<int64_t>(0, down.input(begin, 0));
        const int64_t bottom = std::min(down.inputs, down.input(end - 1, down.kernel - 1) + 1);
        list_taps(begin, end, top);
        source.touch(sample, first, last, top, bottom);
        for (int64_t c = first; c < last; c += lanes) {
          if (top < bottom) source.read(sample, c, top, bottom);
          const Vector<T> start = bias ? load(bias + c, Part{std::min(lanes, channels - c)}) : Vector<T>{};
          const VectorRun<T> to = result.begin(sample, c, begin, end);
          for (int64_t row = 0; row < end - begin; ++row) convolve_row(row, table.at(c), start, to);
          result.end();
        }
      });
    });
  }
}

template <class S>
void depthwise_backward(const View<const S>& x, const View<const S>& grad, const Geometry& geometry,
                        const Compute<S>* taps, const View<S>& out, Compute<S>* d_taps, int threads) {
  using T = Compute<S>;
  constexpr int64_t lanes = Lanes<T>::count;
  const Axis down = axis_of(geometry, x.shape, grad.shape, 0), across = axis_of(geometry, x.shape, grad.shape, 1);
  const int64_t channels = x.shape.channels, count = down.kernel * across.kernel, width = across.inputs;
  const int64_t before = across.before_outputs(), after = across.after_outputs();
  const int64_t of_group = padded<T>(channels) * count;
  const RowBands bands(x.shape.batch, channels, down.inputs,
                       int64_t(sizeof(T)) * lanes * (2 * width + (before + across.outputs + after) / down.stride),
                       of_group * sizeof(double));
  const TapVectors<T> table(taps, channels, count);
  const Offsets x_at(x);
  Scratch<double> sums(bands.groups * of_group);  // [group][vector of channels][tap][lane]

#pragma omp parallel num_threads(threads)
  {
    const int64_t most_rows = std::min(down.outputs, down.last_output(bands.rows - 1) - down.first_output(0) + 2);
    ImageBand<S> upstream(grad, before, after, most_rows);
    BandWriter<S> result(out, bands.rows);
    Scratch<T> copy(bands.rows * width * lanes), band_sums;
    MeetingTaps<T> meeting;
    // Inputs `stride` apart meet the same taps: a row has as many runs.
    const int64_t phases = std::min(across.stride, width);
    const auto list_taps = [&](int64_t begin, int64_t end, int64_t top) {
      meeting.clear();
      upstream.set_begin(top);
      for (int64_t y = begin; y < end; ++y)
        for (int64_t phase = 0; phase < phases; ++phase) {
          for (int64_t ky = 0; ky < down.kernel; ++ky) {
            const int64_t from = down.output(y, ky);
            if (!down.meets(y, ky) || from < 0 || from >= down.outputs) continue;
            for (int64_t kx = 0; kx < across.kernel; ++kx)
              if (across.meets(phase, kx))
                meeting.add(upstream.at(from, across.output(phase, kx)), ky * across.kernel + kx);
          }
          meeting.end_run();
        }
    };
    const auto run_backward = [&](int64_t row, int64_t phase, const T* of_channels, Tile<T> values, VectorRun<T> run) {
      const int64_t index = row * phases + phase, first = row * width + phase;
      values = {values.data + first * values.stride, across.stride * values.stride};
      run = {run.data + first * run.step, across.stride * run.step, ceil_of(width - phase, across.stride)};
      if (meeting.count(index) == 0)
        for (int64_t i = 0; i < run.count; ++i) store(run.data + i * run.step, Vector<T>{});
      for_taps(0, meeting.count(index), [&](int64_t tap, auto number, auto add) {
        gradient_run<T, decltype(number)::value, decltype(add)::value>(
            meeting.from(index) + tap, meeting.tap(index) + tap, of_channels, band_sums.data(), values, run);
      });
    };
    bands.for_each_task(channels, [&](int64_t group, int64_t first, int64_t last) {
      bands.for_each_band(group, down.inputs, [&](int64_t sample, int64_t begin, int64_t end, bool first_of_group) {
        const int64_t top = std::max<int64_t>(0, down.first_output(begin));
        const int64_t bottom = std::min(down.outputs, down.last_output(end - 1) + 1);
        list_taps(begin, end, top);
        upstream.touch(sample, first, last, top, bottom);
        touch_rows(x, x_at, sample, first, last, begin, end);
        for (int64_t c = first; c < last; c += lanes) {
          const int64_t columns = std::min(lanes, channels - c);
          if (top < bottom) upstream.read(sample, c, top, bottom);
          const Tile<T> values =
              read_tile(x, x_at, Range{sample, begin * width, end * width}, c, columns, copy.data(), lanes);
          const VectorRun<T> to = result.begin(sample, c, begin, end);
          band_sums.fill(count * lanes, T(0));
          for (int64_t row = 0; row < end - begin; ++row)
            for (int64_t phase = 0; phase < phases; ++phase) run_backward(row, phase, table.at(c), values, to);
          result.end();
          double* total = sums.data() + group * of_group + c * count;
          if (first_of_group) std::fill(total, total + count * lanes, 0.0);
          for (int64_t t = 0; t < count; ++t) add_lanes<T>(load(&band_sums[t * lanes]), total + t * lanes, lanes);
        }
      });
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < count; ++t) {
        double sum = 0;
        for (int64_t group = 0; group < bands.groups; ++group)
          sum += sums[group * of_group + (c / lanes * count + t) * lanes + c % lanes];
        d_taps[c * count + t] = T(sum);
      }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
