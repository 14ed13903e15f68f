// What gri_attention's vectorised kernels and its host function share.

#pragma once

#include <cstdint>

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
  const T* from[kMostQueries];
  T* to[kMostQueries];
  int64_t count;
};

// Floats of scratch that attend() wants.
constexpr int64_t scratch_floats(int64_t width) {
  return kMostQueries * (3 * width + kBlockKeys);
}

// The vectorised loops, as one instruction set has them; gri_attention_kernel.h says what each does.
template <typename T>
struct AttentionKernels {
  int64_t queries;  // how many attend() takes at most
  void (*attend)(const Queries<T>& queries, Segments regional, Segments cells, const float* share, int64_t width,
                 float scale, float* scratch);
  void (*pool)(const T* x, int64_t height, int64_t columns, int64_t row, int64_t token, int64_t width, float* mean);
  void (*to_float)(const T* x, int64_t count, float* y);
};

}  // namespace fastsd
