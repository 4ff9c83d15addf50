// Cuts a batch into ranges of positions. The cut depends on the shape alone, never on the number of threads, so
// that sums are added in the same order on every machine and repeats are bit-identical.
#pragma once

#include <algorithm>
#include <cstdint>

#include "view.h"

namespace btinet {

struct Range {
  int64_t sample;
  int64_t begin;
  int64_t end;
};

class Partition {
 public:
  Partition(const Shape& shape, int64_t tile)
      : positions_(shape.positions()), tiles_((positions_ + tile - 1) / tile), tile_(tile) {
    const int64_t wanted = (kRanges + shape.batch - 1) / std::max<int64_t>(shape.batch, 1);
    per_sample_ = std::max<int64_t>(1, std::min(wanted, tiles_));
    ranges_ = shape.batch * per_sample_;
  }

  int64_t ranges() const { return ranges_; }
  int64_t per_sample() const { return per_sample_; }
  // Ranges are handed out in runs, so that scratch of `bytes` that is too large to keep per range is kept per run.
  int64_t groups(int64_t bytes) const {
    int64_t groups = kRanges;
    while (groups > kFewestGroups && groups * bytes > kScratch) groups /= 2;
    return std::min(ranges_, groups);
  }
  // Calls with each stretch of positions of one sample in a group.
  template <class F>
  void for_each_stretch(int64_t group, int64_t groups, const F& stretch) const {
    const int64_t end = (group + 1) * ranges_ / groups;
    for (int64_t index = group * ranges_ / groups; index < end;) {
      Range whole = range(index);
      while (++index < end && range(index).sample == whole.sample) whole.end = range(index).end;
      stretch(whole);
    }
  }

  Range range(int64_t index) const {
    const int64_t part = index % per_sample_;
    const int64_t begin = part * tiles_ / per_sample_ * tile_;
    const int64_t end = std::min((part + 1) * tiles_ / per_sample_ * tile_, positions_);
    return {index / per_sample_, begin, end};
  }

 private:
  static constexpr int64_t kRanges = 32;
  static constexpr int64_t kFewestGroups = 8;
  static constexpr int64_t kScratch = 5 << 20;
  int64_t positions_;
  int64_t tiles_;
  int64_t tile_;
  int64_t per_sample_;
  int64_t ranges_;
};

}  // namespace btinet
