// What csrc/cuda/device.cuh and the kernels find where nvcc would be: CUDA's built-in names, for threads that are
// fibers. Threads of a block run one after the other and change at barriers and warp operations; see block.hpp.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>

#include <cuda_fp16.h>

#undef __shared__
// a section of its own, so that the harness can poison static shared memory before each block
#define __shared__ static __attribute__((section("fastsd_shared")))

#define __launch_bounds__(...)

// inlined, a line that is at fault is known with the line of the kernel that it was inlined into
#undef __device__
#define __device__ __attribute__((always_inline))

// They do not change as long as a thread runs: the compiler may know that, and need not have reads of them watched.
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastsd::host {

// Ends the launch with an error that names the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void barrier(const char* file, int line);

// Waits for the lanes of `mask`, then copies the value of each, in the order of lanes, to `values`.
// Lanes outside `mask` come as 0xff bytes.
void gather_bytes(const char* operation, unsigned mask, const void* value, size_t bytes, void* values);

// Waits for the lanes of `mask`, and orders what they did before what they do next.
void order_lanes(unsigned mask);

void copy_later(void* to, const void* from, size_t bytes, bool valid);
void commit_copies();
void wait_copies(int pending_groups);

char* dynamic_shared_memory();

inline void require_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<size_t>(address) % bytes) fail("address %p is not aligned to %zu bytes", address, bytes);
}

template <class Value>
std::array<Value, 32> gather(const char* operation, unsigned mask, Value value) {
  std::array<Value, 32> values;
  gather_bytes(operation, mask, &value, sizeof(Value), values.data());
  return values;
}

template <class Value>
Value shuffle(const char* operation, unsigned mask, Value value, int from, int width) {
  const int lane = threadIdx.x % 32;
  const auto values = gather(operation, mask, value);
  if (from / width != lane / width || from < 0) return value;
  if (!(mask >> from & 1)) fail("%s reads lane %d, which is not in the mask %#x", operation, from, mask);
  return values[from];
}

}  // namespace fastsd::host

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  fastsd::host::barrier(file, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  fastsd::host::order_lanes(mask);
}

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int from, int width = 32) {
  const int first = static_cast<int>(threadIdx.x % 32) / width * width;
  return fastsd::host::shuffle("__shfl_sync", mask, value, first + (from & (width - 1)), width);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes, int width = 32) {
  return fastsd::host::shuffle("__shfl_xor_sync", mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes, width);
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, int lanes, int width = 32) {
  return fastsd::host::shuffle("__shfl_down_sync", mask, value, static_cast<int>(threadIdx.x % 32) + lanes, width);
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int lanes, int width = 32) {
  return fastsd::host::shuffle("__shfl_up_sync", mask, value, static_cast<int>(threadIdx.x % 32) - lanes, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto votes = fastsd::host::gather("__ballot_sync", mask, predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= (mask >> lane & 1 && votes[lane] ? 1u : 0u) << lane;
  return ballot;
}

inline float __fdividef(float numerator, float denominator) {
  return numerator / denominator;
}
inline float rsqrtf(float value) {
  return 1.0f / std::sqrt(value);
}
using std::memcpy;
