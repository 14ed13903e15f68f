// Convolutions as products of matrices, NHWC, with the input normalised and activated on the way in and bias and
// residual added on the way out: 3x3 by Winograd's F(2x2, 3x3) or F(4x4, 3x3), or, as 1x1 too, by columns (im2col).
// Formulas: kernels/fastsd_kernels/conv2d/README.md.
//
// A block of tiles goes through three steps, each spread over the threads: the input is transformed into one matrix
// [tiles, channels] per frequency, each is multiplied with its packed weights, and the products are transformed back.
// A block is as large as the caches take, so that the weights are read as seldom, and the matrices as fast, as can be.
// Columns of a map that is large enough are cut into tasks instead, each with all steps, in a thread's own cache.
// How the work is cut depends on the shape alone, and no sum is shared between threads: any number gives the same bits.

#include "conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include "elements.h"
#include "host.h"
#include "isa.h"

#define FASTSD_KERNEL "conv2d_kernel.h"
#include "foreach_isa.h"

namespace fastsd {
namespace {

using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kBlockBytes = 12 * 1024 * 1024;  // of a block's matrices: what stays in a last-level cache
constexpr int64_t kChunk = 64;                     // channels that are gathered at once
constexpr int64_t kMostPixels = 64;                // of one row that are computed at once
constexpr int64_t kWidestVector = 16;              // floats
constexpr int64_t kTaskBytes = 640 * 1024;         // of a task's columns: what stays in a core's own cache
constexpr int64_t kTaskRows = 128;                 // of the product: enough to pay for reading the weights
constexpr int64_t kFewestTasks = 4;

// A stride of n floats or a little more, such that 36 of them fall on as many sets of a cache.
int64_t spread(int64_t n) {
  constexpr int64_t page = 1024;
  return round_up(n, page) + 3 * kWidestVector;
}

// The matrices of an algorithm. Tiles are m times m pixels of the result: for m = 1 each is one product with all
// weights that reach it, for m = 2 and 4 a product per frequency of Winograd's.
struct Form {
  int64_t m, kernel, stride;

  int64_t frequencies() const { return m == 1 ? 1 : (m + 2) * (m + 2); }
  int64_t taps() const { return m == 1 ? kernel * kernel : 1; }  // pixels side by side in a row of the matrix
  // rows or columns of the input that so many of the result are computed from
  int64_t reach(int64_t results) const { return (results - 1) * stride + kernel; }
  int64_t packed_size(int64_t out_channels, int64_t channels) const {
    return frequencies() * taps() * channels * round_up(out_channels, kPanel);
  }

  void check() const {
    if (m != 1 && m != 2 && m != 4) throw std::invalid_argument("m: expected 1, 2 or 4");
    if (kernel != 3 && (kernel != 1 || m != 1)) throw std::invalid_argument("kernel: expected 3, or 1 for m = 1");
    if (stride != 1 && (stride != 2 || m != 1)) throw std::invalid_argument("stride: expected 1, or 2 for m = 1");
  }
};

template <typename T>
ConvolutionKernels<T> kernels_for(Isa isa, int64_t m, bool silu) {
  auto of_size = [&](auto one, auto two, auto four) { return m == 1 ? one(silu) : m == 2 ? two(silu) : four(silu); };
  switch (isa) {
    case Isa::avx512:
      return of_size(avx512::convolution_kernels<1, T>, avx512::convolution_kernels<2, T>,
                     avx512::convolution_kernels<4, T>);
    case Isa::avx2:
      return of_size(avx2::convolution_kernels<1, T>, avx2::convolution_kernels<2, T>, avx2::convolution_kernels<4, T>);
    default:
      return of_size(baseline::convolution_kernels<1, T>, baseline::convolution_kernels<2, T>,
                     baseline::convolution_kernels<4, T>);
  }
}

template <typename T>
struct Convolution {
  const T *x, *skip;  // NHWC; channels below x_channels are x's, the others skip's
  int64_t batch, x_channels, channels, height, width;
  const int32_t *row_map, *column_map;  // from the padded, enlarged map to the source, -1 for padding
  const float* affine;                  // [batch, 3, channels], may be null
  const float* weights;                 // packed
  const float *bias, *channel_bias;     // [out_channels], [batch or 1, out_channels]; each may be null
  int64_t channel_bias_stride;
  const T* residual;
  float scale;
  T* out;
  int64_t out_channels, out_height, out_width;
  Form form;
  ConvolutionKernels<T> kernels;

  // How the result is cut into strips: pieces of a row of tiles.
  struct Strips {
    int64_t tile_rows, per_row, width, count;
  };

  Strips strips() const {
    const int64_t tile_rows = ceil_div(out_height, form.m), tile_columns = ceil_div(out_width, form.m);
    const int64_t per_row = ceil_div(tile_columns, kMostPixels / form.m);
    return {tile_rows, per_row, ceil_div(tile_columns, per_row), batch * tile_rows * per_row};
  }

  // Where a tile of a strip begins in the result.
  struct Place {
    int64_t sample, row, column;
  };

  Place place(const Strips& all, int64_t strip, int64_t tile = 0) const {
    return {strip / (all.tile_rows * all.per_row), strip / all.per_row % all.tile_rows * form.m,
            (strip % all.per_row * all.width + tile) * form.m};
  }

  void run() const {
    const Strips all = strips();
    if (form.m == 1) {
      const int64_t depth = round_up(form.taps() * channels, kWidestVector);
      const int64_t rows = std::min(kTaskRows, kTaskBytes / (depth * int64_t(sizeof(float))));
      const int64_t per_task = std::max<int64_t>(1, rows / all.width);
      if (ceil_div(all.count, per_task) >= kFewestTasks) return run_tasks(all, per_task, depth);
    }
    run_blocks(all);
  }

  // Columns, strip by strip: each task gathers those of a few, and multiplies them panel by panel.
  void run_tasks(const Strips& all, int64_t per_task, int64_t depth) const {
    const int64_t panels = ceil_div(out_channels, kPanel), columns = panels * kPanel;
    static thread_local AlignedFloats kept;
    float* biases = kept.at_least(bias_rows() * columns);
    fill_biases(biases, columns);
    parallel_for(0, ceil_div(all.count, per_task), 1, [&](int64_t begin, int64_t end) {
      static thread_local AlignedFloats matrix;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * per_task, count = std::min(per_task, all.count - first), rows = count * all.width;
        float* inputs = matrix.at_least(rows * (depth + kPanel));
        float* sums = inputs + rows * depth;
        for (int64_t s = 0; s < count; ++s)
          for (int64_t c = 0; c < channels; c += kChunk)
            gather_columns(all, first + s, c, inputs + s * all.width * depth + c, depth);
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t k = p * kPanel, wanted = std::min(kPanel, out_channels - k);
          kernels.multiply(inputs, rows, form.taps() * channels, depth, weights + p * form.taps() * channels * kPanel,
                           sums, kPanel);
          for (int64_t row = 0; row < rows; ++row)
            finish(place(all, first + row / all.width, row % all.width), sums + row * kPanel, 0, k, wanted, biases,
                   columns);
        }
      }
    });
  }

  // Block by block, the steps one after the other.
  void run_blocks(const Strips& all) const {
    const int64_t m = form.m, frequencies = form.frequencies(), taps = form.taps();
    const int64_t strips = all.count, strip = all.width;
    const int64_t depth = round_up(taps * channels, kWidestVector), panels = ceil_div(out_channels, kPanel),
                  columns = panels * kPanel;
    const int64_t strip_bytes = frequencies * strip * (depth + columns) * int64_t(sizeof(float));
    const int64_t blocks = ceil_div(strips, std::max<int64_t>(1, kBlockBytes / strip_bytes));
    const int64_t strips_per_block = ceil_div(strips, blocks), tiles = strips_per_block * strip;
    const int64_t per_input = spread(tiles * depth), per_sum = spread(tiles * columns);

    static thread_local AlignedFloats kept;
    float* inputs = kept.at_least(frequencies * (per_input + per_sum) + bias_rows() * columns);
    float* sums = inputs + frequencies * per_input;
    float* biases = sums + frequencies * per_sum;
    fill_biases(biases, columns);

    const int64_t chunks = ceil_div(channels, kChunk);
    for (int64_t first = 0; first < strips; first += strips_per_block) {
      const int64_t count = std::min(strips_per_block, strips - first);
      parallel_for(0, count * chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t s = task / chunks, c = task % chunks * kChunk;
          float* to = inputs + s * strip * depth + c;
          if (m == 1)
            gather_columns(all, first + s, c, to, depth);
          else
            gather_tiles(all, first + s, c, to, per_input, depth);
        }
      });
      const int64_t rows = count * strip;
      parallel_for(0, frequencies * panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t f = task / panels, p = task % panels;
          kernels.multiply(inputs + f * per_input, rows, taps * channels, depth,
                           weights + task * taps * channels * kPanel, sums + f * per_sum + p * kPanel, columns);
        }
      });
      parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile)
          finish(place(all, first + tile / strip, tile % strip), sums + tile * columns, per_sum, 0, out_channels,
                 biases, columns);
      });
    }
    kept.release_above(2 * kBlockBytes / int64_t(sizeof(float)));
  }

  // How many results a strip has that begins there.
  int64_t results(const Strips& all, const Place& at) const {
    return std::min(all.width, ceil_div(out_width - at.column, form.m)) * form.m;
  }

  Window window(const Place& at, int64_t results) const {
    return {row_map + at.row * form.stride, column_map + at.column * form.stride, form.reach(form.m),
            form.reach(results)};
  }

  // kChunk channels of a strip's columns: the pixels that each of its results is computed from, side by side.
  void gather_columns(const Strips& all, int64_t strip, int64_t c, float* to, int64_t depth) const {
    const Place at = place(all, strip);
    const int64_t here = results(all, at);
    if (form.taps() == 1 && form.stride == 1) return gather(at.sample, c, window(at, here), to, depth);
    static thread_local AlignedFloats kept;
    const int64_t width = form.reach(here);
    float* pixels = kept.at_least(form.kernel * width * kChunk);
    gather(at.sample, c, window(at, here), pixels, kChunk);
    const int64_t bytes = std::min(kChunk, channels - c) * int64_t(sizeof(float));
    for (int64_t t = 0; t < here; ++t)
      for (int64_t i = 0; i < form.kernel; ++i)
        for (int64_t j = 0; j < form.kernel; ++j)
          std::memcpy(to + t * depth + (i * form.kernel + j) * channels,
                      pixels + (i * width + t * form.stride + j) * kChunk, bytes);
  }

  // kChunk channels of a strip's tiles, transformed: one matrix per frequency.
  void gather_tiles(const Strips& all, int64_t strip, int64_t c, float* to, int64_t per_input, int64_t depth) const {
    static thread_local AlignedFloats kept;
    const Place at = place(all, strip);
    const int64_t here = results(all, at), width = form.reach(here);
    float* pixels = kept.at_least(form.reach(form.m) * width * kChunk);
    gather(at.sample, c, window(at, here), pixels, kChunk);
    kernels.transform_input(pixels, width * kChunk, kChunk, here / form.m,
                            round_up(std::min(kChunk, channels - c), kWidestVector), to, per_input, depth);
  }

  // Channels [k, k + wanted) of a tile of the result, where it is inside the map.
  void finish(const Place& at, const float* sums, int64_t per_sum, int64_t k, int64_t wanted, const float* biases,
              int64_t columns) const {
    if (at.column >= out_width) return;
    const int64_t to = ((at.sample * out_height + at.row) * out_width + at.column) * out_channels + k;
    kernels.transform_output(sums, per_sum, wanted, biases + (bias_rows() > 1 ? at.sample : 0) * columns + k, scale,
                             out_height - at.row, out_width - at.column,
                             {out + to, residual ? residual + to : nullptr, out_width * out_channels, out_channels});
  }

  int64_t bias_rows() const { return channel_bias_stride ? batch : 1; }

  void fill_biases(float* biases, int64_t columns) const {
    for (int64_t b = 0; b < bias_rows(); ++b)
      for (int64_t k = 0; k < out_channels; ++k)
        biases[b * columns + k] =
            (bias ? bias[k] : 0.0f) + (channel_bias ? channel_bias[b * channel_bias_stride + k] : 0.0f);
  }

  // The channels [first, first + kChunk) of a window, as many as there are.
  void gather(int64_t b, int64_t first, Window window, float* pixels, int64_t to_pixel) const {
    const int64_t last = std::min(first + kChunk, channels), skip_channels = channels - x_channels;
    auto part = [&](const T* data, int64_t per_pixel, int64_t c, int64_t stop, int64_t offset) {
      if (c >= stop) return;
      const Channels<T> from{data + b * height * width * per_pixel + c - offset, stop - c, width * per_pixel,
                             per_pixel};
      Normalisation norm{};
      if (affine) {
        const float* p = affine + b * 3 * channels + c;
        norm = {p, p + channels, p + 2 * channels};
      }
      kernels.gather(from, norm, window, pixels + (c - first), to_pixel);
    };
    part(x, x_channels, first, std::min(last, x_channels), 0);
    part(skip, skip_channels, std::max(first, x_channels), last, x_channels);
  }
};

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// All tensors dense and NHWC, parameters in float32, out not empty: cpu_impl.py sees to it.
void conv2d(Tensor x, std::optional<Tensor> skip, std::optional<Tensor> affine, bool silu, Tensor row_map,
            Tensor column_map, Tensor weights, int64_t m, int64_t kernel, int64_t stride, std::optional<Tensor> bias,
            std::optional<Tensor> channel_bias, std::optional<Tensor> residual, double scale, int64_t isa, Tensor out) {
  const int64_t channels = x.size(1) + (skip ? skip->size(1) : 0), out_channels = out.size(1);
  const Form form{m, kernel, stride};
  form.check();
  if (out.numel() == 0 || weights.numel() != form.packed_size(out_channels, channels))
    throw std::invalid_argument("weights: expected what pack_conv2d gives for these channels");
  if (row_map.numel() < form.reach(round_up(out.size(2), m)) ||
      column_map.numel() < form.reach(round_up(out.size(3), m)))
    throw std::invalid_argument("row_map, column_map: expected one entry for every pixel of every tile");
  with_element(x, [&](auto element) {
    using T = decltype(element);
    Convolution<T>{static_cast<const T*>(x.const_data_ptr()),
                   data_or_null<T>(skip),
                   x.size(0),
                   x.size(1),
                   channels,
                   x.size(2),
                   x.size(3),
                   static_cast<const int32_t*>(row_map.const_data_ptr()),
                   static_cast<const int32_t*>(column_map.const_data_ptr()),
                   data_or_null<float>(affine),
                   static_cast<const float*>(weights.const_data_ptr()),
                   data_or_null<float>(bias),
                   data_or_null<float>(channel_bias),
                   channel_bias && channel_bias->size(0) > 1 ? out_channels : 0,
                   data_or_null<T>(residual),
                   float(scale),
                   static_cast<T*>(out.mutable_data_ptr()),
                   out_channels,
                   out.size(2),
                   out.size(3),
                   form,
                   kernels_for<T>(checked_isa(isa), m, silu)}
        .run();
  });
}

// G of Lavin and Gray, 2015: a tile's N frequencies from the R weights of a side of the kernel.
template <int N, int R>
struct WeightMatrix {
  double g[N][R];
};
constexpr WeightMatrix<4, 3> kMatrix2{{{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}}};
constexpr WeightMatrix<6, 3> kMatrix4{{{1. / 4, 0, 0},
                                       {-1. / 6, -1. / 6, -1. / 6},
                                       {-1. / 6, 1. / 6, -1. / 6},
                                       {1. / 24, 1. / 12, 1. / 6},
                                       {1. / 24, -1. / 12, 1. / 6},
                                       {0, 0, 1}}};

// U = G w G^T of weight [out, in, R, R], as packed[frequency][panel][in][kPanel]; the columns past the last are zero.
template <int N, int R, typename T>
void pack(const WeightMatrix<N, R>& matrix, const Tensor& weight, float* packed) {
  const T* data = static_cast<const T*>(weight.const_data_ptr());
  const int64_t out_channels = weight.size(0), channels = weight.size(1), panels = ceil_div(out_channels, kPanel);
  const int64_t per_out = weight.stride(0), per_in = weight.stride(1), per_row = weight.stride(2),
                per_column = weight.stride(3);
  const auto& g = matrix.g;
  parallel_for(0, panels * channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / channels, c = task % channels, here = std::min(kPanel, out_channels - p * kPanel);
      double w[R][R][kPanel] = {}, half[N][R][kPanel];
      for (int64_t k = 0; k < here; ++k)
        for (int i = 0; i < R; ++i)
          for (int j = 0; j < R; ++j)
            w[i][j][k] = load(data + (p * kPanel + k) * per_out + c * per_in + i * per_row + j * per_column);
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < R; ++j)
          for (int64_t k = 0; k < kPanel; ++k) {
            half[i][j][k] = 0;
            for (int e = 0; e < R; ++e) half[i][j][k] += g[i][e] * w[e][j][k];
          }
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) {
          float* to = packed + (((i * N + j) * panels + p) * channels + c) * kPanel;
          for (int64_t k = 0; k < kPanel; ++k) {
            double u = 0;
            for (int e = 0; e < R; ++e) u += g[j][e] * half[i][e][k];
            to[k] = float(u);
          }
        }
    }
  });
}

// The weights as they are, as packed[panel][row][column][in][kPanel].
template <typename T>
void pack_taps(const Tensor& weight, float* packed) {
  const T* data = static_cast<const T*>(weight.const_data_ptr());
  const int64_t out_channels = weight.size(0), channels = weight.size(1), side = weight.size(2);
  const int64_t per_out = weight.stride(0), per_in = weight.stride(1), per_row = weight.stride(2),
                per_column = weight.stride(3), panels = ceil_div(out_channels, kPanel);
  parallel_for(0, panels * channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / channels, c = task % channels, here = std::min(kPanel, out_channels - p * kPanel);
      for (int64_t i = 0; i < side; ++i)
        for (int64_t j = 0; j < side; ++j) {
          float* to = packed + ((p * side * side + i * side + j) * channels + c) * kPanel;
          for (int64_t k = 0; k < kPanel; ++k) {
            const T* at = data + (p * kPanel + k) * per_out + c * per_in + i * per_row + j * per_column;
            to[k] = k < here ? load(at) : 0.0f;
          }
        }
    }
  });
}

void pack_conv2d(Tensor weight, int64_t m, Tensor out) {
  const Form form{m, weight.size(2), 1};
  form.check();
  if (weight.size(3) != form.kernel) throw std::invalid_argument("weight: expected a square kernel");
  if (out.numel() != form.packed_size(weight.size(0), weight.size(1)))
    throw std::invalid_argument("out: expected [frequencies, panels, depth, panel]");
  float* packed = static_cast<float*>(out.mutable_data_ptr());
  with_element(weight, [&](auto element) {
    using T = decltype(element);
    if (m == 1) pack_taps<T>(weight, packed);
    if (m == 2) pack<4, 3, T>(kMatrix2, weight, packed);
    if (m == 4) pack<6, 3, T>(kMatrix4, weight, packed);
  });
}

// A digest of the data, any memory format, without gaps: packed_weights.py sees to it.
int64_t digest(Tensor weight, int64_t isa) {
  constexpr int64_t chunk = 256 * 1024;
  const auto* data = static_cast<const unsigned char*>(weight.const_data_ptr());
  const int64_t n = weight.numel() * weight.element_size(), chunks = ceil_div(n, chunk);
  std::vector<uint64_t> of_chunk(chunks);
  const Isa which = checked_isa(isa);
  const auto digest_of = which == Isa::avx512 ? avx512::digest_of
                         : which == Isa::avx2 ? avx2::digest_of
                                              : baseline::digest_of;
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) of_chunk[k] = digest_of(data + k * chunk, std::min(chunk, n - k * chunk));
  });
  uint64_t all = uint64_t(n);
  for (uint64_t part : of_chunk) {
    all = (all ^ part) * 0xbf58476d1ce4e5b9;
    all ^= all >> 29;
  }
  return int64_t(all);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsd_cpu, m) {
  m.def(
      "conv2d(Tensor x, Tensor? skip, Tensor? affine, bool silu, Tensor row_map, Tensor column_map, "
      "Tensor weights, int m, int kernel, int stride, Tensor? bias, Tensor? channel_bias, Tensor? residual, float "
      "scale, int isa, "
      "Tensor(a!) out) -> ()");
  m.def("pack_conv2d(Tensor weight, int m, Tensor(a!) out) -> ()");
  m.def("digest(Tensor weight, int isa) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("pack_conv2d", TORCH_BOX(&pack_conv2d));
  m.impl("digest", TORCH_BOX(&digest));
}

}  // namespace fastsd
