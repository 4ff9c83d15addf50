// The kernels, compiled once per instruction set (common/isa_*.h).
#pragma once

#include "../common/simd.h"

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kCounters = 16;          // side by side in memory
constexpr int64_t kBlock = 4 * kCounters;  // values that take all words of these

// Words, as many as a vector of float has.
using Words = Lanes<float>::bits;
constexpr int64_t kWords = Lanes<float>::count;

// The upper and lower halves of the products with one factor.
inline void multiply_words(Words words, uint32_t factor, Words& high, Words& low) {
#if BTINET_VECTOR_BYTES == 64
  using Pairs = Lanes<double>::bits;
  const __m512i b = _mm512_set1_epi64(factor);  // GCC 12 warns of the forms without a mask
  const Pairs even = Pairs(_mm512_maskz_mul_epu32(0xff, __m512i(words), b));
  const Pairs odd = Pairs(_mm512_maskz_mul_epu32(0xff, __m512i(Pairs(words) >> 32), b));
  high = Words(_mm512_mask_blend_epi32(0xaaaa, __m512i(even >> 32), __m512i(odd)));
  low = Words(_mm512_mask_blend_epi32(0xaaaa, __m512i(even), __m512i(odd << 32)));
#elif BTINET_VECTOR_BYTES == 32
  const __m256i a = __m256i(words), b = _mm256_set1_epi64x(factor);
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  high = Words(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  low = Words(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  uint32_t upper[kWords], lower[kWords];
  for (int64_t i = 0; i < kWords; ++i) {
    const uint64_t product = uint64_t(words[i]) * factor;
    upper[i] = uint32_t(product >> 32);
    lower[i] = uint32_t(product);
  }
  std::memcpy(&high, upper, sizeof(high));
  std::memcpy(&low, lower, sizeof(low));
#endif
}

// The four words of the counters from `first` on, which is a multiple of their number.
inline void philox(uint64_t first, uint64_t seed, Words (&words)[4]) {
  Words lane = {};
  for (int64_t i = 0; i < kWords; ++i) lane[i] = uint32_t(i);
  words[0] = lane + uint32_t(first);
  words[1] = Words{} + uint32_t(first >> 32);
  words[2] = words[3] = Words{};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    Words high[2], low[2];
    multiply_words(words[0], 0xd2511f53u, high[0], low[0]);
    multiply_words(words[2], 0xcd9e8d57u, high[1], low[1]);
    words[0] = high[1] ^ words[1] ^ key[0];
    words[1] = low[1];
    words[2] = high[0] ^ words[3] ^ key[1];
    words[3] = low[0];
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
}

// `value` in the lanes whose word of `kept` is all ones, 0 where it is 0.
template <class T>
inline Vector<T> masked(Vector<T> value, const uint32_t* kept) {
  typedef int32_t Mask __attribute__((vector_size(Lanes<T>::count * sizeof(int32_t)), may_alias));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Wide __attribute__((vector_size(BTINET_VECTOR_BYTES)));
  Mask mask;
  std::memcpy(&mask, kept, sizeof(mask));
  return Vector<T>(typename Lanes<T>::bits(value) & typename Lanes<T>::bits(__builtin_convertvector(mask, Wide)));
}

template <class S>
void dropout(const S* x, int64_t count, const Drop& drop, S* out, int threads) {
  using T = Compute<S>;
  const T factor = T(drop.factor);
  const bool all = drop.threshold >> 32;
  const uint32_t threshold = uint32_t(drop.threshold);
  const int64_t blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) {
    uint32_t kept[kBlock];
    for (int64_t lane = 0; lane < kCounters; lane += kWords) {
      Words words[4];
      philox(uint64_t(block * kCounters + lane), drop.seed, words);
      for (int j = 0; j < 4; ++j) {
        const Words bits = all ? Words{} : Words(words[j] >= threshold);
        std::memcpy(&kept[j * kCounters + lane], &bits, sizeof(bits));
      }
    }
    const S* from = x + block * kBlock;
    S* to = out + block * kBlock;
    for_each_vector<T>(std::min(kBlock, count - block * kBlock), [&](int64_t i, auto part) {
      store(to + i, masked<T>(load(from + i, part) * factor, &kept[i]), part);
    });
  }
}

BTINET_INSTANTIATE_DROPOUT(float)
BTINET_INSTANTIATE_DROPOUT(double)
BTINET_INSTANTIATE_DROPOUT(bfloat16)

}  // namespace BTINET_ISA
}  // namespace btinet
