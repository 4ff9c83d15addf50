// How the work of dual-path attention is cut up. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Two passes around work on small things. Samples go through all of it one or a few at a time, so that the second pass
// finds in the cache what the first one read. Where there are samples enough, each thread goes its own way with some of
// them; else all threads share each step. What is summed in which order depends on the shape alone.
class DualPathPlan {
 public:
  DualPathPlan(const Shape& shape, int64_t bytes_per_value, bool planes, int threads)
      : planes(planes),
        streaming(shape.batch * shape.channels * shape.positions() * bytes_per_value > kCaches),
        batch_(shape.batch),
        rows_(shape.size[0] * shape.size[1]),
        blocks_(std::min((rows_ + kFewestRows - 1) / kFewestRows, kMostBlocks)),
        partition_(Shape{1, shape.channels, {shape.size[0], shape.size[1], shape.size[2]}},
                   planes ? kPlaneTile : kTile) {
    const int64_t bytes = std::max<int64_t>(1, shape.channels * shape.positions() * bytes_per_value);
    const auto samples_of = [&](int64_t most) { return std::max<int64_t>(1, std::min(most, batch_)); };
    together_ = samples_of(std::min(kApart / bytes, (batch_ + threads - 1) / threads));
    const int64_t parts = (batch_ + together_ - 1) / together_;
    apart_ = parts % threads == 0 || parts >= 4 * threads;
    if (!apart_) together_ = samples_of(kTogether / bytes);
  }

  const bool planes;
  const bool streaming;  // whoever reads the result does not find it in the caches anyway

  int64_t ranges() const { return partition_.ranges(); }  // of positions, in one sample
  int64_t blocks() const { return blocks_; }              // of rows of positions, in one sample

  // Every thread of a team calls this. For some samples at a time: reduce(range, its number in the sample), then
  // channels(first sample, number of samples) and rows(sample, block, first row, end), then write(range).
  template <class Reduce, class Channels, class Rows, class Write>
  void run(const Reduce& reduce, const Channels& channels, const Rows& rows, const Write& write) const {
    if (!apart_) {
      for (int64_t first = 0; first < batch_; first += together_)
        run_samples<true>(first, std::min(together_, batch_ - first), reduce, channels, rows, write);
#pragma omp barrier
      return;
    }
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < batch_; first += together_)
      run_samples<false>(first, std::min(together_, batch_ - first), reduce, channels, rows, write);
  }

 private:
  static constexpr int64_t kTogether = 8 << 20, kApart = 2 << 20, kCaches = 32 << 20;  // bytes
  static constexpr int64_t kGroup = 4;       // samples that go through the channels' network together
  static constexpr int64_t kFewestRows = 4;  // of a block
  static constexpr int64_t kMostBlocks = 16;

  template <bool kTeam, class Reduce, class Channels, class Rows, class Write>
  void run_samples(int64_t first, int64_t samples, const Reduce& reduce, const Channels& channels, const Rows& rows,
                   const Write& write) const {
    const int64_t groups = (samples + kGroup - 1) / kGroup, count = samples * ranges();
    const auto range_of = [&](int64_t index) {
      Range range = partition_.range(index % ranges());
      range.sample = first + index / ranges();
      return range;
    };
    share<kTeam>(count, [&](int64_t index) { reduce(range_of(index), index % ranges()); });
    wait<kTeam>();
    share<kTeam>(groups + samples * blocks_, [&](int64_t item) {
      if (item < groups) return channels(first + item * kGroup, std::min(kGroup, samples - item * kGroup));
      const int64_t sample = (item - groups) / blocks_, block = (item - groups) % blocks_;
      rows(first + sample, block, block * rows_ / blocks_, (block + 1) * rows_ / blocks_);
    });
    wait<kTeam>();
    // Backwards: `reduce` has just read the end.
    share<kTeam>(count, [&](int64_t index) { write(range_of(count - 1 - index)); });
    if (streaming) end_streams();
  }

  template <bool kTeam, class F>
  static void share(int64_t count, const F& item) {
    if constexpr (kTeam) {
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < count; ++i) item(i);
    } else {
      for (int64_t i = 0; i < count; ++i) item(i);
    }
  }
  template <bool kTeam>
  static void wait() {
    if constexpr (kTeam) {
#pragma omp barrier
    }
  }

  int64_t batch_, rows_, blocks_;
  Partition partition_;
  int64_t together_;
  bool apart_;
};

// Adds a tile's sums to those kept in double and starts them again.
template <class T>
inline void move_sums(T* of_tile, double* sums, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    sums[c] += of_tile[c];
    of_tile[c] = 0;
  }
}

// out[c] = the ranges' sums [ranges, count], times a factor.
template <class T>
inline void sum_ranges(const double* sums, int64_t ranges, int64_t count, double factor, T* out) {
  for (int64_t c = 0; c < count; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < ranges; ++i) sum += sums[i * count + c];
    out[c] = T(sum * factor);
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
