#include "softmax_gradient.h"

#include "hidden.cuh"
#include "launch.h"
#include "sum_parts.h"

namespace btinet {
namespace cuda {
namespace {

template <class T>
struct SoftmaxTask {
  HiddenLayer<T> layer;
  Grid grid;
  const float* pooled;           // [B, hidden]
  const float* log_sum_exp;      // [B]
  const float* pooled_gradient;  // [B, hidden]
  float* values;                 // [B, N, hidden], gradient of W D + w0
  float* pool_weight;            // [B, tiles, hidden], partial sums of the pooling weight's gradient
};

// Writes where a position's share and the slope of its logit lead: ReLU'(...) (share * pooled' + slope * v).
template <class T>
__device__ void store_values(const SoftmaxTask<T>& task, const Place& place, const Columns& columns,
                             const Hidden& hidden, const float (&share)[2], const float (&slope)[2], int positions) {
  const Context& context = task.layer.context;
  const LaneOfProduct lane;
  const float* gradient = task.pooled_gradient + (place.sample * context.hidden + columns.begin);
  const float* weight = context.pool_weight + columns.begin;
  const int64_t first = place.sample * positions_of(task.layer.seg.shape) + place.tile * kPositions;
  float* values = task.values + (first * context.hidden + columns.begin);
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = n * 8 + lane.column + i % 2, p = lane.position + i / 2 * 8;
      if (j < columns.count && p < positions)
        values[p * context.hidden + j] =
            hidden[0][n][i] > 0 ? share[i / 2] * gradient[j] + slope[i / 2] * weight[j] : 0;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) softmax_gradient_kernel(const __grid_constant__ SoftmaxTask<T> task) {
  __shared__ HiddenMemory memory;
  const Context& context = task.layer.context;
  const Place place = task.grid.place(blockIdx.x);
  const int positions = live_at(task.layer.seg.shape, place).positions;
  const float* gradient = task.pooled_gradient + place.sample * context.hidden;
  locate(task.layer.seg, place.tile * kPositions, memory.offset);
  float mean = 0;
  for (int64_t j = threadIdx.x; j < context.hidden; j += kThreads)
    mean += gradient[j] * task.pooled[place.sample * context.hidden + j];
  mean = sum_of_block(mean, memory.of_warps[0]);

  Hidden hidden;
  float logit[2] = {}, dot[2] = {}, share[2], slope[2];
  for (int sweep = 0; sweep < 2; ++sweep) {
    for (int64_t j = 0; j < context.hidden; j += kColumns) {
      const Columns columns{j, rest(context.hidden, j, kColumns)};
      if (sweep == 0 || kColumns < context.hidden)
        compute_hidden(task.layer, place, columns, memory, hidden, [](int64_t, const Live&, const SharedTile&) {});
      if (sweep == 0) {
        add_dot(hidden, context.pool_weight, columns, logit);
        add_dot(hidden, gradient, columns, dot);
      } else {
        pool(hidden, slope, columns, memory,
             task.pool_weight + (place.sample * task.grid.tiles + place.tile) * context.hidden + j);
        store_values(task, place, columns, hidden, share, slope, positions);
      }
    }
    for (int i = 0; i < 2; ++i) {
      share[i] = expf(logit[i] - task.log_sum_exp[place.sample]);
      slope[i] = share[i] * (dot[i] - mean);
    }
  }
}

}  // namespace

int64_t softmax_gradient_workspace(const Shape& shape, int64_t hidden) {
  return shape.batch * (shape.positions() + tiles_of(shape) + 1) * hidden;
}

const float* softmax_gradient(const BackwardInputs& in, float* pool_weight_gradient, float* workspace, void* stream) {
  const Shape& shape = in.seg.view.shape;
  const int64_t hidden = in.context.hidden;
  const Grid grid = grid_of(shape, 1);
  float *values = workspace, *of_tiles = values + shape.batch * shape.positions() * hidden;
  float* of_samples = of_tiles + grid.blocks() * hidden;
  with_type(in.seg.type, [&](auto value) {
    using T = decltype(value);
    const SoftmaxTask<T> task{HiddenLayer<T>(in.seg, in.context),
                              grid,
                              in.saved.pooled,
                              in.saved.log_sum_exp,
                              in.gradient.pooled,
                              values,
                              of_tiles};
    launch<SoftmaxTask<T>>({"softmax_gradient", grid.blocks(), kThreads, stream}, softmax_gradient_kernel<T>, task);
  });
  sum_parts({of_tiles, grid.samples, grid.tiles, hidden}, of_samples, stream);
  sum_parts({of_samples, 1, grid.samples, hidden}, pool_weight_gradient, stream);
  return values;
}

}  // namespace cuda
}  // namespace btinet
