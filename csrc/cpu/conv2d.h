// What conv2d's vectorised kernels and its host function share.

#pragma once

#include <cstdint>

#include "packed_weights.h"

namespace fastsd {

// One source of input channels, NHWC.
template <typename T>
struct Channels {
  const T* data;    // the first wanted channel of pixel (0, 0)
  int64_t count;    // wanted
  int64_t per_row;  // elements from row to row
  int64_t per_pixel;
};

// Per channel, u = (x - center) * scale + offset, or u = x where center is null.
struct Normalisation {
  const float *center, *scale, *offset;
};

// A row of tiles' worth of pixels: where each comes from in the source, -1 for a zero of the padding.
struct Window {
  const int32_t *rows, *columns;
  int64_t height, width;
};

// What is added to the sums of a tile, and where they go; NHWC, the first wanted channel of the tile's first pixel.
template <typename T>
struct Destination {
  T* out;
  const T* residual;  // may be null; strides are out's
  int64_t per_row, per_pixel;
};

// Kernels that are mixed where they are used: the sum over `count` experts of alpha[e] times the rows of the e-th.
template <typename T>
struct Mixture {
  const T* rows;  // the first wanted row of the first expert
  int64_t per_row, per_expert;
  const float* alpha;
  int64_t count;
};

// The vectorised loops, as one instruction set has them; conv2d_kernel.h says what each does.
template <typename T>
struct ConvolutionKernels {
  void (*gather)(const Channels<T>& from, Normalisation norm, Window window, float* to, int64_t to_pixel);
  void (*transform_input)(const float* pixels, int64_t row, int64_t pixel, int64_t tiles, int64_t channels, float* out,
                          int64_t per_frequency, int64_t per_tile);
  void (*multiply)(const float* a, int64_t rows, int64_t depth, int64_t a_row, const float* b, float* out,
                   int64_t out_row);
  void (*transform_output)(const float* sums, int64_t per_frequency, int64_t channels, const float* bias, float scale,
                           int64_t height, int64_t width, const Destination<T>& to);
  void (*write_pixels)(const float* sums, int64_t pixels, int64_t per_sum, int64_t channels, const float* bias,
                       float scale, const Destination<T>& to);
  void (*pack_panel)(const T* rows, int64_t count, int64_t per_row, int64_t depth, float* to);
  void (*multiply_unpacked)(const float* a, int64_t rows, int64_t depth, int64_t a_row, const T* b, int64_t count,
                            float* scratch, float* out, int64_t out_row);
  void (*multiply_mixed)(const float* a, int64_t rows, int64_t depth, int64_t a_row, const Mixture<T>& b, int64_t count,
                         float* scratch, float* out, int64_t out_row);
  void (*mix_frequencies)(const Mixture<T>& from, int64_t count, int64_t channels, float* to, int64_t per_frequency);
};

}  // namespace fastsd
