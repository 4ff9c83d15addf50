// Blocks that reduce tables of partial results, column by column: 8 threads share a column, in a fixed order.
#pragma once

#include <cuda_runtime.h>

namespace btinet {
namespace cuda {

constexpr int kColumnsOfBlock = 32;
constexpr int kPartsOfBlock = 8;
constexpr int kReduceThreads = kColumnsOfBlock * kPartsOfBlock;

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};

struct Larger {
  __device__ double operator()(double a, double b) const { return b > a ? b : a; }
};

// Combines what the threads of one column hold; all of them get the result.
template <class F>
__device__ double across_parts(double value, const F& combine) {
  __shared__ double values[kPartsOfBlock][kColumnsOfBlock];
  const int column = threadIdx.x % kColumnsOfBlock;
  __syncthreads();
  values[threadIdx.x / kColumnsOfBlock][column] = value;
  __syncthreads();
  double result = values[0][column];
  for (int part = 1; part < kPartsOfBlock; ++part) result = combine(result, values[part][column]);
  return result;
}

// Combines what all threads of the block hold.
template <class F>
__device__ double across_block(double value, const F& combine) {
  double result = across_parts(value, combine);
  for (int mask = 1; mask < kColumnsOfBlock; mask *= 2) result = combine(result, __shfl_xor_sync(~0u, result, mask));
  return result;
}

}  // namespace cuda
}  // namespace btinet
