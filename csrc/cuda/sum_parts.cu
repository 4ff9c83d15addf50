#include "sum_parts.h"

#include "columns.cuh"
#include "launch.h"
#include "tile.cuh"

namespace btinet {
namespace cuda {
namespace {

struct SumTask {
  Parts parts;
  int64_t chunks;
  float* out;
};

__global__ void __launch_bounds__(kReduceThreads) sum_parts_kernel(SumTask task) {
  const Parts& parts = task.parts;
  const int64_t group = blockIdx.x / task.chunks;
  const int64_t column = blockIdx.x % task.chunks * kColumnsOfBlock + threadIdx.x % kColumnsOfBlock;
  const int first = threadIdx.x / kColumnsOfBlock;
  double sum = 0;
  if (column < parts.width) {
    const float* values = parts.values + (group * parts.count * parts.width + column);
#pragma unroll 4
    for (int64_t part = first; part < parts.count; part += kPartsOfBlock) sum += values[part * parts.width];
  }
  sum = across_parts(sum, Add{});
  if (column < parts.width && first == 0) task.out[group * parts.width + column] = float(sum);
}

}  // namespace

void sum_parts(const Parts& parts, float* out, void* stream) {
  const int64_t chunks = divide_up(parts.width, kColumnsOfBlock);
  launch<SumTask>({"sum_parts", parts.groups * chunks, kReduceThreads, stream}, sum_parts_kernel, {parts, chunks, out});
}

}  // namespace cuda
}  // namespace btinet
