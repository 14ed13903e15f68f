#include "block.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_host.hpp"
#include "fiber.hpp"

#ifdef __x86_64__
asm(R"(
.pushsection .text
.type fastsd_switch, @function
.globl fastsd_switch
.hidden fastsd_switch
fastsd_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastsd_switch, .-fastsd_switch
.popsection
)");
#endif

namespace fastsd::host {

// what cuda_on_host.hpp declares as constants, which they are for a thread that runs
uint3 thread_index asm("threadIdx"), block_index asm("blockIdx");
uint3 block_size asm("blockDim"), grid_size asm("gridDim");

namespace {

constexpr unsigned kWarpLanes = 32;
constexpr size_t kMaxValueBytes = 64, kMaxArguments = 64;

// One warp operation under way: the lanes that have come, with their values.
struct Exchange {
  const char* operation;
  unsigned mask, arrived, left;  // left: lanes that have taken the values
  size_t bytes;
  unsigned char values[kWarpLanes * kMaxValueBytes];
};

enum class State { ready, at_barrier, in_warp, finished };

struct Thread {
  State state;
  uint3 index;
  unsigned linear;
  const char* file;  // of the barrier
  int line;
  const Exchange* exchange;
  struct Started {
    Copy copy;
    bool made;
  };
  std::vector<std::vector<Started>> copy_groups;  // the last one is open
  Fiber fiber;
};

struct Block {
  const Launch* launch;
  std::deque<Thread> threads;  // kept from block to block, with their stacks
  unsigned count = 0;
  Thread* running = nullptr;
  char* dynamic_shared = nullptr;
  std::function<std::string()> failure;
  std::vector<std::vector<Exchange*>> exchanges;  // under way, per warp
  std::deque<Exchange> all_exchanges;
  std::vector<Exchange*> free_exchanges;
  std::mt19937_64 random;
} block;

// ---- what the seed decides

// The order of 0, 1, ..., count - 1.
void arrange(std::vector<unsigned>& order, size_t count) {
  order.resize(count);
  std::iota(order.begin(), order.end(), 0u);
  if (block.launch->seed == 1) std::reverse(order.begin(), order.end());
  if (block.launch->seed < 2) return;
  // not std::shuffle, which each standard library does in its own way
  for (size_t left = count; left > 1; --left) std::swap(order[left - 1], order[block.random() % left]);
}

bool copies_early() {
  return block.launch->seed < 2 ? block.launch->seed == 0 : block.random() >> 32 & 1;
}

// ---- threads

void make(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

void end_first_group(Thread& thread) {
  for (const auto& [copy, made] : thread.copy_groups.front()) {
    if (!made) make(copy);
    watch_copy_end(copy);
  }
  thread.copy_groups.erase(thread.copy_groups.begin());
}

void run_thread() {
  Thread& self = *block.running;
  self.fiber.arrive();
  // on the thread's own stack, as parameters are a thread's own
  Argument arguments[kMaxArguments];
  std::copy(block.launch->arguments.begin(), block.launch->arguments.end(), arguments);
  block.launch->kernel.call(arguments);
  while (!self.copy_groups.empty()) end_first_group(self);
  self.state = State::finished;
  self.fiber.leave(true);
}

void prepare(Thread& thread, unsigned linear) {
  thread.state = State::ready;
  thread.linear = linear;
  thread.index = {linear % block_size.x, linear / block_size.x % block_size.y, linear / block_size.x / block_size.y};
  thread.exchange = nullptr;
  thread.copy_groups.resize(1);
  thread.copy_groups[0].clear();
  thread.fiber.prepare(run_thread);
}

void enter(Thread& thread) {
  block.running = &thread;
  thread_index = thread.index;
  watch_thread(thread.linear, thread.fiber.stack(), Fiber::kStackBytes);
  thread.fiber.enter();
}

// ---- waiting in vain

std::string where(const Thread& thread) {
  switch (thread.state) {
    case State::at_barrier: {
      std::string file = thread.file;
      return "waits at __syncthreads() in " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(thread.line);
    }
    case State::in_warp: {
      char text[128];
      std::snprintf(text, sizeof(text), "waits in %s for the lanes %#x of its warp", thread.exchange->operation,
                    thread.exchange->mask & ~thread.exchange->arrived);
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
  std::snprintf(text, sizeof(text), "%s, block (%u, %u, %u)", block.launch->kernel.name, block_index.x, block_index.y,
                block_index.z);
  return text;
}

[[noreturn]] void throw_divergence() {
  std::string message = place() + ": threads wait for each other in vain:";
  unsigned first = 0;
  for (unsigned thread = 1; thread <= block.count; ++thread) {
    if (thread < block.count && where(block.threads[thread]) == where(block.threads[first])) continue;
    const std::string range = std::to_string(first) + (thread - first > 1 ? "-" + std::to_string(thread - 1) : "");
    message += " thread " + range + " " + where(block.threads[first]) + ";";
    first = thread;
  }
  message.pop_back();
  throw std::runtime_error(message);
}

// ---- the scheduler

bool all_finished() {
  for (unsigned thread = 0; thread < block.count; ++thread) {
    if (block.threads[thread].state != State::finished) return false;
  }
  return true;
}

// Every thread of the block, those that returned early too, has to come to the same barrier.
bool all_at_one_barrier() {
  const Thread& first = block.threads[0];
  for (unsigned i = 0; i < block.count; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.state != State::at_barrier || thread.line != first.line || thread.file != first.file) return false;
  }
  return true;
}

// Runs a warp as far as it comes without the others, and says whether that is anywhere.
bool run_warp(unsigned warp) {
  static std::vector<unsigned> order;
  const unsigned first = warp * kWarpLanes, lanes = std::min(kWarpLanes, block.count - first);
  arrange(order, lanes);
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (const unsigned lane : order) {
      Thread& thread = block.threads[first + lane];
      if (thread.state != State::ready) continue;
      again = progress = true;
      enter(thread);
      if (block.failure) throw std::runtime_error(place() + block.failure());
    }
    if (again && block.launch->seed > 1) arrange(order, lanes);
  }
  return progress;
}

void run_block() {
  for (unsigned thread = 0; thread < block.count; ++thread) prepare(block.threads[thread], thread);
  const unsigned warps = (block.count + kWarpLanes - 1) / kWarpLanes;
  block.exchanges.assign(warps, {});
  std::vector<unsigned> order;
  while (!all_finished()) {
    bool progress = false;
    arrange(order, warps);
    for (const unsigned warp : order) progress |= run_warp(warp);
    if (progress) continue;
    if (!all_at_one_barrier()) throw_divergence();
    watch_syncthreads();
    for (unsigned thread = 0; thread < block.count; ++thread) block.threads[thread].state = State::ready;
  }
}

// Static shared memory is larger than its variables, by what AddressSanitizer puts between them: not through the
// checked memset.
__attribute__((no_sanitize("address"))) void poison(Bytes bytes) {
  volatile char* to = bytes.first;
  for (size_t i = 0; i < bytes.size; ++i) to[i] = static_cast<char>(0xff);
}

Exchange* new_exchange(const char* operation, unsigned mask, size_t bytes) {
  if (block.free_exchanges.empty()) block.free_exchanges.push_back(&block.all_exchanges.emplace_back());
  Exchange* exchange = block.free_exchanges.back();
  block.free_exchanges.pop_back();
  exchange->operation = operation;
  exchange->mask = mask;
  exchange->arrived = exchange->left = 0;
  exchange->bytes = bytes;
  if (mask != 0xffffffffu) std::memset(exchange->values, 0xff, kWarpLanes * bytes);
  return exchange;
}

// The values of all lanes of `mask`, once they have come; each has to return the exchange.
Exchange* meet(const char* operation, unsigned mask, const void* value, size_t bytes, bool orders_memory) {
  Thread& self = *block.running;
  const unsigned lane = self.linear % kWarpLanes, warp = self.linear / kWarpLanes;
  if (bytes > kMaxValueBytes) fail("%s of %zu bytes; the harness takes %zu", operation, bytes, kMaxValueBytes);
  if (!(mask >> lane & 1)) fail("%s with the mask %#x, which leaves out its own lane %u", operation, mask, lane);

  auto& under_way = block.exchanges[warp];
  Exchange* exchange = nullptr;
  for (Exchange* candidate : under_way) {
    if (candidate->mask == mask && candidate->bytes == bytes && !(candidate->arrived >> lane & 1) &&
        !std::strcmp(candidate->operation, operation)) {
      exchange = candidate;
    }
  }
  if (!exchange) under_way.push_back(exchange = new_exchange(operation, mask, bytes));
  exchange->arrived |= 1u << lane;
  if (bytes) std::memcpy(exchange->values + lane * bytes, value, bytes);

  if (exchange->arrived != mask) {
    self.exchange = exchange;
    self.state = State::in_warp;
    self.fiber.leave(false);
    self.exchange = nullptr;
    return exchange;
  }
  for (unsigned thread = warp * kWarpLanes; thread < block.count && thread < (warp + 1) * kWarpLanes; ++thread) {
    Thread& member = block.threads[thread];
    if (member.state == State::in_warp && member.exchange == exchange) member.state = State::ready;
  }
  under_way.erase(std::find(under_way.begin(), under_way.end(), exchange));
  if (orders_memory) watch_syncwarp(warp, mask);
  return exchange;
}

void give_back(Exchange* exchange) {
  exchange->left |= 1u << block.running->linear % kWarpLanes;
  if (exchange->left == exchange->mask) block.free_exchanges.push_back(exchange);
}

}  // namespace

// ---- what a thread calls

void stop(std::function<std::string()> describe) {
  block.failure = [describe = std::move(describe)] { return ": " + describe(); };
  block.running->fiber.leave(false);
  std::abort();
}

void fail(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  const std::string message = ", thread " + std::to_string(block.running->linear) + ": " + text;
  block.failure = [message] { return message; };
  block.running->fiber.leave(false);
  std::abort();
}

void barrier(const char* file, int line) {
  Thread& self = *block.running;
  self.state = State::at_barrier;
  self.file = file;
  self.line = line;
  self.fiber.leave(false);
}

void gather_bytes(const char* operation, unsigned mask, const void* value, size_t bytes, void* values) {
  Exchange* exchange = meet(operation, mask, value, bytes, false);
  std::memcpy(values, exchange->values, kWarpLanes * bytes);
  give_back(exchange);
}

void order_lanes(unsigned mask) {
  give_back(meet("__syncwarp", mask, nullptr, 0, true));
}

// A device copies at any time from here to the wait. Made now, a copy shows that others still read what it overwrites;
// made at the wait and not before, that the wait is missing, or the barrier after it.
void copy_later(void* to, const void* from, size_t bytes, bool valid) {
  const Copy copy{to, from, bytes, valid, __builtin_return_address(0)};
  watch_copy_start(copy);
  const bool early = copies_early();
  if (early) make(copy);
  block.running->copy_groups.back().push_back({copy, early});
}

void commit_copies() {
  block.running->copy_groups.emplace_back();
}

void wait_copies(int pending_groups) {
  Thread& self = *block.running;
  while (static_cast<int>(self.copy_groups.size()) - 1 > pending_groups) end_first_group(self);
}

std::pair<const Copy*, unsigned> copy_under_way(size_t address, size_t bytes, bool to) {
  for (unsigned i = 0; i < block.count; ++i) {
    for (const auto& group : block.threads[i].copy_groups) {
      for (const auto& [copy, made] : group) {
        const auto first = reinterpret_cast<size_t>(to ? copy.to : copy.from);
        if ((to || copy.valid) && first < address + bytes && address < first + copy.bytes) return {&copy, i};
      }
    }
  }
  std::abort();
}

char* dynamic_shared_memory() {
  if (!block.dynamic_shared) fail("the kernel uses dynamic shared memory; the launch gave it none");
  return block.dynamic_shared;
}

void run(const Launch& launch) {
  const dim3 threads = launch.block, grid = launch.grid;
  block.launch = &launch;
  block.count = threads.x * threads.y * threads.z;
  block.random.seed(launch.seed);
  block.failure = nullptr;
  if (launch.arguments.size() > kMaxArguments) throw std::runtime_error("more parameters than the harness takes");
  block.free_exchanges.clear();
  for (Exchange& exchange : block.all_exchanges) block.free_exchanges.push_back(&exchange);
  grid_size = {grid.x, grid.y, grid.z};
  block_size = {threads.x, threads.y, threads.z};
  while (block.threads.size() < block.count) block.threads.emplace_back();

  // of exactly this size, so that AddressSanitizer sees the first byte beyond
  const std::unique_ptr<char, decltype(&std::free)> shared(
      launch.shared_bytes ? static_cast<char*>(std::malloc(launch.shared_bytes)) : nullptr, &std::free);
  block.dynamic_shared = shared.get();
  std::vector<Memory> memory = launch.memory;
  memory.push_back({shared.get(), launch.shared_bytes, "dynamic shared memory", true});
  watch_launch(std::move(memory), reinterpret_cast<const void*>(launch.kernel.call));

  std::vector<unsigned> order;
  arrange(order, size_t{grid.x} * grid.y * grid.z);
  try {
    for (const unsigned linear : order) {
      block_index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
      watch_block(linear);
      poison({shared.get(), launch.shared_bytes});
      poison(launch.static_shared);
      run_block();
    }
  } catch (...) {
    watch_abandoned();
    throw;
  }
}

}  // namespace fastsd::host
