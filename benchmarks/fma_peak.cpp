// Multiply-adds on registers only: the rate no kernel can exceed. Each call runs on the thread that makes it.

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int chains = 12;  // more than latency × units of today's cores, few enough for 16 registers

// Returns the floating-point operations done; `sink` keeps the compiler from dropping them.
extern "C" double multiply_add(long iterations, float* sink) {
  vector sum[chains];
  for (int k = 0; k < chains; ++k) sum[k] = vector{} + static_cast<float>(k);
  vector factor = vector{} + 0.9999f;
  vector term = vector{} + 0.0001f;
  for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < chains; ++k) sum[k] = sum[k] * factor + term;
  }
  vector total{};
  for (int k = 0; k < chains; ++k) total += sum[k];
  *sink = total[0];
  return 2.0 * chains * (VECTOR_BYTES / sizeof(float)) * static_cast<double>(iterations);
}
