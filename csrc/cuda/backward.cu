#include "hidden_gradient.cuh"
#include "launch.h"
#include "product.cuh"
#include "sum_parts.h"
#include "softmax_gradient.h"
#include "weights.cuh"

#include <algorithm>

namespace btinet {
namespace cuda {
namespace {

constexpr int64_t kWantedBlocks = 528;  // of the weight's gradient; a constant, so that sums never depend on the GPU
constexpr int kHiddenStep = kHiddenOfTile + 4;  // channels of W are the columns: hidden channels are the inner index
constexpr int kBlockStep = kChannels + 8;       // also where positions are the inner index

template <class T>
struct GradientTask {
  View<const T> seg;
  View<const T> grad;
  View<T> out;
  Access access;
  Grid grid;
  const float* scale;
  Context context;
  bool whole_weights;
  HiddenGradient hidden;
  StatisticsGradient gradient;
  const float* mean;
};

// Bit d: a position has a successor along axis d; bit 3 + d: a predecessor.
__device__ inline unsigned neighbours(const Shape& shape, int64_t n) {
  const int64_t *size = shape.size, row = n / size[2];
  const int64_t at[3] = {row / size[1], row % size[1], n % size[2]};
  unsigned bits = 0;
  for (int d = 0; d < 3; ++d) bits |= unsigned(at[d] + 1 < size[d]) << d | unsigned(at[d] > 0) << (3 + d);
  return bits;
}

__device__ inline float sign(float x) {
  return float(x > 0) - float(x < 0);
}

// d(sum of |forward differences|) / d(the value at `slot`)
template <class T>
__device__ float edge_slope(const View<const T>& seg, const Region<const T>& region, const SharedTile& tile,
                            const Live& live, const Slot& slot, unsigned bits) {
  const int64_t *size = seg.shape.size, area = size[1] * size[2];
  const int step[3] = {int(area < kPositions ? area : kPositions), int(size[2] < kPositions ? size[2] : kPositions), 1};
  const int c = slot.channel, p = slot.position;
  const float here = *tile.at(c, p);
  float slope = 0;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (bits >> d & 1) {
      const float next =
          p + step[d] < live.positions ? *tile.at(c, p + step[d]) : to_float(region.at(c, p)[seg.spatial_stride[d]]);
      slope -= sign(next - here);
    }
    if (bits >> (3 + d) & 1) {
      const float previous =
          p >= step[d] ? *tile.at(c, p - step[d]) : to_float(region.at(c, p)[-seg.spatial_stride[d]]);
      slope += sign(here - previous);
    }
  }
  return slope;
}

// Leaves in `result` the product of the hidden layer's gradient with W, for the channels of `place`.
template <class T>
__device__ void multiply_weights(const GradientTask<T>& task, const Place& place, const Live& live,
                                 float (&operands)[kPositions * kHiddenStep + kHiddenOfTile * kBlockStep],
                                 const SharedTile& result) {
  float *left = operands, *right = operands + kPositions * kHiddenStep;
  const int64_t channels = task.seg.shape.channels, channel = place.chunk * kChannels;
  const int warp = threadIdx.x / 32;
  float product[1][kChannels / 8][4] = {};
  for (int64_t j = 0; j < task.hidden.hidden; j += kHiddenOfTile) {
    const int count = rest(task.hidden.hidden, j, kHiddenOfTile);
    __syncthreads();
    load_hidden_gradient(task.hidden, task.seg.shape, place, live.positions, j, left, kHiddenStep);
    load_weights({task.context.weight + (j * channels + channel), channels, count, live.channels}, task.whole_weights,
                 kHiddenOfTile, right, kBlockStep);
    __syncthreads();
    if (warp * 16 < live.positions)
      multiply<false, false>(product, Operand{left + warp * 16 * kHiddenStep, kHiddenStep, 1},
                             Operand{right, 1, kBlockStep}, (count + 7) / 8 * 8, live.channels);
  }
  __syncthreads();
  const int position = warp * 16 + threadIdx.x % 32 / 4, channel_of_lane = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kChannels / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) *result.at(n * 8 + channel_of_lane + i % 2, position + i / 2 * 8) = product[0][n][i];
}

template <class T>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const __grid_constant__ GradientTask<T> task) {
  __shared__ int64_t offset[3][kPositions];
  __shared__ uint8_t links[kPositions];
  alignas(16) __shared__ float values[kRightTileSize];
  alignas(16) __shared__ float operands[kPositions * kHiddenStep + kHiddenOfTile * kBlockStep];
  const Shape& shape = task.seg.shape;
  const Place place = task.grid.place(task.grid.blocks() - 1 - blockIdx.x);  // backwards, as in apply.cu
  const int64_t channel = place.chunk * kChannels, begin = place.tile * kPositions;
  const Live live = live_at(shape, place);
  const bool channels_inner = task.access.channels_inner;
  locate(task.seg, begin, offset[0]);
  locate(task.grad, begin, offset[1]);
  locate(task.out, begin, offset[2]);
  for (int p = threadIdx.x; p < live.positions; p += kThreads) links[p] = uint8_t(neighbours(shape, begin + p));
  __syncthreads();
  const auto seg = region_of(task.seg, place.sample, channel, offset[0]);
  const SharedTile tile = right_tile(values, channels_inner), result = right_tile(operands, channels_inner);
  load_tile<T>(seg, task.access, live, tile);
  multiply_weights(task, place, live, operands, result);
  __syncthreads();

  const int64_t row = place.sample * shape.channels + channel;
  const float share = 1.0f / float(positions_of(shape));
  const StatisticsGradient& gradient = task.gradient;
  const float of_edges = gradient.edges ? gradient.edges[place.sample] * share / float(shape.channels) : 0;
#pragma unroll 2
  for (int i = threadIdx.x; i < kPositions * kChannels; i += kThreads) {
    const Slot slot = slot_of<1>(i, channels_inner);
    if (!live.has(slot)) continue;
    const int64_t c = row + slot.channel;
    float sum = gradient.mean[c] * share;
    // subtracting the mean before the multiplication: after it the terms would cancel
    if (gradient.variance)
      sum += 2 * share * gradient.variance[c] * (*tile.at(slot.channel, slot.position) - task.mean[c]);
    if (gradient.edges) sum += of_edges * edge_slope(task.seg, seg, tile, live, slot, links[slot.position]);
    *result.at(slot.channel, slot.position) += sum;
  }
  __syncthreads();

  const auto grad = region_of(task.grad, place.sample, channel, offset[1]);
  const auto out = region_of(task.out, place.sample, channel, offset[2]);
  with_width<T>(task.access.width, [&](auto width) {
    constexpr int V = decltype(width)::value;
#pragma unroll 1
    for (int round = 0; round < Share<V>::kRounds; ++round) {
      Share<V> up = load_share<V, T>(grad, channels_inner, round, live);
      for_each_slot<V>(channels_inner, round, [&](int i, const Slot& slot) {
        if (!live.has(slot)) return;
        const Pack<float, V> rest = load_shared<V>(result.at(slot.channel, slot.position));
#pragma unroll
        for (int e = 0; e < V; ++e)
          up.pack[i].values[e] =
              up.pack[i].values[e] * task.scale[row + slot.channel + (channels_inner ? e : 0)] + rest.values[e];
        store<V>(out.at(slot.channel, slot.position), up.pack[i]);
      });
    }
  });
}

template <class T>
struct WeightTask {
  View<const T> seg;
  Access access;
  HiddenGradient hidden;
  int64_t tiles;   // of positions, in a sample
  int64_t splits;  // of all tiles of the batch
  Grid blocks;     // splits, blocks of hidden channels, blocks of channels
  float* weight;   // [splits, hidden, C]
  float* bias;     // [splits, hidden]
};

// A block sums over the positions of its split; its warps share every tile between them.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_kernel(const __grid_constant__ WeightTask<T> task) {
  __shared__ int64_t offset[kPositions];
  alignas(16) __shared__ float values[kRightTileSize];
  alignas(16) __shared__ float gradient[kPositions * kBlockStep];
  constexpr int kSlice = kPositions / kWarps;
  const Shape& shape = task.seg.shape;
  const Place block = task.blocks.place(blockIdx.x);
  const int64_t split = block.sample, hidden = block.tile * kHiddenOfTile, channel = block.chunk * kChannels;
  const int64_t all = shape.batch * task.tiles;
  const int columns = rest(shape.channels, channel, kChannels), rows = rest(task.hidden.hidden, hidden, kHiddenOfTile);
  const int warp = threadIdx.x / 32;
  const SharedTile tile = right_tile(values, task.access.channels_inner);
  float product[kHiddenOfTile / 16][kChannels / 8][4] = {};
  float bias = 0;
  for (int64_t index = split * all / task.splits; index < (split + 1) * all / task.splits; ++index) {
    const Place place{index / task.tiles, index % task.tiles, block.chunk};
    const Live live = live_at(shape, place);
    __syncthreads();
    locate(task.seg, place.tile * kPositions, offset);
    load_hidden_gradient(task.hidden, shape, place, live.positions, hidden, gradient, kBlockStep);
    __syncthreads();
    load_tile<T>(region_of(task.seg, place.sample, channel, offset), task.access, live, tile);
    __syncthreads();
    multiply<false, !std::is_same_v<T, float>>(
        product, Operand{gradient + warp * kSlice * kBlockStep, 1, kBlockStep},
        Operand{tile.data + warp * kSlice * tile.position_step, tile.channel_step, tile.position_step}, kSlice,
        columns);
    if (block.chunk != 0 || int(threadIdx.x) >= rows) continue;
    float sum = 0;
    for (int p = 0; p < live.positions; ++p) sum += gradient[p * kBlockStep + threadIdx.x];
    bias += sum;
  }
  if (block.chunk == 0 && int(threadIdx.x) < rows) task.bias[split * task.hidden.hidden + hidden + threadIdx.x] = bias;

  float* sum = gradient;  // [kHiddenOfTile, kChannels]
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int turn = 0; turn < kWarps; ++turn) {
    __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int m = 0; m < kHiddenOfTile / 16; ++m)
#pragma unroll
      for (int n = 0; n < kChannels / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& target = sum[(m * 16 + row + i / 2 * 8) * kChannels + n * 8 + column + i % 2];
          target = turn == 0 ? product[m][n][i] : target + product[m][n][i];
        }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kChannels; i += kThreads) {
    const int j = i / kChannels, c = i % kChannels;
    if (c < columns) task.weight[(split * task.hidden.hidden + hidden + j) * shape.channels + channel + c] = sum[i];
  }
}

struct Workspace {
  int64_t splits;
  int64_t hidden_blocks;
  int64_t channel_blocks;
  // sizes in floats
  int64_t weight;
  int64_t bias;
  int64_t softmax;

  Workspace(const Shape& shape, int64_t hidden, bool softmax_pooling) {
    const int64_t tiles = shape.batch * tiles_of(shape);
    hidden_blocks = divide_up(hidden, kHiddenOfTile);
    channel_blocks = divide_up(shape.channels, kChannels);
    splits = std::min(tiles, divide_up(kWantedBlocks, std::max<int64_t>(1, hidden_blocks * channel_blocks)));
    weight = splits * hidden * shape.channels;
    bias = splits * hidden;
    softmax = softmax_pooling ? softmax_gradient_workspace(shape, hidden) : 0;
  }
};

}  // namespace

int64_t statistics_backward_workspace(const Shape& shape, int64_t hidden, bool softmax) {
  const Workspace sizes(shape, hidden, softmax);
  return sizes.weight + sizes.bias + sizes.softmax;
}

void statistics_backward(const BackwardInputs& in, const Tensor& out, const ContextGradient& context_gradient,
                         float* workspace, void* stream) {
  const Shape& shape = in.seg.view.shape;
  const int64_t hidden = in.context.hidden;
  const bool softmax = in.context.pool_weight;
  const Workspace sizes(shape, hidden, softmax);
  float *weight = workspace, *bias = weight + sizes.weight, *rest = bias + sizes.bias;
  HiddenGradient source{hidden, in.saved.active, in.gradient.pooled, nullptr};
  if (softmax) source.values = softmax_gradient(in, context_gradient.pool_weight, rest, stream);
  with_type(in.seg.type, [&](auto value) {
    using T = decltype(value);
    const View<const T> seg = typed<const T>(in.seg), grad = typed<const T>(in.grad);
    if (hidden) {
      const Grid blocks{sizes.splits, sizes.hidden_blocks, sizes.channel_blocks};
      launch<WeightTask<T>>(
          {"context_weight_gradient", blocks.blocks(), kThreads, stream}, weight_kernel<T>,
          {seg, access_for<const T>({seg}), source, tiles_of(shape), sizes.splits, blocks, weight, bias});
      sum_parts({weight, 1, sizes.splits, hidden * shape.channels}, context_gradient.weight, stream);
      sum_parts({bias, 1, sizes.splits, hidden}, context_gradient.bias, stream);
    }
    const Grid grid = channel_grid_of(shape);
    const Access access = access_for<const T>({seg, grad, typed<const T>(out)});
    launch<GradientTask<T>>({"statistics_backward", grid.blocks(), kThreads, stream}, gradient_kernel<T>,
                            {seg, grad, typed<T>(out), access, grid, in.scale, in.context,
                             weights_are_whole(in.context, shape.channels), source, in.gradient, in.saved.mean});
  });
}

}  // namespace cuda
}  // namespace btinet
