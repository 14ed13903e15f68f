// What linear's vectorised kernels and its host function share.

#pragma once

#include <cstdint>

#include "product.h"

namespace fastsd {

// What is made of sums and bias; of geglu there are sums of gates too.
enum class Follows { nothing, gelu, quick_gelu, geglu };

// The parameters of a LayerNorm; null for 1 and 0.
struct RowNorm {
  const float *weight, *bias;
  float eps;
};

// What is added to sums, and where they go; the first wanted feature of the first row.
template <typename T>
struct Rows {
  T* out;
  int64_t out_row;
  const T* residual;  // may be null
  int64_t residual_row;
};

// The vectorised loops, as one instruction set has them; linear_kernel.h says what each does.
template <typename T>
struct LinearKernels {
  void (*widen)(const T* x, int64_t depth, float* to);
  void (*normalise)(const T* x, int64_t depth, const RowNorm& norm, float* to);
  void (*pack_panel)(const T* rows, int64_t count, int64_t per_row, int64_t depth, float* to);
  void (*multiply)(Matrix a, int64_t rows, int64_t depth, const float* b, float* out, int64_t out_row, bool add,
                   Ahead& ahead);
  void (*finish)(const float* sums, const float* bias, int64_t rows, int64_t features, const Rows<T>& to);
};

}  // namespace fastsd
