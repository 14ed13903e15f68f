// What group_norm_silu's vectorised kernels and its host function share.

#pragma once

#include <cstdint>

namespace fastsd {

// Moments of n values per channel, relative to a pivot near their mean so that nothing cancels:
// mean = pivot + drift / n, sum of squared deviations from the mean = spread - drift^2 / n.
struct Moments {
  float* pivot;
  float* drift;
  float* spread;

  Moments at(int64_t channel) const { return {pivot + channel, drift + channel, spread + channel}; }
};

// Per channel, u = (x - center) * scale + offset. The center is a rounded mean; what the rounding left is in offset.
struct Affine {
  float* center;
  float* scale;
  float* offset;

  Affine at(int64_t channel) const { return {center + channel, scale + channel, offset + channel}; }
};

// The vectorised loops, as one instruction set has them; group_norm_silu_kernel.h says what each does.
template <typename T>
struct Kernels {
  // channels last
  void (*channel_moments)(const T* x, int64_t rows, int64_t channels, int64_t stride, Moments out);
  void (*merge_blocks)(Moments blocks, int64_t stride, int64_t rows, int64_t total, int64_t channels, double* mean,
                       double* squares);
  void (*normalise_rows)(const T* x, T* y, int64_t rows, int64_t channels, int64_t x_stride, int64_t y_stride,
                         Affine affine);
  void (*fold_channels)(int64_t channels, int64_t count, const double* mean, const double* squares, const float* shift,
                        double* group_mean, double* group_squares);
  // channels first
  void (*plane_moments)(const T* x, int64_t count, int64_t n, const float* shift, double* mean, double* squares);
  void (*normalise_planes)(const T* x, T* y, int64_t count, int64_t n, Affine affine, const T* next);
  // either
  void (*map_group)(int64_t channels, double mean, double rstd, const float* shift, const float* weight,
                    const float* bias, Affine out);
};

}  // namespace fastsd
