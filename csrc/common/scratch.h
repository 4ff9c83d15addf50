// Memory for intermediate values, aligned to cache lines: a vector that straddles two lines is loaded twice as slowly.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace btinet {

template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) { resize(count); }

  // The values become undefined when the scratch grows.
  void resize(int64_t count) {
    if (count <= capacity_) return;
    data_.reset(static_cast<T*>(::operator new(count * sizeof(T), kAlignment)));
    capacity_ = count;
  }
  void fill(int64_t count, T value) {
    resize(count);
    for (int64_t i = 0; i < count; ++i) data_.get()[i] = value;
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

}  // namespace btinet
