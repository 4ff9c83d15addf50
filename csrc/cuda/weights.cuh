// Blocks of the context's weight W, on their way to shared memory.
#pragma once

#include "tile.cuh"

namespace btinet {
namespace cuda {

// Whether the rows of W are whole vectors of 16 bytes.
inline bool weights_are_whole(const Context& context, int64_t channels) {
  return channels % 4 == 0 && reinterpret_cast<uintptr_t>(context.weight) % 16 == 0;
}

// A block of W. What does not exist of it is zero in shared memory.
struct WeightBlock {
  const float* data;
  int64_t row_step;
  int live_rows;
  int live_channels;
};

template <int V>
__device__ inline void load_weights_by(const WeightBlock& from, int rows, float* tile, int tile_step) {
  constexpr int kAcross = kChannels / V;
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * kAcross; i += kThreads) {
    const int j = i / kAcross, c = i % kAcross * V;
    Pack<float, V> values = {};
    if (j < from.live_rows && c < from.live_channels) values = load<V>(from.data + (j * from.row_step + c));
    store_shared<V>(tile + (j * tile_step + c), values);
  }
}

__device__ inline void load_weights(const WeightBlock& from, bool whole, int rows, float* tile, int tile_step) {
  if (whole) {
    load_weights_by<4>(from, rows, tile, tile_step);
  } else {
    load_weights_by<1>(from, rows, tile, tile_step);
  }
}

}  // namespace cuda
}  // namespace btinet
