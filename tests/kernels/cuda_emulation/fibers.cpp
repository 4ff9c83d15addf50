#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"

namespace emulation {
namespace {

constexpr size_t kStack = 256 << 10;

struct Fiber {
  Thread index;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const Barrier* waits_for = nullptr;
  int64_t generation = 0;
  bool finished = false;

  bool ready() const { return !finished && (!waits_for || waits_for->generation != generation); }
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier of_block;
Fiber* running;
ucontext_t scheduler;
const std::function<void()>* body_of_block;

void enter() {
  (*body_of_block)();
  running->finished = true;
  swapcontext(&running->context, &scheduler);
}

void arrive(Barrier& barrier, int expected) {
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  running->waits_for = &barrier;
  running->generation = barrier.generation;
  swapcontext(&running->context, &scheduler);
}

// BTINET_EMULATION_ORDER=backward lets the last thread go first.
bool backward() {
  const char* order = std::getenv("BTINET_EMULATION_ORDER");
  return order && std::string(order) == "backward";
}

}  // namespace

Thread& current() {
  return running->index;
}
Warp& warp() {
  return warps[running->index.thread.x / 32];
}
void block_barrier() {
  arrive(of_block, int(fibers.size()));
}
void warp_barrier() {
  arrive(warp().barrier, 32);
}

void run_block(unsigned block, unsigned threads, const std::function<void()>& body) {
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  warps.assign(threads / 32, Warp{});
  of_block = Barrier{};
  body_of_block = &body;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {{i}, {block}};
    fiber.waits_for = nullptr;
    fiber.finished = false;
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  const bool from_the_back = backward();
  for (unsigned finished = 0; finished < threads;) {
    bool moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[from_the_back ? threads - 1 - i : i];
      if (!fiber.ready()) continue;
      fiber.waits_for = nullptr;
      running = &fiber;
      swapcontext(&scheduler, &fiber.context);
      finished += fiber.finished;
      moved = true;
    }
    if (!moved) throw std::runtime_error("block " + std::to_string(block) + ": not every thread reaches a barrier");
  }
}

}  // namespace emulation
