// A tensor of shape [batch, channels, z, y, x] seen through plain pointers and element strides.
#pragma once

#include <cstdint>

namespace btinet {

struct Shape {
  int64_t batch;
  int64_t channels;
  int64_t size[3];  // missing spatial dimensions have size 1

  int64_t positions() const { return size[0] * size[1] * size[2]; }
};

template <class T>
struct View {
  T* data;
  Shape shape;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t spatial_stride[3];

  int64_t offset(int64_t position) const {
    const int64_t x = position % shape.size[2];
    const int64_t rest = position / shape.size[2];
    return rest / shape.size[1] * spatial_stride[0] + rest % shape.size[1] * spatial_stride[1] + x * spatial_stride[2];
  }

  // True when consecutive positions lie `step` elements apart, so that `offset(n) == n * step`.
  bool positions_lie_apart_by(int64_t step) const {
    int64_t expected = step;
    for (int d = 2; d >= 0; --d) {
      if (shape.size[d] != 1 && spatial_stride[d] != expected) return false;
      expected *= shape.size[d];
    }
    return true;
  }
};

}  // namespace btinet
