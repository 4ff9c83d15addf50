#include "columns.cuh"
#include "hidden.cuh"
#include "launch.h"

#include <algorithm>

namespace btinet {
namespace cuda {
namespace {

constexpr int64_t kWantedBlocks = 528;  // small batches cut the hidden layer finer until there are so many

// Of each tile of positions.
struct Partials {
  float* shift;      // [B, tiles, C], a value of the tile ...
  float* offset;     // [B, tiles, C], ... and the mean's distance from it: together more exact than one float32
  float* deviation;  // [B, tiles, C], sum of squared differences from that mean
  float* edges;      // [B, tiles], sum of |forward differences|
  float* pooled;     // [B, tiles, hidden], sums with the shares exp(logit - top)
  float* top;        // [B, tiles], the largest logit
  float* share;      // [B, tiles], sum of the shares
};

Partials partials_in(float* workspace, const Shape& shape) {
  const int64_t tiles = shape.batch * tiles_of(shape);
  Partials result;
  result.shift = workspace;
  result.offset = result.shift + tiles * shape.channels;
  result.deviation = result.offset + tiles * shape.channels;
  result.edges = result.deviation + tiles * shape.channels;
  result.top = result.edges + tiles;
  result.share = result.top + tiles;
  result.pooled = result.share + tiles;
  return result;
}

template <class T>
struct StatisticsTask {
  HiddenLayer<T> layer;
  Grid grid;
  int columns;  // of the hidden layer that a block computes at a time
  bool variance, edges;
  Partials partials;
  uint8_t* active;
};

// Bit d is set where a position has a successor along axis d.
__device__ inline unsigned successors(const Shape& shape, int64_t n) {
  const int64_t *size = shape.size, row = n / size[2];
  return unsigned(row / size[1] + 1 < size[0]) | unsigned(row % size[1] + 1 < size[1]) << 1 |
         unsigned(n % size[2] + 1 < size[2]) << 2;
}

// Writes the moments of the channels in `tile` and returns this thread's part of the edge sum.
template <class T>
__device__ float reduce_tile(const StatisticsTask<T>& task, const Place& place, const Live& live,
                             const SharedTile& tile, const Region<const T>& region, const uint8_t* has_next,
                             int64_t first) {
  const View<const T>& seg = task.layer.seg;
  const int64_t *size = seg.shape.size, area = size[1] * size[2];
  const int step[3] = {int(area < kPositions ? area : kPositions), int(size[2] < kPositions ? size[2] : kPositions), 1};
  const LaneGrid lane(task.layer.access.channels_inner);
  const int64_t row = (place.sample * task.grid.tiles + place.tile) * seg.shape.channels + first;
  float edges = 0;
  for (int begin = threadIdx.x / 32 * lane.channels; begin < live.channels; begin += kWarps * lane.channels) {
    const int c = begin + lane.channel;
    const float shift = *tile.at(c, 0);
    float sum = 0;
    for (int p = lane.position; p < live.positions; p += lane.positions) {
      const float here = *tile.at(c, p);
      sum += here - shift;
      if (!task.edges || c >= live.channels) continue;
#pragma unroll
      for (int d = 0; d < 3; ++d) {
        if (!(has_next[p] >> d & 1)) continue;
        const float next =
            p + step[d] < live.positions ? *tile.at(c, p + step[d]) : to_float(region.at(c, p)[seg.spatial_stride[d]]);
        edges += fabsf(next - here);
      }
    }
    const float offset = lane.sum_of_channel(sum) / live.positions;
    const bool writes = lane.position == 0 && c < live.channels;
    if (writes) {
      task.partials.shift[row + c] = shift;
      task.partials.offset[row + c] = offset;
    }
    if (!task.variance) continue;
    float square = 0;
    for (int p = lane.position; p < live.positions; p += lane.positions) {
      const float difference = (*tile.at(c, p) - shift) - offset;
      square += difference * difference;
    }
    square = lane.sum_of_channel(square);
    if (writes) task.partials.deviation[row + c] = square;
  }
  return edges;
}

// Four lanes hold the 8 hidden channels of a byte; `active` points to the tile's first position.
__device__ inline void store_active(const Hidden& hidden, const Columns& columns, int positions, int64_t stride,
                                    uint8_t* active) {
  const LaneOfProduct lane;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    if (n * 8 >= columns.count) break;
    unsigned bits = 0;  // of the lane's first position in the low byte, of its second one above
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= unsigned(hidden[0][n][i] > 0) << (i / 2 * 8 + lane.column + i % 2);
    for (int mask = 1; mask <= 2; mask *= 2) bits |= __shfl_xor_sync(~0u, bits, mask);
    if (lane.column != 0) continue;
    uint8_t* byte = active + (columns.begin / 8 + n);
    if (lane.position < positions) byte[lane.position * stride] = uint8_t(bits);
    if (lane.position + 8 < positions) byte[(lane.position + 8) * stride] = uint8_t(bits >> 8);
  }
}

template <class T, bool kSoftmax>
__global__ void __launch_bounds__(kThreads, kSoftmax ? 2 : 3)
    statistics_kernel(const __grid_constant__ StatisticsTask<T> task) {
  __shared__ HiddenMemory memory;
  __shared__ uint8_t has_next[kPositions];
  const Shape& shape = task.layer.seg.shape;
  const Context& context = task.layer.context;
  const Place place = task.grid.place(blockIdx.x);
  const int64_t begin = place.tile * kPositions, tile_index = place.sample * task.grid.tiles + place.tile;
  const int positions = live_at(shape, place).positions;
  locate(task.layer.seg, begin, memory.offset);
  for (int p = threadIdx.x; p < positions; p += kThreads) has_next[p] = uint8_t(successors(shape, begin + p));

  Hidden hidden;
  float edges = 0;
  const auto compute = [&](const Columns& columns, bool first) {
    compute_hidden(
        task.layer, place, columns, memory, hidden, [&](int64_t channel, const Live& live, const SharedTile& tile) {
          if (first)
            edges += reduce_tile(task, place, live, tile,
                                 region_of(task.layer.seg, place.sample, channel, memory.offset), has_next, channel);
        });
  };
  const auto columns_at = [&](int64_t begin) { return Columns{begin, rest(context.hidden, begin, task.columns)}; };
  float* pooled = task.partials.pooled + tile_index * context.hidden;

  if (!kSoftmax) {
    const Columns columns = columns_at(place.chunk * task.columns);
    compute(columns, place.chunk == 0);
    pool(hidden, {1, 1}, columns, memory, pooled + columns.begin);
    const int64_t bytes = (context.hidden + 7) / 8;
    if (task.active)
      store_active(hidden, columns, positions, bytes,
                   task.active + (place.sample * positions_of(shape) + begin) * bytes);
  } else {
    const LaneOfProduct lane;
    float logit[2] = {}, share[2] = {};
    for (int sweep = 0; sweep < 2; ++sweep) {
      for (int64_t j = 0; j < context.hidden; j += task.columns) {
        if (sweep == 0 || task.columns < context.hidden) compute(columns_at(j), sweep == 0 && j == 0);
        if (sweep == 0) {
          add_dot(hidden, context.pool_weight, columns_at(j), logit);
        } else {
          pool(hidden, share, columns_at(j), memory, pooled + j);
        }
      }
      if (sweep > 0) break;
      float top = -INFINITY;
      for (int i = 0; i < 2; ++i)
        if (lane.position + i * 8 < positions) top = fmaxf(top, logit[i]);
      for (int mask = 4; mask <= 16; mask *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
      if (threadIdx.x % 32 == 0) memory.of_warps[0][lane.warp] = top;
      __syncthreads();
      for (int warp = 0; warp < kWarps; ++warp) top = fmaxf(top, memory.of_warps[0][warp]);
      for (int i = 0; i < 2; ++i)
        if (lane.position + i * 8 < positions) share[i] = expf(logit[i] - top);
      // the four lanes of a position hold the same share
      const float sum = sum_of_block(lane.column == 0 ? share[0] + share[1] : 0, memory.of_warps[1]);
      if (threadIdx.x == 0) {
        task.partials.top[tile_index] = top;
        task.partials.share[tile_index] = sum;
      }
    }
  }
  if (task.edges && place.chunk == 0) {
    const float sum = sum_of_block(edges, memory.of_warps[0]);
    if (threadIdx.x == 0) task.partials.edges[tile_index] = sum;
  }
}

struct CombineTask {
  Partials partials;
  Statistics out;
  Shape shape;
  int64_t hidden;
  int64_t tiles;
  int64_t chunks;
};

__device__ inline void combine_moments(const CombineTask& task, int64_t sample, int64_t channel, int first) {
  const int64_t channels = task.shape.channels, count = positions_of(task.shape);
  const int64_t begin = sample * task.tiles * channels + channel;
  const bool exists = channel < channels;
  const double origin = exists ? task.partials.shift[begin] : 0;
  double sum = 0, square = 0;
  if (exists)
#pragma unroll 4
    for (int64_t tile = first; tile < task.tiles; tile += kPartsOfBlock) {
      const int rows = rest(count, tile * kPositions, kPositions);
      const int64_t at = begin + tile * channels;
      const double difference = task.partials.shift[at] - origin + task.partials.offset[at];
      sum += rows * difference;
      if (task.out.variance) square += task.partials.deviation[at] + rows * difference * difference;
    }
  sum = across_parts(sum, Add{}) / count;
  square = across_parts(square, Add{}) / count - sum * sum;
  if (!exists || first != 0) return;
  task.out.mean[sample * channels + channel] = float(origin + sum);
  if (task.out.variance)
    task.out.variance[sample * channels + channel] = float(square > 0 || square != square ? square : 0);
}

__device__ inline void combine_pooled(const CombineTask& task, int64_t sample, int64_t column, int first) {
  const bool softmax = task.out.log_sum_exp;
  const float* top = task.partials.top + sample * task.tiles;
  double highest = 0, total = positions_of(task.shape);
  if (softmax) {
    highest = -INFINITY;
    for (int64_t tile = first; tile < task.tiles; tile += kPartsOfBlock) highest = Larger{}(highest, top[tile]);
    highest = across_parts(highest, Larger{});
    total = 0;
    for (int64_t tile = first; tile < task.tiles; tile += kPartsOfBlock)
      total += task.partials.share[sample * task.tiles + tile] * exp(top[tile] - highest);
    total = across_parts(total, Add{});
    if (column == 0 && first == 0) task.out.log_sum_exp[sample] = float(highest + log(total));
  }
  double sum = 0;
  if (column < task.hidden) {
    const float* pooled = task.partials.pooled + (sample * task.tiles * task.hidden + column);
#pragma unroll 4
    for (int64_t tile = first; tile < task.tiles; tile += kPartsOfBlock)
      sum += pooled[tile * task.hidden] * (softmax ? exp(top[tile] - highest) : 1.0);
  }
  sum = across_parts(sum, Add{});
  if (column < task.hidden && first == 0) task.out.pooled[sample * task.hidden + column] = float(sum / total);
}

__global__ void __launch_bounds__(kReduceThreads) combine_kernel(const __grid_constant__ CombineTask task) {
  const int64_t sample = blockIdx.x / task.chunks, chunk = blockIdx.x % task.chunks;
  const int64_t column = chunk * kColumnsOfBlock + threadIdx.x % kColumnsOfBlock;
  const int first = threadIdx.x / kColumnsOfBlock;
  combine_moments(task, sample, column, first);
  if (task.hidden) combine_pooled(task, sample, column, first);
  if (!task.out.edges || chunk != 0) return;
  double sum = 0;
  for (int64_t tile = threadIdx.x; tile < task.tiles; tile += kReduceThreads)
    sum += task.partials.edges[sample * task.tiles + tile];
  sum = across_block(sum, Add{});
  if (threadIdx.x == 0) task.out.edges[sample] = float(sum / (double(task.shape.channels) * positions_of(task.shape)));
}

// As many hidden channels a block as leave enough blocks, and no fewer than one group of products.
int columns_for(const Grid& tiles, int64_t hidden) {
  int columns = kColumns;
  while (columns > 8 * kGroup && tiles.blocks() * divide_up(hidden, columns) < kWantedBlocks) columns /= 2;
  return columns;
}

}  // namespace

int64_t statistics_workspace(const Shape& shape, int64_t hidden) {
  return shape.batch * tiles_of(shape) * (3 * shape.channels + 3 + hidden);
}

void statistics(const Tensor& seg, const Context& context, const Statistics& out, float* workspace, void* stream) {
  const Shape& shape = seg.view.shape;
  const Partials partials = partials_in(workspace, shape);
  const Grid tiles = grid_of(shape, 1);
  const bool softmax = context.pool_weight;
  const int columns = softmax ? kColumns : columns_for(tiles, context.hidden);
  const int64_t chunks = softmax ? 1 : std::max<int64_t>(1, divide_up(context.hidden, columns));
  const Grid grid = grid_of(shape, chunks);
  with_type(seg.type, [&](auto value) {
    using T = decltype(value);
    const StatisticsTask<T> task{HiddenLayer<T>(seg, context), grid,     columns,   out.variance != nullptr,
                                 out.edges != nullptr,         partials, out.active};
    launch<StatisticsTask<T>>({"statistics", grid.blocks(), kThreads, stream},
                              softmax ? statistics_kernel<T, true> : statistics_kernel<T, false>, task);
  });
  const int64_t columns_of_combine = divide_up(std::max(shape.channels, context.hidden), kColumnsOfBlock);
  launch<CombineTask>({"combine_statistics", shape.batch * columns_of_combine, kReduceThreads, stream}, combine_kernel,
                      {partials, out, shape, context.hidden, tiles_of(shape), columns_of_combine});
}

}  // namespace cuda
}  // namespace btinet
