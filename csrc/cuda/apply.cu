#include "launch.h"
#include "sum_parts.h"
#include "tile.cuh"

namespace btinet {
namespace cuda {
namespace {

template <class T>
struct ApplyTask {
  View<const T> first;
  View<const T> second;
  View<T> out;
  Access access;
  Grid grid;
  const float* factor;
};

// out = first * factor[b, c], or first + factor[b] (second - first). Tiles are walked backwards: the pass before read
// the last ones last, so they are still in L2.
template <class T, bool kInterpolate>
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ ApplyTask<T> task) {
  __shared__ int64_t offset[3][kPositions];
  const Shape& shape = task.out.shape;
  const Place place = task.grid.place(task.grid.blocks() - 1 - blockIdx.x);
  const int64_t channel = place.chunk * kChannels;
  const Live live = live_at(shape, place);
  locate(task.first, place.tile * kPositions, offset[0]);
  if (kInterpolate) locate(task.second, place.tile * kPositions, offset[1]);
  locate(task.out, place.tile * kPositions, offset[2]);
  __syncthreads();
  const auto first = region_of(task.first, place.sample, channel, offset[0]);
  const auto second = region_of(task.second, place.sample, channel, offset[1]);
  const auto out = region_of(task.out, place.sample, channel, offset[2]);
  const float* factor =
      kInterpolate ? task.factor + place.sample : task.factor + (place.sample * shape.channels + channel);
  const bool channels_inner = task.access.channels_inner;
  with_width<T>(task.access.width, [&](auto width) {
    constexpr int V = decltype(width)::value;
#pragma unroll 1
    for (int round = 0; round < Share<V>::kRounds; ++round) {
      Share<V> values = load_share<V, T>(first, channels_inner, round, live), others;
      if (kInterpolate) others = load_share<V, T>(second, channels_inner, round, live);
      for_each_slot<V>(channels_inner, round, [&](int i, const Slot& slot) {
        if (!live.has(slot)) return;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          float& value = values.pack[i].values[e];
          if (kInterpolate) {
            value += *factor * (others.pack[i].values[e] - value);
          } else {
            value *= factor[slot.channel + (channels_inner ? e : 0)];
          }
        }
        store<V>(out.at(slot.channel, slot.position), values.pack[i]);
      });
    }
  });
}

template <class T>
struct DotTask {
  View<const T> grad;
  View<const T> seg;
  Access access;
  Grid grid;
  float* partial;  // [B, tiles, C]
};

template <class T>
__global__ void __launch_bounds__(kThreads) channel_dot_kernel(const __grid_constant__ DotTask<T> task) {
  __shared__ int64_t offset[2][kPositions];
  alignas(16) __shared__ float products[kLeftTileSize];
  const Shape& shape = task.seg.shape;
  const Place place = task.grid.place(blockIdx.x);
  const int64_t channel = place.chunk * kChannels;
  const Live live = live_at(shape, place);
  const bool channels_inner = task.access.channels_inner;
  locate(task.grad, place.tile * kPositions, offset[0]);
  locate(task.seg, place.tile * kPositions, offset[1]);
  __syncthreads();
  const auto grad = region_of(task.grad, place.sample, channel, offset[0]);
  const auto seg = region_of(task.seg, place.sample, channel, offset[1]);
  const SharedTile tile = left_tile(products, channels_inner);
  with_width<T>(task.access.width, [&](auto width) {
    constexpr int V = decltype(width)::value;
#pragma unroll 1
    for (int round = 0; round < Share<V>::kRounds; ++round) {
      Share<V> values = load_share<V, T>(grad, channels_inner, round, live);
      const Share<V> others = load_share<V, T>(seg, channels_inner, round, live);
#pragma unroll
      for (int i = 0; i < Share<V>::kCount; ++i)
#pragma unroll
        for (int e = 0; e < V; ++e) values.pack[i].values[e] *= others.pack[i].values[e];
      store_share<V>(values, channels_inner, round, tile);
    }
  });
  __syncthreads();
  const LaneGrid lane(channels_inner);
  float* partial = task.partial + ((place.sample * task.grid.tiles + place.tile) * shape.channels + channel);
  for (int begin = threadIdx.x / 32 * lane.channels; begin < live.channels; begin += kWarps * lane.channels) {
    const int c = begin + lane.channel;
    float sum = 0;
    for (int p = lane.position; p < live.positions; p += lane.positions) sum += *tile.at(c, p);
    sum = lane.sum_of_channel(sum);
    if (lane.position == 0 && c < live.channels) partial[c] = sum;
  }
}

template <bool kInterpolate>
void apply(const char* name, const Tensor& first, const Tensor& second, const float* factor, const Tensor& out,
           void* stream) {
  const Grid grid = channel_grid_of(out.view.shape);
  with_type(out.type, [&](auto value) {
    using T = decltype(value);
    const View<const T> from = typed<const T>(first), to = typed<const T>(second);
    const View<T> target = typed<T>(out);
    const Access access = access_for<const T>({typed<const T>(out), from, to});
    launch<ApplyTask<T>>({name, grid.blocks(), kThreads, stream}, apply_kernel<T, kInterpolate>,
                         {from, to, target, access, grid, factor});
  });
}

}  // namespace

void scale_channels(const Tensor& seg, const float* scale, const Tensor& out, void* stream) {
  apply<false>("scale_channels", seg, seg, scale, out, stream);
}

void interpolate(const Tensor& base, const Tensor& enhanced, const float* weight, const Tensor& out, void* stream) {
  apply<true>("interpolate", base, enhanced, weight, out, stream);
}

int64_t channel_dot_workspace(const Shape& shape) {
  return shape.batch * tiles_of(shape) * shape.channels;
}

void channel_dot(const Tensor& grad, const Tensor& seg, float* out, float* workspace, void* stream) {
  const Grid grid = channel_grid_of(seg.view.shape);
  with_type(seg.type, [&](auto value) {
    using T = decltype(value);
    const View<const T> first = typed<const T>(grad), second = typed<const T>(seg);
    launch<DotTask<T>>({"channel_dot", grid.blocks(), kThreads, stream}, channel_dot_kernel<T>,
                       {first, second, access_for<const T>({second, first}), grid, workspace});
  });
  sum_parts({workspace, grid.samples, grid.tiles, seg.view.shape.channels}, out, stream);
}

}  // namespace cuda
}  // namespace btinet
