// Products of tiles in shared memory on the tensor cores. A float32 operand travels as two tf32 numbers, high and low,
// and low * low is dropped: about 2^-21 of each product. Operands that were stored in half precision fit into one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace btinet {
namespace cuda {

struct Split {
  uint32_t high;
  uint32_t low;
};

template <bool kExact>
__device__ inline Split split(float value) {
  constexpr uint32_t kKept = 0xffffe000u;  // sign, exponent and 10 bits of the fraction
  const uint32_t bits = __float_as_uint(value);
  if (kExact) return {bits, 0};
  const uint32_t high = (bits + 0x1000u) & kKept;
  return {high, __float_as_uint(value - __uint_as_float(high)) & kKept};
}

// sum[16 x 8] += a[16 x 8] b[8 x 8]. With g = lane / 4 and t = lane % 4 a lane holds of a (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4); of b (t, g), (t + 4, g); of sum (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated_mma_m16n8k8_tf32(sum, a, b);
#endif
}

// An operand in shared memory: its rows (left) or columns (right) are `outer_step` apart.
struct Operand {
  const float* data;
  int outer_step;
  int inner_step;
};

template <bool kExact, int kCount>
__device__ inline void read_fragment(const float* from, const int (&step)[kCount], uint32_t (&high)[kCount],
                                     uint32_t (&low)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Split both = split<kExact>(from[step[i]]);
    high[i] = both.high;
    low[i] = both.low;
  }
}

constexpr int kGroup = 3;  // tiles of 8 columns that take turns, so that no product waits for the one before

// sum[16 M x 8 N] += left right, over `inner` indices (a multiple of 8), for the first `columns` columns.
template <bool kLeftExact, bool kRightExact, int M, int N>
__device__ inline void multiply(float (&sum)[M][N][4], const Operand& left, const Operand& right, int inner,
                                int columns) {
  static_assert(N % kGroup == 0);
  __syncwarp();  // mma wants the warp in step
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int left_step[4] = {0, 8 * left.outer_step, 4 * left.inner_step, 8 * left.outer_step + 4 * left.inner_step};
  const int right_step[2] = {0, 4 * right.inner_step};
#pragma unroll 1
  for (int k = 0; k < inner; k += 8) {
    uint32_t left_high[M][4], left_low[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
      read_fragment<kLeftExact>(left.data + (m * 16 + g) * left.outer_step + (k + t) * left.inner_step, left_step,
                                left_high[m], left_low[m]);
#pragma unroll
    for (int first = 0; first < N; first += kGroup) {
      if (first * 8 >= columns) break;
      uint32_t right_high[kGroup][2], right_low[kGroup][2];
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        read_fragment<kRightExact>(right.data + ((first + i) * 8 + g) * right.outer_step + (k + t) * right.inner_step,
                                   right_step, right_high[i], right_low[i]);
#pragma unroll
      for (int term = 0; term < 3; ++term) {  // the small products first
        if ((term == 0 && kLeftExact) || (term == 1 && kRightExact)) continue;
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
#pragma unroll
          for (int m = 0; m < M; ++m)
            multiply_add(sum[m][first + i], term == 0 ? left_low[m] : left_high[m],
                         term == 1 ? right_low[i] : right_high[i]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace btinet
