// What conv2d's vectorised kernels and its host function share.

#pragma once

#include <cstdint>
#include <stdexcept>

#include "product.h"

namespace fastsd {

// The matrices of an algorithm. Tiles are m times m pixels of the result: for m = 1 each is one product with all
// weights that reach it, for m = 2 and 4 a product per frequency of Winograd's.
struct Form {
  int64_t m, kernel, stride;

  int64_t frequencies() const { return m == 1 ? 1 : (m + 2) * (m + 2); }
  int64_t taps() const { return m == 1 ? kernel * kernel : 1; }  // pixels side by side in a row of the matrix
  // rows or columns of the input that so many of the result are computed from
  int64_t reach(int64_t results) const { return (results - 1) * stride + kernel; }

  void check() const {
    if (m != 1 && m != 2 && m != 4) throw std::invalid_argument("m: expected 1, 2 or 4");
    if (kernel != 3 && (kernel != 1 || m != 1)) throw std::invalid_argument("kernel: expected 3, or 1 for m = 1");
    if (stride != 1 && (stride != 2 || m != 1)) throw std::invalid_argument("stride: expected 1, or 2 for m = 1");
  }
};

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

// Weights as they lie in memory, [out_channels, channels, taps] or [out_channels, taps, channels]; or the sum over
// `count` experts of alpha[e] times those of the e-th, mixed where they are used.
template <typename T>
struct Weights {
  const T* rows;  // the first wanted output channel, of the first expert
  int64_t per_row, channels, taps;
  bool taps_last;
  const float* alpha;  // null: there are no experts
  int64_t count, per_expert;
};

// The vectorised loops, as one instruction set has them; conv2d_kernel.h says what each does.
template <typename T>
struct ConvolutionKernels {
  void (*gather)(const Channels<T>& from, Normalisation norm, Window window, float* to, int64_t to_pixel);
  void (*transform_input)(const float* pixels, int64_t row, int64_t pixel, int64_t tiles, int64_t channels, float* out,
                          int64_t per_frequency, int64_t per_tile);
  void (*multiply)(Matrix a, int64_t rows, int64_t depth, const float* b, float* out, int64_t out_row, bool add,
                   Ahead& ahead);
  void (*transform_output)(const float* sums, int64_t per_frequency, int64_t channels, const float* bias, float scale,
                           int64_t height, int64_t width, const Destination<T>& to);
  void (*write_pixels)(const float* sums, int64_t pixels, int64_t per_sum, int64_t channels, const float* bias,
                       float scale, const Destination<T>& to);
  void (*pack_columns)(const Weights<T>& from, int64_t count, int64_t first, int64_t depth, float* to);
  void (*transform_weights)(const Weights<T>& from, int64_t count, int64_t first, int64_t channels, float* to,
                            int64_t per_frequency);
};

}  // namespace fastsd
