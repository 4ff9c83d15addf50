// A tile: `kPositions` positions of one sample by `kChannels` channels, and how a block moves it. Vectors of V elements
// are dealt to the threads in the order of memory, so that neighbouring threads make neighbouring accesses.
#pragma once

#include "dense.cuh"

namespace btinet {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPositions = 64;
constexpr int kChannels = 48;

// Where a block works. Blocks that share positions are neighbours, so that the second one finds them in L2.
struct Place {
  int64_t sample;
  int64_t tile;   // of positions, within the sample
  int64_t chunk;  // of channels, or of hidden channels
};

struct Grid {
  int64_t samples;
  int64_t tiles;
  int64_t chunks;

  __host__ __device__ int64_t blocks() const { return samples * tiles * chunks; }
  __host__ __device__ Place place(int64_t block) const {
    return {block / chunks / tiles, block / chunks % tiles, block % chunks};
  }
};

inline int64_t divide_up(int64_t count, int64_t by) {
  return (count + by - 1) / by;
}
inline int64_t tiles_of(const Shape& shape) {
  return divide_up(shape.size[0] * shape.size[1] * shape.size[2], kPositions);
}
inline Grid grid_of(const Shape& shape, int64_t chunks) {
  return {shape.batch, tiles_of(shape), chunks};
}
inline Grid channel_grid_of(const Shape& shape) {
  return grid_of(shape, divide_up(shape.channels, kChannels));
}

__device__ inline int64_t positions_of(const Shape& shape) {
  return shape.size[0] * shape.size[1] * shape.size[2];
}

__device__ inline int rest(int64_t count, int64_t begin, int most) {
  return count - begin < most ? int(count - begin) : most;
}

struct Slot {
  int channel;
  int position;
};

// The part of a tile that exists.
struct Live {
  int positions;
  int channels;

  __device__ bool has(const Slot& slot) const { return slot.channel < channels && slot.position < positions; }
};

__device__ inline Live live_at(const Shape& shape, const Place& place) {
  return {rest(positions_of(shape), place.tile * kPositions, kPositions),
          rest(shape.channels, place.chunk * kChannels, kChannels)};
}

// Fills `offset` with where each position of the tile lies within its sample.
template <class T>
__device__ void locate(const View<T>& view, int64_t begin, int64_t* offset) {
  const int64_t *size = view.shape.size, *stride = view.spatial_stride;
  for (int p = threadIdx.x; p < kPositions; p += kThreads) {
    const int64_t n = begin + p < positions_of(view.shape) ? begin + p : 0;
    offset[p] = n / size[2] / size[1] * stride[0] + n / size[2] % size[1] * stride[1] + n % size[2] * stride[2];
  }
}

// A tile in global memory.
template <class T>
struct Region {
  T* data;                // first channel of the tile in its sample
  const int64_t* offset;  // of each position
  int64_t channel_stride;

  __device__ T* at(int channel, int position) const { return data + (offset[position] + channel * channel_stride); }
};

template <class T>
__device__ Region<T> region_of(const View<T>& view, int64_t sample, int64_t channel, const int64_t* offset) {
  return {view.data + (sample * view.batch_stride + channel * view.channel_stride), offset, view.channel_stride};
}

template <int V>
__device__ inline Slot slot_of(int index, bool channels_inner) {
  constexpr int kAcross = kChannels / V, kAlong = kPositions / V;
  if (channels_inner) return {index % kAcross * V, index / kAcross};
  return {index / kAlong, index % kAlong * V};
}

// The vectors of a tile that one thread deals with in one round: all of them, unless they are many small ones.
template <int V>
struct Share {
  static constexpr int kAll = kPositions * kChannels / kThreads / V;
  static constexpr int kCount = kAll < 6 ? kAll : 6;
  static constexpr int kRounds = kAll / kCount;
  Pack<float, V> pack[kCount];
};

// Calls `action(i, slot)` for this thread's vectors.
template <int V, class F>
__device__ inline void for_each_slot(bool channels_inner, int round, const F& action) {
#pragma unroll
  for (int i = 0; i < Share<V>::kCount; ++i)
    action(i, slot_of<V>(threadIdx.x + (round * Share<V>::kCount + i) * kThreads, channels_inner));
}

// What does not exist is zero.
template <int V, class T>
__device__ inline Share<V> load_share(const Region<const T>& from, bool channels_inner, int round, const Live& live) {
  Share<V> share = {};
  for_each_slot<V>(channels_inner, round, [&](int i, const Slot& slot) {
    if (live.has(slot)) share.pack[i] = load<V>(from.at(slot.channel, slot.position));
  });
  return share;
}

// A tile in shared memory. The steps decide which reads are free of bank conflicts.
struct SharedTile {
  float* data;
  int channel_step;
  int position_step;

  __device__ float* at(int channel, int position) const {
    return data + (channel * channel_step + position * position_step);
  }
};

// A product reads 8 outer by 4 inner indices at once: without bank conflicts where the step of the outer index is an
// odd multiple of 4, or that of the inner one an odd multiple of 8. Channels are the inner index of a left tile and the
// outer one of a right tile.
constexpr int kLeftTileSize = kChannels * (kPositions + 8);
constexpr int kRightTileSize = kPositions * (kChannels + 8);

__device__ inline SharedTile left_tile(float* data, bool channels_inner) {
  return channels_inner ? SharedTile{data, 1, kChannels + 4} : SharedTile{data, kPositions + 8, 1};
}
__device__ inline SharedTile right_tile(float* data, bool channels_inner) {
  return channels_inner ? SharedTile{data, 1, kChannels + 8} : SharedTile{data, kPositions + 4, 1};
}

template <int V>
__device__ inline void store_share(const Share<V>& share, bool channels_inner, int round, const SharedTile& tile) {
  for_each_slot<V>(channels_inner, round, [&](int i, const Slot& slot) {
    store_shared<V>(tile.at(slot.channel, slot.position), share.pack[i]);
  });
}

template <class T>
__device__ inline void load_tile(const Region<const T>& from, const Access& access, const Live& live,
                                 const SharedTile& tile) {
  with_width<T>(access.width, [&](auto width) {
    constexpr int V = decltype(width)::value;
#pragma unroll 1
    for (int round = 0; round < Share<V>::kRounds; ++round)
      store_share<V>(load_share<V, T>(from, access.channels_inner, round, live), access.channels_inner, round, tile);
  });
}

// How a warp reads a shared tile when it sums over positions: 8 lanes lie along memory, 4 across.
struct LaneGrid {
  int channel;
  int channels;
  int position;
  int positions;
  int first_mask;  // lanes of one channel differ in the bits from here ...
  int last_mask;   // ... to here

  __device__ explicit LaneGrid(bool channels_inner) {
    const int lane = threadIdx.x % 32;
    channel = channels_inner ? lane % 8 : lane / 8;
    position = channels_inner ? lane / 8 : lane % 8;
    channels = channels_inner ? 8 : 4;
    positions = channels_inner ? 4 : 8;
    first_mask = channels_inner ? 8 : 1;
    last_mask = channels_inner ? 16 : 4;
  }

  __device__ float sum_of_channel(float value) const {
    for (int mask = first_mask; mask <= last_mask; mask *= 2) value += __shfl_xor_sync(~0u, value, mask);
    return value;
  }
};

}  // namespace cuda
}  // namespace btinet
