// How the work of dual-path attention is cut up. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// Two passes around work on small things. Samples go through all of it a few at a time, so that the second pass finds
// in the cache what the first one read. What is summed in which order depends on the shape alone.
class DualPathPlan {
 public:
  DualPathPlan(const Shape& shape, int64_t bytes_per_value, bool planes)
      : planes(planes), shape_(shape), rows_(shape.size[0] * shape.size[1]) {
    const int64_t bytes = std::max<int64_t>(1, shape.channels * shape.positions() * bytes_per_value);
    together_ = std::max<int64_t>(1, std::min(shape.batch, kTogether / bytes));
    blocks_ = std::min((rows_ + kFewestRows - 1) / kFewestRows, kMostBlocks);
  }

  const bool planes;

  // Ranges that pass 1 works on at the same time.
  int64_t most_ranges() const {
    int64_t most = 0;
    for (int64_t first = 0; first < shape_.batch; first += together_) most = std::max(most, partition(first).ranges());
    return most;
  }
  int64_t blocks() const { return blocks_; }  // of rows of positions, in one sample

  // Every thread of a team calls this. For some samples at a time: reduce(range, number of the range), then
  // channels(first sample, number of samples, number of their first range, ranges of each) and
  // rows(sample, block, first row, end), then write(range).
  template <class Reduce, class Channels, class Rows, class Write>
  void run(const Reduce& reduce, const Channels& channels, const Rows& rows, const Write& write) const {
    for (int64_t first = 0; first < shape_.batch; first += together_) {
      const Partition ranges = partition(first);
      const int64_t samples = ranges.ranges() / ranges.per_sample(), groups = (samples + kGroup - 1) / kGroup;
      const auto range_of = [&](int64_t index) {
        Range range = ranges.range(index);
        range.sample += first;
        return range;
      };
#pragma omp for schedule(static)
      for (int64_t index = 0; index < ranges.ranges(); ++index) reduce(range_of(index), index);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < groups + samples * blocks_; ++item) {
        if (item < groups) {
          const int64_t begin = item * kGroup;
          channels(first + begin, std::min(kGroup, samples - begin), begin * ranges.per_sample(), ranges.per_sample());
        } else {
          const int64_t sample = (item - groups) / blocks_, block = (item - groups) % blocks_;
          rows(first + sample, block, block * rows_ / blocks_, (block + 1) * rows_ / blocks_);
        }
      }
#pragma omp for schedule(static) nowait
      for (int64_t index = ranges.ranges() - 1; index >= 0; --index)  // backwards: `reduce` has just read the end
        write(range_of(index));
    }
  }

 private:
  static constexpr int64_t kTogether = 8 << 20;  // bytes
  static constexpr int64_t kGroup = 4;           // samples that go through the channels' network together
  static constexpr int64_t kFewestRows = 4;      // of a block
  static constexpr int64_t kMostBlocks = 16;

  // Of the samples from `first` on that are treated together.
  Partition partition(int64_t first) const {
    const int64_t samples = std::min(together_, shape_.batch - first);
    return {Shape{samples, shape_.channels, {shape_.size[0], shape_.size[1], shape_.size[2]}},
            planes ? kPlaneTile : kTile};
  }

  Shape shape_;
  int64_t rows_, together_, blocks_;
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
