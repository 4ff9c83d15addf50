// Vectors of one instruction set, and how values are stored: float and double as they are, bfloat16 widened to float.
// Compiled once per instruction set: the including file has set BTINET_ISA and BTINET_VECTOR_BYTES.
#pragma once

namespace btinet {
namespace BTINET_ISA {

template <class T>
struct Lanes {
  static constexpr int64_t count = BTINET_VECTOR_BYTES / sizeof(T);
  typedef T vector __attribute__((vector_size(BTINET_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  using integer = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef integer bits __attribute__((vector_size(BTINET_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

template <class T>
using Vector = typename Lanes<T>::vector;

template <class T>
int64_t padded(int64_t columns) {
  return (columns + Lanes<T>::count - 1) / Lanes<T>::count * Lanes<T>::count;
}

// How many lanes of a vector in memory are meant: all of them, or the first few.
struct Whole {};
struct Part {
  int64_t count;
};

typedef uint16_t Bfloat16Lanes
    __attribute__((vector_size(BTINET_VECTOR_BYTES / 2), aligned(alignof(uint16_t)), may_alias));

template <class S>
inline Vector<Compute<S>> load(const S* data, Whole = {}) {
  if constexpr (std::is_same_v<S, bfloat16>) {
    const auto halves = *reinterpret_cast<const Bfloat16Lanes*>(data);
    return Vector<float>(__builtin_convertvector(halves, Lanes<float>::bits) << 16);
  } else {
    return *reinterpret_cast<const Vector<S>*>(data);
  }
}

template <class S>
inline void store(S* data, Vector<Compute<S>> value, Whole = {}) {
  if constexpr (std::is_same_v<S, bfloat16>) {
#ifdef BTINET_BFLOAT16_DOT
    *reinterpret_cast<Bfloat16Lanes*>(data) = Bfloat16Lanes(_mm512_cvtneps_pbh(__m512(value)));
    return;
#endif
    using bits = Lanes<float>::bits;
    const bits exact = bits(value);
    const bits to_even = exact + 0x7fffu + ((exact >> 16) & 1u);
    const bits rounded = value == value ? to_even : (exact | 0x400000u);  // a NaN stays one
    *reinterpret_cast<Bfloat16Lanes*>(data) = __builtin_convertvector(rounded >> 16, Bfloat16Lanes);
  } else {
    *reinterpret_cast<Vector<S>*>(data) = value;
  }
}

template <class S>
inline bool lies_on_vectors(const S* data) {
  return reinterpret_cast<uintptr_t>(data) % (Lanes<Compute<S>>::count * sizeof(S)) == 0;
}

// Stores whole vectors without reading what was there into the caches first: for what is not read again soon. `data`
// lies on vectors; other threads see the values after `end_streams`.
template <class S>
inline void stream(S* data, Vector<Compute<S>> value) {
#if BTINET_VECTOR_BYTES >= 32
  if constexpr (std::is_same_v<S, bfloat16>) {
    bfloat16 narrow[Lanes<float>::count];
    store(narrow, value);
#if BTINET_VECTOR_BYTES == 64
    _mm256_stream_si256(reinterpret_cast<__m256i*>(data), _mm256_loadu_si256(reinterpret_cast<__m256i*>(narrow)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(data), _mm_loadu_si128(reinterpret_cast<__m128i*>(narrow)));
#endif
  } else {
#if BTINET_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(data), __m512i(value));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(data), __m256i(value));
#endif
  }
#else
  store(data, value);
#endif
}

inline void end_streams() {
#if BTINET_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

template <class S>
inline Vector<Compute<S>> load(const S* data, Part part) {
#if BTINET_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>) return Vector<S>(_mm512_maskz_loadu_ps((1u << part.count) - 1, data));
  if constexpr (std::is_same_v<S, double>) return Vector<S>(_mm512_maskz_loadu_pd((1u << part.count) - 1, data));
#endif
  S buffer[Lanes<Compute<S>>::count] = {};
  std::copy(data, data + part.count, buffer);
  return load(buffer);
}

template <class S>
inline void store(S* data, Vector<Compute<S>> value, Part part) {
#if BTINET_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(data, (1u << part.count) - 1, __m512(value));
  if constexpr (std::is_same_v<S, double>) return _mm512_mask_storeu_pd(data, (1u << part.count) - 1, __m512d(value));
#endif
  S buffer[Lanes<Compute<S>>::count];
  store(buffer, value);
  std::copy(buffer, buffer + part.count, data);
}

// Calls element(i, Whole or Part) for every vector of `count` consecutive values.
template <class T, class F>
inline void for_each_vector(int64_t count, const F& element) {
  int64_t i = 0;
  for (; i + Lanes<T>::count <= count; i += Lanes<T>::count) element(i, Whole{});
  if (i < count) element(i, Part{count - i});
}

// data[i] = value(i, Whole or Part) for `count` values, past the caches where that is wanted and possible.
template <class S, class F>
inline void store_run(S* data, int64_t count, bool streaming, const F& value) {
  using T = Compute<S>;
  if (!streaming || !lies_on_vectors(data))
    return for_each_vector<T>(count, [&](int64_t i, auto part) { store(data + i, value(i, part), part); });
  for_each_vector<T>(count, [&](int64_t i, auto part) {
    if constexpr (std::is_same_v<decltype(part), Whole>)
      stream(data + i, value(i, part));
    else
      store(data + i, value(i, part), part);
  });
}

template <class T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

template <class T, size_t... I>
inline Vector<T> rotated(Vector<T> value, size_t by, std::index_sequence<I...>) {
  using integer = typename Lanes<T>::integer;
  return __builtin_shuffle(value, typename Lanes<T>::bits{integer((I + by) % sizeof...(I))...});
}

template <class T>
inline T sum_of_lanes(Vector<T> value) {
  constexpr int64_t n = Lanes<T>::count;
  for (int64_t by = n / 2; by > 0; by /= 2) value += rotated<T>(value, by, std::make_index_sequence<n>{});
  return value[0];
}

// 1 / value to an ulp or two, of floats whose reciprocal is a normal number.
template <class T>
inline Vector<T> reciprocal(Vector<T> value) {
#if BTINET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const Vector<T> guess = Vector<T>(_mm512_maskz_rcp14_ps(0xffff, __m512(value)));
    return guess + guess * (T(1) - value * guess);
  }
#endif
  return T(1) / value;
}

// The larger of each two lanes; b's where one is NaN.
template <class T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
#if BTINET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return Vector<T>(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));  // GCC 12 warns of the form without a mask
  else
    return Vector<T>(_mm512_maskz_max_pd(0xff, __m512d(a), __m512d(b)));
#else
  return a > b ? a : b;
#endif
}

template <class T>
inline T largest_of_lanes(Vector<T> value) {
  constexpr int64_t n = Lanes<T>::count;
  for (int64_t by = n / 2; by > 0; by /= 2)
    value = larger<T>(value, rotated<T>(value, by, std::make_index_sequence<n>{}));
  return value[0];
}

template <class T, size_t... I>
inline Vector<T> lane_numbers(std::index_sequence<I...>) {
  return Vector<T>{T(I)...};
}

// `value` in the lanes that are meant, `rest` in the others.
template <class T>
inline Vector<T> filled(Vector<T> value, Whole, T) {
  return value;
}
template <class T>
inline Vector<T> filled(Vector<T> value, Part part, T rest) {
  const Vector<T> lane = lane_numbers<T>(std::make_index_sequence<Lanes<T>::count>{});
  return lane < T(part.count) ? value : broadcast(rest);
}

// Adds the first `count` lanes to sums kept in double.
template <class T>
inline void add_lanes(Vector<T> value, double* sums, int64_t count) {
  typedef T Some __attribute__((vector_size(BTINET_VECTOR_BYTES / sizeof(double) * sizeof(T)), may_alias));
  constexpr int64_t some = Lanes<double>::count;
  alignas(BTINET_VECTOR_BYTES) T lanes[Lanes<T>::count];
  store(lanes, value);
  int64_t i = 0;
  for (; i + some <= count; i += some)
    store(sums + i,
          load(sums + i) + __builtin_convertvector(*reinterpret_cast<const Some*>(lanes + i), Vector<double>));
  for (; i < count; ++i) sums[i] += lanes[i];
}

template <class T>
constexpr typename Lanes<T>::integer kSignBit = typename Lanes<T>::integer(1) << (8 * sizeof(T) - 1);

template <class T>
inline Vector<T> absolute(Vector<T> value) {
  return Vector<T>(typename Lanes<T>::bits(value) & ~kSignBit<T>);
}

// factor * sign(value); sign(0) = 0.
template <class T>
inline Vector<T> with_sign_of(Vector<T> factor, Vector<T> value) {
#if BTINET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __mmask16 nonzero = _mm512_cmp_ps_mask(__m512(value), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    constexpr int kXorAnd = 0x78;  // a ^ (b & c)
    return Vector<T>(_mm512_maskz_ternarylogic_epi32(nonzero, __m512i(factor), __m512i(value),
                                                     _mm512_set1_epi32(int(kSignBit<float>)), kXorAnd));
  }
#endif
  using bits = typename Lanes<T>::bits;
  const Vector<T> turned = Vector<T>(bits(factor) ^ (bits(value) & kSignBit<T>));
  return value != T(0) ? turned : Vector<T>{};
}

// Bit i is set where lane i is positive.
template <class T>
inline uint32_t positive_lanes(Vector<T> value) {
#if BTINET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask(__m512(value), _mm512_setzero_ps(), _CMP_GT_OQ);
  else
    return _mm512_cmp_pd_mask(__m512d(value), _mm512_setzero_pd(), _CMP_GT_OQ);
#elif BTINET_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps(__m256(value), _mm256_setzero_ps(), _CMP_GT_OQ));
  else
    return _mm256_movemask_pd(_mm256_cmp_pd(__m256d(value), _mm256_setzero_pd(), _CMP_GT_OQ));
#else
  uint32_t result = 0;
  for (int64_t i = 0; i < Lanes<T>::count; ++i) result |= uint32_t(value[i] > T(0)) << i;
  return result;
#endif
}

template <class T, size_t... I>
inline void interleave(Vector<T> a, Vector<T> b, Vector<T>& low, Vector<T>& high, std::index_sequence<I...>) {
  using bits = typename Lanes<T>::bits;
  using integer = typename Lanes<T>::integer;
  constexpr size_t n = sizeof...(I);
  low = __builtin_shuffle(a, b, bits{integer(I % 2 * n + I / 2)...});
  high = __builtin_shuffle(a, b, bits{integer(I % 2 * n + n / 2 + I / 2)...});
}

// Transposes a square block of as many vectors as a vector has lanes.
template <class T>
inline void transpose(Vector<T> (&block)[Lanes<T>::count]) {
  constexpr int64_t n = Lanes<T>::count;
  for (int64_t round = 1; round < n; round *= 2) {
    Vector<T> mixed[n];
    for (int64_t i = 0; i < n / 2; ++i)
      interleave<T>(block[i], block[i + n / 2], mixed[2 * i], mixed[2 * i + 1], std::make_index_sequence<n>{});
    for (int64_t i = 0; i < n; ++i) block[i] = mixed[i];
  }
}

// out[c][r] = in[r][c]: `rows` and `columns` may be anything, out's rows hold whole vectors beyond `rows`.
template <class S>
void transpose(const S* in, int64_t in_stride, int64_t rows, int64_t columns, Compute<S>* out, int64_t out_stride) {
  using T = Compute<S>;
  constexpr int64_t n = Lanes<T>::count;
  for (int64_t c = 0; c < columns; c += n) {
    const int64_t wide = std::min(n, columns - c);
    for (int64_t r = 0; r < rows; r += n) {
      const int64_t high = std::min(n, rows - r);
      Vector<T> block[n] = {};
      const S* corner = in + r * in_stride + c;
      if (wide == n && high == n) {
        for (int64_t i = 0; i < n; ++i) block[i] = load(corner + i * in_stride);
      } else {
        for (int64_t i = 0; i < high; ++i) block[i] = load(corner + i * in_stride, Part{wide});
      }
      transpose<T>(block);
      for (int64_t i = 0; i < wide; ++i) store(out + (c + i) * out_stride + r, block[i]);
    }
  }
}

}  // namespace BTINET_ISA
}  // namespace btinet
