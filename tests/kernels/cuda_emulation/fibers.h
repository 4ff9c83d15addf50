// The threads of one emulated block: fibers with barriers for the block and for each warp.
#pragma once

#include <functional>

namespace emulation {

struct Index {
  unsigned x;
};

struct Barrier {
  int arrived;
  int64_t generation;
};

struct Warp {
  Barrier barrier;
  int64_t exchanges[32];
  alignas(16) unsigned char slots[2][32][64];
};

struct Thread {
  Index thread;
  Index block;
};

Thread& current();
Warp& warp();
void block_barrier();
void warp_barrier();
void run_block(unsigned block, unsigned threads, const std::function<void()>& body);

// Every lane gives a value and reads those of its warp. Slots alternate, so that one barrier per exchange is enough.
template <class T, class F>
auto exchange(const T& value, const F& read) {
  static_assert(sizeof(T) <= 64);
  const int lane = current().thread.x % 32;
  auto& slots = warp().slots[warp().exchanges[lane]++ % 2];
  std::memcpy(slots[lane], &value, sizeof(T));
  warp_barrier();
  T of_lanes[32];
  for (int i = 0; i < 32; ++i) std::memcpy(of_lanes + i, slots[i], sizeof(T));
  return read(of_lanes, lane);
}

}  // namespace emulation
