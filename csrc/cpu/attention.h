// What the vectorised kernels of attention and the host functions that use them share.

#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace fastsd {

// Of the widest instruction set: two vectors of 16 floats.
constexpr int64_t kMostQueries = 32;
// Keys whose scores are in memory at a time: 16 KiB of them, half of a small L1.
constexpr int64_t kBlockKeys = 128;

// Keys and values a constant stride apart: a row of a window, or of cells. The bias, which may be null, is added to the
// scores.
struct Segment {
  const float* keys;
  const float* values;
  const float* bias;
  int64_t count, key_stride, value_stride;
};

struct Segments {
  const Segment* data;
  int64_t count;
};

// Queries that see the same keys, and where their results go.
template <typename T>
struct Queries {
  const T* const* from;
  T* const* to;
  int64_t count;
};

// So many queries of those that see the same keys are a task, and
constexpr int64_t kTaskQueries = 256;
// so much of what is kept of them stays in a core's own cache while each block of keys meets them all.
constexpr int64_t kTaskFloats = 128 * 1024;

// How many queries each block of keys meets while it is in the first cache.
constexpr int64_t queries_at_once(int64_t width) {
  return std::clamp(kTaskFloats / (3 * width) / kMostQueries * kMostQueries, kMostQueries, kTaskQueries);
}

// Floats of scratch that attend() wants.
constexpr int64_t scratch_floats(int64_t width) {
  return queries_at_once(width) * (3 * width + 2) + kMostQueries * kBlockKeys;
}

// The vectorised loops, as one instruction set has them; attention_kernel.h says what each does.
template <typename T>
struct AttentionKernels {
  void (*attend)(const Queries<T>& queries, Segments regional, Segments cells, const float* share, int64_t width,
                 float scale, float* scratch);
  void (*pool)(const T* x, int64_t height, int64_t columns, int64_t row, int64_t token, int64_t width, float* mean);
  void (*to_float)(const T* x, int64_t count, float* y);
};

// Of float, c10::Half and c10::BFloat16; in attention.cpp.
template <typename T>
AttentionKernels<T> attention_kernels_for(Isa isa);

constexpr int64_t kKeptFloats = 1024 * 1024;  // of a thread's scratch, between calls

// Tokens [batch, heads, tokens, width]; strides in elements.
template <typename T>
struct Tokens {
  T* data;
  int64_t batch, head, token;

  T* at(int64_t b, int64_t h, int64_t index) const { return data + b * batch + h * head + index * token; }
};

// x: a tensor; data: its elements.
template <typename T, typename Tensor, typename Data>
Tokens<T> tokens_of(const Tensor& x, Data* data) {
  return {static_cast<T*>(data), x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace fastsd
