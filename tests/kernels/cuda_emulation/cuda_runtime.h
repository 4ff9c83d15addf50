// As much of CUDA as the kernels use, on the host: blocks run one after another, the threads of a block as fibers that
// take turns at barriers. The order of the turns is a choice: results that depend on it reveal a missing barrier.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define threadIdx (emulation::current().thread)
#define blockIdx (emulation::current().block)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

template <class Task>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Task), const Task& task) {
  for (unsigned block = 0; block < config->gridDim.x; ++block)
    emulation::run_block(block, config->blockDim.x, [&] { kernel(task); });
  return cudaSuccess;
}

inline void __syncthreads() {
  emulation::block_barrier();
}
inline void __syncwarp() {
  emulation::warp_barrier();
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, [&](const T* of_lanes, int lane) { return of_lanes[lane ^ mask]; });
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32, with the fragments of the PTX manual.
inline void emulated_mma_m16n8k8_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  emulation::exchange(mine, [&](const Fragments* of_lanes, int lane) {
    const auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
    const auto left = [&](int row, int k) { return tf32(of_lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); };
    const auto right = [&](int k, int column) { return tf32(of_lanes[column * 4 + k % 4].b[k / 4]); };
    for (int i = 0; i < 4; ++i) {
      double total = sum[i];
      for (int k = 0; k < 8; ++k) total += double(left(lane / 4 + i / 2 * 8, k)) * right(k, lane % 4 * 2 + i % 2);
      sum[i] = float(total);
    }
    return 0;
  });
}
