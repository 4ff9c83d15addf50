// Pieces of a batch that are worked off one after the other. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

// The batch is worked off in bands that fit the outer cache: some whole samples, or some of the slabs of one. A slab is
// what lies side by side along the first axis of more than one position.
struct Band {
  int64_t sample, samples;
  int64_t begin, end;  // slabs, of each sample
};

class Bands {
 public:
  Bands(const Shape& shape, int64_t bytes_of_position)
      : slab_(shape.size[0] > 1 ? shape.size[1] * shape.size[2] : shape.size[2]) {
    slabs_ = shape.positions() / slab_;
    const int64_t positions = std::max(kFewestPositions, kBytes / bytes_of_position);
    const int64_t fit = std::max<int64_t>(1, positions / slab_);
    if (fit >= slabs_) {
      for (int64_t b = 0; b < shape.batch; b += fit / slabs_)
        bands_.push_back({b, std::min(fit / slabs_, shape.batch - b), 0, slabs_});
    } else {
      const int64_t parts = (slabs_ + fit - 1) / fit;
      for (int64_t b = 0; b < shape.batch; ++b)
        for (int64_t part = 0; part < parts; ++part)
          bands_.push_back({b, 1, part * slabs_ / parts, (part + 1) * slabs_ / parts});
    }
  }

  int64_t slab() const { return slab_; }    // positions
  int64_t slabs() const { return slabs_; }  // of a sample
  auto begin() const { return bands_.begin(); }
  auto end() const { return bands_.end(); }
  // The most positions that a band holds, with the slabs that are kept from the band before.
  int64_t capacity(int64_t kept) const {
    int64_t most = 0;
    for (const Band& band : bands_)
      most = std::max(most, band.samples * (band.end - band.begin) + (band.begin > 0 ? kept : 0));
    return most * slab_;
  }

 private:
  static constexpr int64_t kBytes = 8 << 20;  // smaller bands stay in nearer caches, but threads meet after each
  static constexpr int64_t kFewestPositions =
      512;  // sums over fewer would be added to the weights' gradients too often
  int64_t slab_, slabs_;
  std::vector<Band> bands_;
};

}  // namespace BTINET_ISA
}  // namespace btinet
