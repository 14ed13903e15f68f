// The vectorised loops of conv2d, compiled once per instruction set by foreach_isa.h.

#include "vector_kernel.h"

#include "product_kernel.h"
#include "silu_kernel.h"

// N channels of a pixel, from the c-th on; N is a constant, or the loop's set-up would cost more than its body.
template <int N, bool silu, typename T>
static inline __attribute__((always_inline)) void activate_channels(const T* __restrict x, float* __restrict y,
                                                                    Normalisation norm, int64_t c,
                                                                    Activation<silu> activate) {
  x += c;
  y += c;
  if (!norm.center) {
    for (int i = 0; i < N; ++i) y[i] = activate(load(x + i));
    return;
  }
  const float* __restrict center = norm.center + c, * __restrict scale = norm.scale + c, * __restrict offset = norm.offset + c;
  for (int i = 0; i < N; ++i) y[i] = activate((load(x + i) - center[i]) * scale[i] + offset[i]);
}

// The pixels of a window, normalised and activated, to[height, width, to_pixel]; zero where the padding is.
template <bool silu, typename T>
static void gather(const Channels<T>& from, Normalisation norm, Window window, float* to, int64_t to_pixel) {
  const Activation<silu> activate;
  for (int64_t i = 0; i < window.height; ++i)
    for (int64_t j = 0; j < window.width; ++j) {
      float* y = to + (i * window.width + j) * to_pixel;
      if (window.rows[i] < 0 || window.columns[j] < 0) {
        for (int64_t c = 0; c < from.count; ++c) y[c] = 0.0f;
        continue;
      }
      const T* x = from.data + window.rows[i] * from.per_row + window.columns[j] * from.per_pixel;
      int64_t c = 0;
      for (; c + 4 * kLanes <= from.count; c += 4 * kLanes) activate_channels<4 * kLanes>(x, y, norm, c, activate);
      for (; c + kLanes <= from.count; c += kLanes) activate_channels<kLanes>(x, y, norm, c, activate);
      for (; c < from.count; ++c) activate_channels<1>(x, y, norm, c, activate);
    }
}

// A side of the square of frequencies of a tile of M times M pixels.
template <int M>
constexpr int kSide = M + 2;

// y = B^T x for F(2, 3) and F(4, 3); Lavin and Gray, 2015.
template <int M, typename V>
static inline __attribute__((always_inline)) void input_matrix(const V* x, V* y) {
  if constexpr (M == 2) {
    y[0] = x[0] - x[2];
    y[1] = x[1] + x[2];
    y[2] = x[2] - x[1];
    y[3] = x[1] - x[3];
  } else {
    const V a = x[4] - 4.0f * x[2], b = x[3] - 4.0f * x[1], c = x[4] - x[2], d = 2.0f * (x[3] - x[1]);
    y[0] = 4.0f * x[0] + (x[4] - 5.0f * x[2]);
    y[1] = a + b;
    y[2] = a - b;
    y[3] = c + d;
    y[4] = c - d;
    y[5] = 4.0f * x[1] + (x[5] - 5.0f * x[3]);
  }
}

// Every tile of a row: pixels[N, row / pixel, pixel] -> out[frequency][tile][channel], N * N frequencies.
// Neighbouring tiles share two columns of pixels. `channels` is rounded up to whole vectors.
template <int M>
static void transform_input(const float* pixels, int64_t row, int64_t pixel, int64_t tiles, int64_t channels,
                            float* out, int64_t per_frequency, int64_t per_tile) {
  constexpr int N = kSide<M>;
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const float* from = pixels + t * M * pixel + c;
      float* to = out + t * per_tile + c;
      Vector half[N][N];
      for (int j = 0; j < N; ++j) {
        Vector x[N], y[N];
        for (int i = 0; i < N; ++i) read(from + i * row + j * pixel, x[i]);
        input_matrix<M>(x, y);
        for (int i = 0; i < N; ++i) half[i][j] = y[i];
      }
      for (int i = 0; i < N; ++i) {
        Vector y[N];
        input_matrix<M>(half[i], y);
        for (int j = 0; j < N; ++j) write(to + (i * N + j) * per_frequency, y[j]);
      }
    }
}

// One row of a mixture, n elements from the first on. The next n are fetched: rows are far apart, and so many at once
// that the hardware does not see where each goes on.
template <typename T>
static inline void mix_row(const Weights<T>& from, int64_t row, int64_t first, int64_t n, float* to) {
  const T* data = from.rows + row * from.per_row + first;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vector sum = {}, value;
    for (int64_t e = 0; e < from.count; ++e) {
      __builtin_prefetch(data + e * from.per_expert + i + n);
      read(data + e * from.per_expert + i, value);
      sum += from.alpha[e] * value;
    }
    write(to + i, sum);
  }
  for (; i < n; ++i) {
    float sum = 0.0f;
    for (int64_t e = 0; e < from.count; ++e) sum += from.alpha[e] * load(data + e * from.per_expert + i);
    to[i] = sum;
  }
}

// to[depth, kPanel]: so much of `count` output channels' weights as they lie in memory, from the element `first` on.
template <typename T>
static void pack_columns(const Weights<T>& from, int64_t count, int64_t first, int64_t depth, float* to) {
  if (!from.alpha) return pack_panel<T>(from.rows + first, count, from.per_row, depth, to);
  constexpr int64_t piece = 144;  // so that the mixed rows stay in the first cache
  alignas(64) float mixed[kPanel * piece];
  for (int64_t d = 0; d < depth; d += piece) {
    const int64_t n = depth - d < piece ? depth - d : piece;
    for (int64_t k = 0; k < count; ++k) mix_row(from, k, first + d, n, mixed + k * piece);
    pack_panel<float>(mixed, count, piece, n, to + d * kPanel);
  }
}

// y = G x for F(2, 3) and F(4, 3).
template <int M>
static inline __attribute__((always_inline)) void weight_matrix(const Vector* x, Vector* y) {
  if constexpr (M == 2) {
    const Vector a = 0.5f * (x[0] + x[2]), b = 0.5f * x[1];
    y[0] = x[0];
    y[1] = a + b;
    y[2] = a - b;
    y[3] = x[2];
  } else {
    const Vector a = (-1.0f / 6) * (x[0] + x[2]), b = (1.0f / 6) * x[1];
    const Vector c = (1.0f / 24) * x[0] + (1.0f / 6) * x[2], d = (1.0f / 12) * x[1];
    y[0] = 0.25f * x[0];
    y[1] = a - b;
    y[2] = a + b;
    y[3] = c + d;
    y[4] = c - d;
    y[5] = x[2];
  }
}

// Some channels of a panel of 3x3 kernels, transformed: to[frequency][channel][kPanel].
template <int M, typename T>
static void transform_weights(const Weights<T>& from, int64_t count, int64_t first, int64_t channels, float* to,
                              int64_t per_frequency) {
  constexpr int N = kSide<M>;
  constexpr int64_t taps = 9, piece = 16;
  alignas(64) float panel[piece * taps * kPanel];
  for (int64_t c = 0; c < channels; c += piece) {
    const int64_t n = channels - c < piece ? channels - c : piece;
    if (from.taps_last)
      pack_columns(from, count, (first + c) * taps, n * taps, panel);
    else
      for (int64_t tap = 0; tap < taps; ++tap)
        pack_columns(from, count, tap * from.channels + first + c, n, panel + tap * piece * kPanel);
    const int64_t per_channel = from.taps_last ? taps : 1, per_tap = from.taps_last ? 1 : piece;
    for (int64_t i = 0; i < n; ++i)
      for (int s = 0; s < kPanel; s += kLanes) {
        Vector half[N][3];
        for (int column = 0; column < 3; ++column) {
          Vector x[3], y[N];
          for (int row = 0; row < 3; ++row)
            read(panel + (i * per_channel + (row * 3 + column) * per_tap) * kPanel + s, x[row]);
          weight_matrix<M>(x, y);
          for (int row = 0; row < N; ++row) half[row][column] = y[row];
        }
        for (int row = 0; row < N; ++row) {
          Vector y[N];
          weight_matrix<M>(half[row], y);
          for (int column = 0; column < N; ++column)
            write(to + (row * N + column) * per_frequency + (c + i) * kPanel + s, y[column]);
        }
      }
  }
}

// y = A^T x for F(2, 3) and F(4, 3).
template <int M, typename V>
static inline __attribute__((always_inline)) void output_matrix(const V* x, V* y) {
  if constexpr (M == 2) {
    y[0] = x[0] + x[1] + x[2];
    y[1] = x[1] - x[2] - x[3];
  } else {
    const V a = x[1] + x[2], b = x[1] - x[2], c = x[3] + x[4], d = x[3] - x[4];
    y[0] = x[0] + a + c;
    y[1] = b + 2.0f * d;
    y[2] = a + 4.0f * c;
    y[3] = b + 8.0f * d + x[5];
  }
}

// n channels of one pixel, n at most kLanes.
template <typename T>
static inline void finish(const float* __restrict sum, const float* __restrict bias, const T* __restrict residual,
                          float scale, T* __restrict out, int64_t n) {
  if (residual)
    for (int64_t c = 0; c < n; ++c) store(out + c, (sum[c] + bias[c] + load(residual + c)) * scale);
  else
    for (int64_t c = 0; c < n; ++c) store(out + c, (sum[c] + bias[c]) * scale);
}

// What is added to a result soon, and its own line, which has to be read before a part of it is written.
template <typename T>
static inline __attribute__((always_inline)) void fetch(const Destination<T>& to, int64_t at) {
  __builtin_prefetch(to.out + at);
  if (to.residual) __builtin_prefetch(to.residual + at);
}

// Pixels that lie side by side: (sums + bias + residual) * scale.
template <typename T>
static void write_pixels(const float* sums, int64_t pixels, int64_t per_sum, int64_t channels, const float* bias,
                         float scale, const Destination<T>& to) {
  constexpr int64_t ahead = 8;
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t n = channels - c < kLanes ? channels - c : kLanes, at = pixel * to.per_pixel + c;
      fetch(to, at + ahead * to.per_pixel);
      const float* sum = sums + pixel * per_sum + c;
      const T* residual = to.residual ? to.residual + at : nullptr;
      if (n == kLanes)
        finish(sum, bias + c, residual, scale, to.out + at, kLanes);
      else
        finish(sum, bias + c, residual, scale, to.out + at, n);
    }
}

// One tile: (A^T sums A + bias + residual) * scale, of which height times width pixels are inside the map.
template <int M, typename T>
static void transform_output(const float* sums, int64_t per_frequency, int64_t channels, const float* bias, float scale,
                             int64_t height, int64_t width, const Destination<T>& to) {
  constexpr int N = kSide<M>;
  for (int64_t c = 0; c < channels; c += kLanes) {
    // the next tile's
    for (int i = 0; i < M; ++i)
      for (int j = M; j < 2 * M; ++j) fetch(to, i * to.per_row + j * to.per_pixel + c);
    Vector half[M][N];
    for (int j = 0; j < N; ++j) {
      Vector x[N], y[M];
      for (int i = 0; i < N; ++i) read(sums + (i * N + j) * per_frequency + c, x[i]);
      output_matrix<M>(x, y);
      for (int i = 0; i < M; ++i) half[i][j] = y[i];
    }
    const int64_t n = channels - c < kLanes ? channels - c : kLanes;
    for (int i = 0; i < M && i < height; ++i) {
      Vector y[M];
      output_matrix<M>(half[i], y);
      for (int j = 0; j < M && j < width; ++j) {
        float pixel[kLanes];
        write(pixel, y[j]);
        const int64_t at = i * to.per_row + j * to.per_pixel + c;
        const T* residual = to.residual ? to.residual + at : nullptr;
        if (n == kLanes)
          finish(pixel, bias + c, residual, scale, to.out + at, kLanes);
        else
          finish(pixel, bias + c, residual, scale, to.out + at, n);
      }
    }
  }
}

template <int M, typename T>
static ConvolutionKernels<T> convolution_kernels(bool silu) {
  return {silu ? gather<true, T> : gather<false, T>,
          transform_input<M>,
          multiply,
          transform_output<M, T>,
          write_pixels<T>,
          pack_columns<T>,
          transform_weights<M, T>};
}
