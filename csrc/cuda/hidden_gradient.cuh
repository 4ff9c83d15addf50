// The gradient that reaches W D + w0: from one bit per value (mean pooling), or stored by a pass before (softmax).
#pragma once

#include "tile.cuh"

namespace btinet {
namespace cuda {

constexpr int kHiddenOfTile = 48;

struct HiddenGradient {
  int64_t hidden;
  const uint8_t* active;  // [B, N, ceil(hidden / 8)]
  const float* pooled;    // [B, hidden], gradient of the pooled context; with `active`
  const float* values;    // [B, N, hidden]; without `active`
};

// Fills a tile of `kPositions` rows, `step` floats apart, with `kHiddenOfTile` hidden channels from `begin`.
__device__ inline void load_hidden_gradient(const HiddenGradient& from, const Shape& shape, const Place& place,
                                            int positions, int64_t begin, float* tile, int step) {
  constexpr int kBytes = kHiddenOfTile / 8;
  const int64_t count = positions_of(shape), first = place.sample * count + place.tile * kPositions;
  if (!from.active) {
    for (int i = threadIdx.x; i < kPositions * kHiddenOfTile; i += kThreads) {
      const int p = i / kHiddenOfTile, j = i % kHiddenOfTile;
      const bool exists = p < positions && begin + j < from.hidden;
      tile[p * step + j] = exists ? from.values[(first + p) * from.hidden + begin + j] : 0;
    }
    return;
  }
  const float* pooled = from.pooled + (place.sample * from.hidden + begin);
  const int64_t bytes = (from.hidden + 7) / 8;
  const float share = 1.0f / float(count);
#pragma unroll
  for (int i = threadIdx.x; i < kPositions * kBytes; i += kThreads) {
    const int p = i / kBytes, byte = i % kBytes;
    const bool exists = p < positions && begin / 8 + byte < bytes;
    const unsigned bits = exists ? from.active[(first + p) * bytes + begin / 8 + byte] : 0;
    Pack<float, 8> values;
#pragma unroll
    for (int k = 0; k < 8; ++k) values.values[k] = bits >> k & 1 ? pooled[byte * 8 + k] * share : 0;
    store_shared<8>(tile + (p * step + byte * 8), values);
  }
}

}  // namespace cuda
}  // namespace btinet
