// Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// The gradient of the output around each position, tap by tap, is one matrix [positions, 9 O] for both products:
// d_x = that times the weight, band by band and tile by tile; d_weight = x^T times that, over each band. It costs 9 O
// copies a position against 36 C O flops. A name d_z is the gradient of z.
template <class S>
class UpsampleBackward {
  using T = Compute<S>;
  static constexpr int64_t lanes = Lanes<T>::count;

 public:
  UpsampleBackward(const View<const S>& d_out, const View<const S>& x, const UpsamplingWeight<const T>& weight,
                   const View<S>& d_x, const UpsamplingWeight<T>& d_weight, T* d_bias)
      : weight_(weight),
        d_x_(d_x),
        d_weight_(d_weight),
        d_bias_(d_bias),
        shape_(x.shape),
        of_x_(x),
        of_grad_(d_out),
        d_x_offsets_(d_x),
        channels_(x.shape.channels),
        outputs_(d_out.shape.channels),
        inner_(kUpsamplingTaps * outputs_),
        grad_stride_(spread_stride<T>(inner_)),
        total_stride_(padded<T>(inner_)),
        x_stride_(padded<T>(channels_)),
        bias_stride_(padded<T>(outputs_)),
        bands_(bands_of_rows<T>(shape_.batch * shape_.positions(), grad_stride_)),
        transposed_(inner_, channels_),
        strips_(bands_.largest(), channels_),
        grad_(bands_.largest() * grad_stride_),
        in_place_(d_weight.tap_stride != 1 && total_stride_ == inner_),
        own_total_(in_place_ ? 0 : channels_ * total_stride_),
        total_(in_place_ ? d_weight.data : own_total_.data()) {
    int64_t tiles = 0;
    for (int64_t band = 0; band < bands_.count(); ++band) {
      first_tile_.push_back(tiles);
      tiles += tiles_of(band).count();
    }
    first_tile_.push_back(tiles);
    bias_sums_.resize(tiles * bias_stride_);
    if (tiles == 0) std::fill_n(total_, channels_ * total_stride_, T(0));
    zeros_.fill(x_stride_, T(0));
  }

  void run(int threads) {
#pragma omp parallel num_threads(threads)
    {
      of_x_.prepare();
      of_grad_.prepare();
      pack_weight();
      Scratch<T> result(kUpsamplingTile * x_stride_);
      for (int64_t band = 0; band < bands_.count(); ++band) {
        const Pieces tiles = tiles_of(band);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles.count(); ++tile)
          work_off(bands_.begin(band), tiles.begin(tile), tiles.end(tile),
                   &bias_sums_[(first_tile_[band] + tile) * bias_stride_], result.data());
        add_products(strips_, Right<T>{grad_.data(), grad_stride_}, bands_.end(band) - bands_.begin(band),
                     total_stride_, band == 0, total_, total_stride_);
#pragma omp barrier
      }
      finish();
    }
  }

 private:
  Pieces tiles_of(int64_t band) const {
    return Pieces(bands_.begin(band), bands_.end(band), kUpsamplingTile, kFewestTiles);
  }

  // Rows (tap, output), columns of input channels.
  void pack_weight() {
    const int64_t blocks = (outputs_ + lanes - 1) / lanes, width = transposed_.kWidth;
    Scratch<T> by_tap(kUpsamplingTaps * width * lanes);
#pragma omp for schedule(static) collapse(2)
    for (int64_t p = 0; p < transposed_.count(); ++p)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = transposed_.first_column(p), wide = std::min(width, channels_ - first);
        const int64_t o = block * lanes, high = std::min(lanes, outputs_ - o);
        const T* from = weight_.data + first * inner_ + o * weight_.output_stride;
        if (weight_.tap_stride == 1)
          for (int64_t c = 0; c < wide; ++c)
            transpose(from + c * inner_, weight_.output_stride, high, kUpsamplingTaps, by_tap.data() + c * lanes,
                      width * lanes);
        for (int t = 0; t < kUpsamplingTaps; ++t) {
          T* to = transposed_.panel(p) + (t * outputs_ + o) * width;
          if (weight_.tap_stride == 1)
            transpose(&by_tap[t * width * lanes], lanes, wide, high, to, width);
          else
            transpose(from + t * weight_.tap_stride, inner_, wide, high, to, width);
        }
      }
  }

  // One tile of a band that begins at `origin`: what the products over the band read, d_x, and the sums for d_bias.
  void work_off(int64_t origin, int64_t begin, int64_t end, T* bias_sums, T* result) {
    T* grad = &grad_[(begin - origin) * grad_stride_];
    gather(begin, end, grad);
    add_outputs(grad, end - begin, bias_sums);
    for_each_run(shape_, begin, end, [&](const Run& run) {
      strips_.set_rows(begin - origin + run.first, run.count,
                       of_x_.at(run.sample, run.row * shape_.size[2] + run.column), of_x_.step());
    });
    multiply_panels(Left<T>{grad, grad_stride_, 1}, transposed_, end - begin, zeros_.data(), result, x_stride_);
    for_each_run(shape_, begin, end, [&](const Run& run) {
      const int64_t at = run.row * shape_.size[2] + run.column;
      store_tile(d_x_, d_x_offsets_, {run.sample, at, at + run.count}, 0, channels_, result + run.first * x_stride_,
                 x_stride_);
    });
  }

  // Outputs (2y + ky, 2x + kx) of tap (ky, kx); those of the last row and column that lie outside are zero.
  void gather(int64_t begin, int64_t end, T* grad) const {
    const int64_t height = 2 * shape_.size[1], width = 2 * shape_.size[2];
    for_each_run(shape_, begin, end, [&](const Run& run) {
      for (int64_t i = 0; i < run.count; ++i) {
        T* to = grad + (run.first + i) * grad_stride_;
        for (int t = 0; t < kUpsamplingTaps; ++t, to += outputs_) {
          const int64_t y = 2 * run.row + t / 3, x = 2 * (run.column + i) + t % 3;
          if (y < height && x < width)
            copy_row(of_grad_.at(run.sample, y * width + x), outputs_, to);
          else
            std::fill_n(to, outputs_, T(0));
        }
        std::fill_n(to, grad_stride_ - inner_, T(0));
      }
    });
  }

  // Taps (0, 0), (0, 1), (1, 0) and (1, 1) of all positions meet every output once.
  void add_outputs(const T* grad, int64_t rows, T* sums) const {
    for_each_vector<T>(outputs_, [&](int64_t o, auto part) {
      Vector<T> sum = {};
      for (int64_t r = 0; r < rows; ++r)
        for (const int tap : {0, 1, 3, 4}) sum += load(grad + r * grad_stride_ + tap * outputs_ + o, part);
      store(sums + o, sum);
    });
  }

  void finish() {
    const int64_t taps = padded<T>(kUpsamplingTaps);
    Scratch<T> by_output(taps * padded<T>(outputs_));
#pragma omp for schedule(static) nowait
    for (int64_t c = 0; c < (in_place_ ? 0 : channels_); ++c) {
      const T* total = total_ + c * total_stride_;
      T* to = d_weight_.data + c * inner_;
      if (d_weight_.tap_stride != 1) {
        std::copy_n(total, inner_, to);
        continue;
      }
      transpose(total, outputs_, kUpsamplingTaps, outputs_, by_output.data(), taps);
      for (int64_t o = 0; o < outputs_; ++o)
        std::copy_n(&by_output[o * taps], kUpsamplingTaps, to + o * kUpsamplingTaps);
    }
#pragma omp for schedule(static)
    for (int64_t o = 0; o < outputs_; ++o) {
      double sum = 0;
      for (int64_t tile = 0; tile < first_tile_.back(); ++tile) sum += bias_sums_[tile * bias_stride_ + o];
      d_bias_[o] = T(sum);
    }
  }

  const UpsamplingWeight<const T>& weight_;
  const View<S>& d_x_;
  const UpsamplingWeight<T>& d_weight_;
  T* const d_bias_;
  const Shape shape_;
  ChannelRows<S> of_x_, of_grad_;
  const Offsets d_x_offsets_;
  const int64_t channels_, outputs_, inner_, grad_stride_, total_stride_, x_stride_, bias_stride_;
  const Pieces bands_;
  std::vector<int64_t> first_tile_;  // of each band
  Panels<T> transposed_;             // [9 O, C]
  Strips<T> strips_;                 // [positions of a band, C]
  Scratch<T> grad_;                  // [positions of a band, 9 O]
  const bool in_place_;              // whether the sums of d_weight can be kept where they belong
  Scratch<T> own_total_;
  T* const total_;  // [C, 9 O]
  Scratch<T> bias_sums_, zeros_;
};

template <class S>
void upsample_twice_backward(const View<const S>& d_out, const View<const S>& x,
                             const UpsamplingWeight<const Compute<S>>& weight, const View<S>& d_x,
                             const UpsamplingWeight<Compute<S>>& d_weight, Compute<S>* d_bias, int threads) {
  UpsampleBackward<S>(d_out, x, weight, d_x, d_weight, d_bias).run(threads);
}

}  // namespace BTINET_ISA
}  // namespace btinet
