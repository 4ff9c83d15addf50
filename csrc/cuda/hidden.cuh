// The context's hidden layer over one tile: ReLU(W D + w0), `kColumns` hidden channels at a time. A warp owns 16
// positions; a lane holds, of each 8 hidden channels, two at each of two positions (see multiply_add).
#pragma once

#include "product.cuh"
#include "tile.cuh"
#include "weights.cuh"

namespace btinet {
namespace cuda {

constexpr int kColumns = 96;
constexpr int kColumnTiles = kColumns / 8;
constexpr int kWeightStep = kChannels + 4;

using Hidden = float[1][kColumnTiles][4];

template <class T>
struct HiddenLayer {
  View<const T> seg;
  Access access;
  Context context;
  bool whole_weights;

  HiddenLayer(const Tensor& tensor, const Context& context)
      : seg(typed<const T>(tensor)),
        access(access_for<const T>({seg})),
        context(context),
        whole_weights(weights_are_whole(context, seg.shape.channels)) {}
};

struct HiddenMemory {
  alignas(16) float seg[kLeftTileSize];
  alignas(16) float weight[kColumns * kWeightStep];
  int64_t offset[kPositions];
  float pooled[kWarps][kColumns];
  float of_warps[2][kWarps];
};

struct Columns {
  int64_t begin;
  int count;
};

// Which hidden channels of a tile of 8 and which positions a lane holds.
struct LaneOfProduct {
  int warp = threadIdx.x / 32;
  int column = threadIdx.x % 4 * 2;
  int position = warp * 16 + threadIdx.x % 32 / 4;
};

// Fills `hidden`; `on_tile(channel, live, tile)` sees every tile of D while it is in shared memory.
template <class T, class F>
__device__ void compute_hidden(const HiddenLayer<T>& layer, const Place& place, const Columns& columns,
                               HiddenMemory& memory, Hidden& hidden, const F& on_tile) {
  const int64_t channels = layer.seg.shape.channels;
  const LaneOfProduct lane;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = n * 8 + lane.column + i % 2;
      hidden[0][n][i] = j < columns.count ? layer.context.bias[columns.begin + j] : 0;
    }
  const int padded = (columns.count + 8 * kGroup - 1) / (8 * kGroup) * (8 * kGroup);
  const int positions = live_at(layer.seg.shape, place).positions;
  const SharedTile tile = left_tile(memory.seg, layer.access.channels_inner);
  for (int64_t begin = 0; begin < channels; begin += kChannels) {
    const Live live = live_at(layer.seg.shape, {place.sample, place.tile, begin / kChannels});
    __syncthreads();
    load_tile<T>(region_of(layer.seg, place.sample, begin, memory.offset), layer.access, live, tile);
    load_weights({layer.context.weight + (columns.begin * channels + begin), channels, columns.count, live.channels},
                 layer.whole_weights, padded, memory.weight, kWeightStep);
    __syncthreads();
    on_tile(begin, live, tile);
    if (lane.warp * 16 >= live.positions) continue;
    multiply<!std::is_same_v<T, float>, false>(
        hidden, Operand{tile.data + lane.warp * 16 * tile.position_step, tile.position_step, tile.channel_step},
        Operand{memory.weight, kWeightStep, 1}, (live.channels + 7) / 8 * 8, columns.count);
  }
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)  // lets NaN through, as torch does; positions that do not exist are zero
      if (hidden[0][n][i] < 0 || lane.position + i / 2 * 8 >= positions) hidden[0][n][i] = 0;
}

// Adds up what the warps of a block hold; the first thread gets the sum.
__device__ inline float sum_of_block(float value, float (&of_warps)[kWarps]) {
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp];
  return sum;
}

// Sums over the positions of a tile, each with its share, to `out[0 ... columns.count)`.
__device__ inline void pool(const Hidden& values, const float (&share)[2], const Columns& columns, HiddenMemory& memory,
                            float* out) {
  const LaneOfProduct lane;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    if (n * 8 >= columns.count) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = share[0] * values[0][n][i] + share[1] * values[0][n][i + 2];
      for (int mask = 4; mask <= 16; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
      if (threadIdx.x % 32 < 4) memory.pooled[lane.warp][n * 8 + lane.column + i] = sum;
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < columns.count; j += kThreads) {
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += memory.pooled[warp][j];
    out[j] = sum;
  }
  __syncthreads();
}

// Adds to each of the lane's two positions the product of its hidden channels with a vector.
__device__ inline void add_dot(const Hidden& hidden, const float* vector, const Columns& columns, float (&dot)[2]) {
  const LaneOfProduct lane;
  float sum[2] = {};
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = n * 8 + lane.column + i % 2;
      if (j < columns.count) sum[i / 2] += vector[columns.begin + j] * hidden[0][n][i];
    }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int mask = 1; mask <= 2; mask *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], mask);
    dot[i] += sum[i];
  }
}

}  // namespace cuda
}  // namespace btinet
