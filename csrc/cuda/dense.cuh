// How kernels reach the values of a dense tensor: vectors of up to 16 bytes along the dimension that memory favours.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "interaction.h"

namespace btinet {
namespace cuda {

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <int V, class T>
__device__ inline Pack<float, V> load(const T* from) {
  const Pack<T, V> raw = *reinterpret_cast<const Pack<T, V>*>(from);
  Pack<float, V> result;
#pragma unroll
  for (int i = 0; i < V; ++i) result.values[i] = to_float(raw.values[i]);
  return result;
}

template <int V, class T>
__device__ inline void store(T* to, const Pack<float, V>& from) {
  Pack<T, V> raw;
#pragma unroll
  for (int i = 0; i < V; ++i) raw.values[i] = from_float<T>(from.values[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = raw;
}

// Shared memory takes at most 16 bytes at once.
template <int V>
__device__ inline Pack<float, V> load_shared(const float* from) {
  constexpr int kPiece = V < 4 ? V : 4;
  Pack<float, V> result;
#pragma unroll
  for (int i = 0; i < V; i += kPiece)
    *reinterpret_cast<Pack<float, kPiece>*>(result.values + i) =
        *reinterpret_cast<const Pack<float, kPiece>*>(from + i);
  return result;
}

template <int V>
__device__ inline void store_shared(float* to, const Pack<float, V>& from) {
  constexpr int kPiece = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < V; i += kPiece)
    *reinterpret_cast<Pack<float, kPiece>*>(to + i) = *reinterpret_cast<const Pack<float, kPiece>*>(from.values + i);
}

template <class T>
View<T> typed(const Tensor& tensor) {
  const View<void>& v = tensor.view;
  return {static_cast<T*>(v.data),
          v.shape,
          v.batch_stride,
          v.channel_stride,
          {v.spatial_stride[0], v.spatial_stride[1], v.spatial_stride[2]}};
}

// What all tensors of one kernel have in common: which dimension lies side by side, and how many elements of it one
// access may take.
struct Access {
  bool channels_inner;
  int width;
};

template <class T>
bool serves(const View<T>& view, bool channels_inner, int width) {
  const Shape& shape = view.shape;
  const auto whole = [&](int64_t size, int64_t stride) { return size <= 1 || stride % width == 0; };
  if (reinterpret_cast<uintptr_t>(view.data) % (width * sizeof(T)) || !whole(shape.batch, view.batch_stride))
    return false;
  if (!channels_inner)
    return view.positions_lie_apart_by(1) && shape.positions() % width == 0 &&
           whole(shape.channels, view.channel_stride);
  bool even = view.channel_stride == 1 && shape.channels % width == 0;
  for (int d = 0; d < 3; ++d) even = even && whole(shape.size[d], view.spatial_stride[d]);
  return even;
}

template <class T>
Access access_for(std::initializer_list<View<T>> views) {
  for (const int bytes : {16, 8})
    for (const bool channels_inner : {true, false}) {
      bool all = true;
      for (const View<T>& view : views) all = all && serves(view, channels_inner, bytes / int(sizeof(T)));
      if (all) return {channels_inner, bytes / int(sizeof(T))};
    }
  return {views.begin()->channel_stride == 1, 1};
}

// Calls `action` with the width as a compile-time constant.
template <class T, class F>
__device__ inline void with_width(int width, const F& action) {
  if (width == int(16 / sizeof(T))) {
    action(std::integral_constant<int, 16 / sizeof(T)>{});
  } else if (width == int(8 / sizeof(T))) {
    action(std::integral_constant<int, 8 / sizeof(T)>{});
  } else {
    action(std::integral_constant<int, 1>{});
  }
}

// Calls `action` with the type that `type` names.
template <class F>
void with_type(Type type, const F& action) {
  if (type == Type::kFloat32) action(float{});
  if (type == Type::kFloat16) action(__half{});
  if (type == Type::kBFloat16) action(__nv_bfloat16{});
}

}  // namespace cuda
}  // namespace btinet
