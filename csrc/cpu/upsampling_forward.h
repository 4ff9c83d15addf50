// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// One product for each parity of the output, its taps stacked along the inner dimension: no flop more than the nine
// taps need and 4 O results a position, where one product with all 9 O columns would write and add 9 O. Its left
// operand, four neighbours of each position, costs 4 C copies against 18 C O flops.
constexpr int kNeighbours = 4;
constexpr int64_t kNeighbour[kNeighbours][2] = {{0, -1}, {0, 0}, {-1, 0}, {-1, -1}};  // (y, x) in the order they lie in

// The neighbours [first, first + count) and the tap that each is multiplied with.
struct Parity {
  int64_t y, x;
  int first, count;
  int tap[kNeighbours];
};
constexpr Parity kParities[4] = {
    {0, 0, 0, 4, {2, 0, 6, 8}}, {0, 1, 1, 2, {1, 7}}, {1, 0, 0, 2, {5, 3}}, {1, 1, 1, 1, {4}}};

template <class S>
class UpsampleForward {
  using T = Compute<S>;

 public:
  UpsampleForward(const View<const S>& x, const UpsamplingWeight<const T>& weight, const T* bias, const View<S>& out)
      : weight_(weight),
        out_(out),
        shape_(x.shape),
        x_(x),
        out_offsets_(out),
        streaming_(outgrows_caches(out)),
        channels_(x.shape.channels),
        outputs_(out.shape.channels),
        left_stride_(spread_stride<T>(kNeighbours * channels_)),
        out_stride_(padded<T>(outputs_)),
        tiles_(0, shape_.batch * shape_.positions(), kUpsamplingTile, kFewestTiles),
        panels_(kUpsamplingTaps * channels_, outputs_) {
    copy_padded(bias, outputs_, bias_);
  }

  void run(int threads) {
#pragma omp parallel num_threads(threads)
    {
      Scratch<T> by_tap(kUpsamplingTaps * panels_.kWidth), left(tiles_.largest() * left_stride_);
      Scratch<T> result(2 * tiles_.largest() * out_stride_);
      x_.prepare();
#pragma omp for schedule(static) collapse(2)
      for (int64_t p = 0; p < panels_.count(); ++p)
        for (int64_t c = 0; c < channels_; ++c) pack(p, c, by_tap.data());
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < tiles_.count(); ++tile) {
        const int64_t begin = tiles_.begin(tile), end = tiles_.end(tile);
        gather(begin, end, left.data());
        for (int64_t y = 0; y < 2; ++y) {
          for (const Parity& parity : kParities)
            if (parity.y == y) multiply_parity(parity, end - begin, left.data(), result.data());
          write(begin, end, y, result.data());
        }
        if (streaming_) end_streams();
      }
    }
  }

 private:
  // The weights of one input channel and one panel of outputs.
  void pack(int64_t p, int64_t c, T* by_tap) {
    const int64_t first = panels_.first_column(p), wide = std::min(panels_.kWidth, outputs_ - first);
    const T* from = weight_.data + kUpsamplingTaps * outputs_ * c + first * weight_.output_stride;
    if (weight_.tap_stride == 1) {
      transpose(from, weight_.output_stride, wide, kUpsamplingTaps, by_tap, panels_.kWidth);
    } else {
      for (int t = 0; t < kUpsamplingTaps; ++t) {
        std::fill_n(by_tap + t * panels_.kWidth, panels_.width(p), T(0));
        std::copy_n(from + t * weight_.tap_stride, wide, by_tap + t * panels_.kWidth);
      }
    }
    T* row = panels_.panel(p) + c * panels_.kWidth;
    for (const Parity& parity : kParities)
      for (int n = 0; n < parity.count; ++n, row += channels_ * panels_.kWidth)
        copy_row(by_tap + parity.tap[n] * panels_.kWidth, panels_.width(p), row);
  }

  void gather(int64_t begin, int64_t end, T* left) const {
    for_each_run(shape_, begin, end, [&](const Run& run) {
      for (int n = 0; n < kNeighbours; ++n) {
        const int64_t y = run.row + kNeighbour[n][0];
        for (int64_t i = 0; i < run.count; ++i) {
          const int64_t column = run.column + i + kNeighbour[n][1];
          T* to = left + (run.first + i) * left_stride_ + n * channels_;
          if (y < 0 || column < 0)
            std::fill_n(to, channels_, T(0));
          else
            copy_row(x_.at(run.sample, y * shape_.size[2] + column), channels_, to);
        }
      }
    });
  }

  // Results of both parities along x alternate, as they do in the output.
  void multiply_parity(const Parity& parity, int64_t rows, const T* left, T* result) const {
    int first = 0;
    for (const Parity* before = kParities; before != &parity; ++before) first += before->count;
    multiply_panels(Left<T>{left + parity.first * channels_, left_stride_, 1}, panels_, first * channels_,
                    parity.count * channels_, rows, bias_.data(), result + parity.x * out_stride_, 2 * out_stride_);
  }

  void write(int64_t begin, int64_t end, int64_t y, const T* result) const {
    for_each_run(shape_, begin, end, [&](const Run& run) {
      const int64_t at = (2 * run.row + y) * 2 * shape_.size[2] + 2 * run.column;
      write_tile(out_, out_offsets_, {run.sample, at, at + 2 * run.count}, result + 2 * run.first * out_stride_,
                 out_stride_, streaming_);
    });
  }

  const UpsamplingWeight<const T>& weight_;
  const View<S>& out_;
  const Shape shape_;
  ChannelRows<S> x_;
  const Offsets out_offsets_;
  const bool streaming_;
  const int64_t channels_, outputs_, left_stride_, out_stride_;
  const Pieces tiles_;
  Panels<T> panels_;  // parity by parity, tap by tap, channel by channel
  Scratch<T> bias_;
};

template <class S>
void upsample_twice(const View<const S>& x, const UpsamplingWeight<const Compute<S>>& weight, const Compute<S>* bias,
                    const View<S>& out, int threads) {
  UpsampleForward<S>(x, weight, bias, out).run(threads);
}

}  // namespace BTINET_ISA
}  // namespace btinet
