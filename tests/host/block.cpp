#include "block.hpp"

#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_host.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastsd::host {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarpLanes = 32;
constexpr size_t kMaxValueBytes = 64;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

// One warp operation under way: the lanes that have come, with their values.
struct Exchange {
  const char* operation;
  unsigned mask, arrived;
  size_t bytes;
  unsigned char values[kWarpLanes][kMaxValueBytes];
};

enum class State { ready, at_barrier, in_warp, finished };

struct Fiber {
  State state;
  uint3 index;
  unsigned linear;
  const char* file;  // of the barrier
  int line;
  std::shared_ptr<Exchange> exchange;
  std::vector<std::vector<Copy>> copy_groups;  // the last one is open
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
};

struct Block {
  const Kernel* kernel;
  const Argument* arguments;
  std::deque<Fiber> fibers;  // kept from block to block, with their stacks
  unsigned threads = 0;
  bool reverse = false;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  char* dynamic_shared = nullptr;
  std::string failure;
  std::vector<std::vector<std::shared_ptr<Exchange>>> exchanges;  // under way, per warp
} block;

// ---- changing between the scheduler and a fiber; AddressSanitizer has to know the stacks

void enter_fiber(Fiber& fiber) {
  block.running = &fiber;
  threadIdx = fiber.index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void arrive_in_fiber(void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  (void)fake_stack;
}

void leave_fiber(bool for_good) {
  Fiber& fiber = *block.running;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
#endif
  (void)for_good;
  swapcontext(&fiber.context, &block.scheduler);
  arrive_in_fiber(fiber.fake_stack);
}

void run_thread() {
  arrive_in_fiber(nullptr);
  block.kernel->call(block.arguments);
  block.running->state = State::finished;
  leave_fiber(true);
}

void prepare_fiber(Fiber& fiber, unsigned linear) {
  fiber.state = State::ready;
  fiber.linear = linear;
  fiber.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
  fiber.exchange.reset();
  fiber.copy_groups.assign(1, {});
#ifdef __SANITIZE_ADDRESS__
  // a fiber that was abandoned after a failure leaves its frames poisoned
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
}

// ---- waiting in vain

std::string where(const Fiber& fiber) {
  switch (fiber.state) {
    case State::at_barrier: {
      std::string file = fiber.file;
      return "waits at __syncthreads() in " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(fiber.line);
    }
    case State::in_warp: {
      char text[128];
      std::snprintf(text, sizeof(text), "waits in %s for the lanes %#x of its warp", fiber.exchange->operation,
                    fiber.exchange->mask & ~fiber.exchange->arrived);
      return text;
    }
    case State::finished:
      return "has finished";
    case State::ready:
      break;
  }
  return "runs";
}

std::string place() {
  char text[128];
  std::snprintf(text, sizeof(text), "%s, block (%u, %u, %u)", block.kernel->name, blockIdx.x, blockIdx.y, blockIdx.z);
  return text;
}

[[noreturn]] void throw_divergence() {
  std::string message = place() + ": threads wait for each other in vain:";
  unsigned first = 0;
  for (unsigned thread = 1; thread <= block.threads; ++thread) {
    if (thread < block.threads && where(block.fibers[thread]) == where(block.fibers[first])) continue;
    const std::string range = std::to_string(first) + (thread - first > 1 ? "-" + std::to_string(thread - 1) : "");
    message += " thread " + range + " " + where(block.fibers[first]) + ";";
    first = thread;
  }
  message.pop_back();
  throw std::runtime_error(message);
}

// ---- the scheduler

bool all_finished() {
  for (unsigned thread = 0; thread < block.threads; ++thread) {
    if (block.fibers[thread].state != State::finished) return false;
  }
  return true;
}

// Every thread of the block, those that returned early too, has to come to the same barrier.
bool all_at_one_barrier() {
  const Fiber& first = block.fibers[0];
  for (unsigned thread = 0; thread < block.threads; ++thread) {
    const Fiber& fiber = block.fibers[thread];
    if (fiber.state != State::at_barrier || fiber.line != first.line || fiber.file != first.file) return false;
  }
  return true;
}

// Runs a warp as far as it comes without the others, and says whether that is anywhere: a barrier that is missing
// shows, for the warp then reads what another has not written yet, or overwrites what another has not read.
bool run_warp(unsigned warp) {
  const unsigned first = warp * kWarpLanes, lanes = std::min(kWarpLanes, block.threads - first);
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned i = 0; i < lanes; ++i) {
      Fiber& fiber = block.fibers[first + (block.reverse ? lanes - 1 - i : i)];
      if (fiber.state != State::ready) continue;
      again = progress = true;
      enter_fiber(fiber);
      if (!block.failure.empty()) throw std::runtime_error(block.failure);
    }
  }
  return progress;
}

void run_block() {
  for (unsigned thread = 0; thread < block.threads; ++thread) prepare_fiber(block.fibers[thread], thread);
  const unsigned warps = (block.threads + kWarpLanes - 1) / kWarpLanes;
  block.exchanges.assign(warps, {});
  while (!all_finished()) {
    bool progress = false;
    for (unsigned i = 0; i < warps; ++i) progress |= run_warp(block.reverse ? warps - 1 - i : i);
    if (progress) continue;
    if (!all_at_one_barrier()) throw_divergence();
    for (unsigned thread = 0; thread < block.threads; ++thread) block.fibers[thread].state = State::ready;
  }
}

void make(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

// Static shared memory is larger than its variables, by what AddressSanitizer puts between them: not through the
// checked memset.
__attribute__((no_sanitize("address"))) void poison(Bytes bytes) {
  volatile char* to = bytes.first;
  for (size_t i = 0; i < bytes.size; ++i) to[i] = static_cast<char>(0xff);
}

}  // namespace

// ---- what a thread calls

void fail(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  block.failure = place() + ", thread " + std::to_string(block.running->linear) + ": " + text;
  leave_fiber(false);
  std::abort();
}

void barrier(const char* file, int line) {
  Fiber& self = *block.running;
  self.state = State::at_barrier;
  self.file = file;
  self.line = line;
  leave_fiber(false);
}

void gather_bytes(const char* operation, unsigned mask, const void* value, size_t bytes, void* values) {
  Fiber& self = *block.running;
  const unsigned lane = self.linear % kWarpLanes, warp = self.linear / kWarpLanes;
  if (bytes > kMaxValueBytes) fail("%s of %zu bytes; the harness takes %zu", operation, bytes, kMaxValueBytes);
  if (!(mask >> lane & 1)) fail("%s with the mask %#x, which leaves out its own lane %u", operation, mask, lane);

  auto& under_way = block.exchanges[warp];
  std::shared_ptr<Exchange> exchange;
  for (const auto& candidate : under_way) {
    if (candidate->mask == mask && candidate->bytes == bytes && !(candidate->arrived >> lane & 1) &&
        !std::strcmp(candidate->operation, operation)) {
      exchange = candidate;
    }
  }
  if (!exchange) {
    exchange = std::make_shared<Exchange>(Exchange{operation, mask, 0, bytes, {}});
    std::memset(exchange->values, 0xff, sizeof(exchange->values));
    under_way.push_back(exchange);
  }
  exchange->arrived |= 1u << lane;
  std::memcpy(exchange->values[lane], value, bytes);

  self.exchange = exchange;
  if (exchange->arrived == mask) {
    for (unsigned thread = warp * kWarpLanes; thread < block.threads && thread < (warp + 1) * kWarpLanes; ++thread) {
      Fiber& member = block.fibers[thread];
      if (member.state == State::in_warp && member.exchange == exchange) member.state = State::ready;
    }
    for (auto it = under_way.begin(); it != under_way.end(); ++it) {
      if (*it == exchange) {
        under_way.erase(it);
        break;
      }
    }
  } else {
    self.state = State::in_warp;
    leave_fiber(false);
  }
  for (unsigned other = 0; other < kWarpLanes; ++other) {
    std::memcpy(static_cast<char*>(values) + other * bytes, exchange->values[other], bytes);
  }
  self.exchange.reset();
}

// A device copies at any time from here to the wait. Made now, a copy shows that others still read what it overwrites;
// made at the wait and not before, that the wait is missing, or the barrier after it.
void copy_later(void* to, const void* from, size_t bytes, bool valid) {
  const Copy copy{to, from, bytes, valid};
  if (block.reverse) {
    block.running->copy_groups.back().push_back(copy);
  } else {
    make(copy);
  }
}

void commit_copies() {
  block.running->copy_groups.emplace_back();
}

void wait_copies(int pending_groups) {
  auto& groups = block.running->copy_groups;
  while (static_cast<int>(groups.size()) - 1 > pending_groups) {
    for (const Copy& copy : groups.front()) make(copy);
    groups.erase(groups.begin());
  }
}

char* dynamic_shared_memory() {
  if (!block.dynamic_shared) fail("the kernel uses dynamic shared memory; the launch gave it none");
  return block.dynamic_shared;
}

void launch(const Kernel& kernel, const Argument* arguments, dim3 grid, dim3 threads, size_t shared_bytes,
            Bytes static_shared, bool reverse) {
  block.kernel = &kernel;
  block.arguments = arguments;
  block.threads = threads.x * threads.y * threads.z;
  block.reverse = reverse;
  gridDim = grid;
  blockDim = threads;
  while (block.fibers.size() < block.threads) block.fibers.emplace_back();

  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t linear = reverse ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                static_cast<unsigned>(linear / grid.x / grid.y)};
    // of exactly this size, so that AddressSanitizer sees the first byte beyond
    const std::unique_ptr<char, decltype(&std::free)> shared(
        shared_bytes ? static_cast<char*>(std::malloc(shared_bytes)) : nullptr, &std::free);
    block.dynamic_shared = shared.get();
    poison({shared.get(), shared_bytes});
    poison(static_shared);
    block.failure.clear();
    run_block();
  }
}

}  // namespace fastsd::host
