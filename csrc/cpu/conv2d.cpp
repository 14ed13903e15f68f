// Convolutions as products of matrices, NHWC, with the input normalised and activated on the way in and bias and
// residual added on the way out: 3x3 by Winograd's F(2x2, 3x3) or F(4x4, 3x3), or, as 1x1 too, by columns (im2col).
// Formulas: kernels/fastsd_kernels/conv2d/README.md.
//
// A block of tiles goes through three steps, each spread over the threads: the input is transformed into one matrix
// [tiles, channels] per frequency, each is multiplied with its weights, and the products are transformed back. A block
// is as large as the caches take, so that the weights are read as seldom, and the matrices as fast, as can be. Weights
// are read as they are and transformed where they are used, some channels of a panel at a time: that takes no longer
// than to read transformed copies from memory, which are up to four times as large. Columns of a map that is large
// enough are cut into tasks instead, each with all steps, in a thread's own cache. How the work is cut depends on the
// shape alone, and no sum is shared between threads: any number gives the same bits.

#include "conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "elements.h"
#include "host.h"
#include "isa.h"

#define FASTSD_KERNEL "conv2d_kernel.h"
#include "foreach_isa.h"

namespace fastsd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlockBytes = 24 * 1024 * 1024;  // of a block's matrices: more blocks read the weights more often
constexpr int64_t kChunk = kDepthBlock;            // channels that are gathered at once
constexpr int64_t kMostPixels = 64;                // of one row that are computed at once
constexpr int64_t kWidestVector = 16;              // floats
constexpr int64_t kTaskBytes = 768 * 1024;         // of a task's columns: what stays in a core's own cache
constexpr int64_t kMostTaskRows = 128, kFewestTaskRows = 64;  // of the product: what pays for reading the weights anew
constexpr int64_t kMostTaskWeights = 8 * 1024 * 1024;         // bytes, which a cache that all cores share can hold
constexpr int64_t kFewestTasks = 4;
constexpr int64_t kTilesTogether = 16;  // whose results are written panel by panel
// Of weights that are used at once. Few tiles are done with them so soon that they had better stay in a core's own
// cache; with many, sums are the more often read and written anew the fewer channels are summed up at once.
constexpr int64_t kFewTiles = 48;
constexpr int64_t kTransformedForFew = 768 * 1024, kTransformedForMany = 3 * 1024 * 1024;

// Such that 36 matrices, that far beyond whole pages apart, fall on as many sets of a cache.
constexpr int64_t kSpread = 3 * kWidestVector;

int64_t spread(int64_t floats) {
  constexpr int64_t page = 1024;
  return round_up(floats, page) + kSpread;
}

template <typename T>
ConvolutionKernels<T> kernels_for(Isa isa, int64_t m, bool silu) {
  // columns are copied, not transformed: either will do
  auto of_size = [&](auto two, auto four) { return m == 4 ? four(silu) : two(silu); };
  switch (isa) {
    case Isa::avx512:
      return of_size(avx512::convolution_kernels<2, T>, avx512::convolution_kernels<4, T>);
    case Isa::avx2:
      return of_size(avx2::convolution_kernels<2, T>, avx2::convolution_kernels<4, T>);
    default:
      return of_size(baseline::convolution_kernels<2, T>, baseline::convolution_kernels<4, T>);
  }
}

template <typename T>
struct Convolution {
  const T *x, *skip;  // NHWC; channels below x_channels are x's, the others skip's
  int64_t batch, x_channels, channels, height, width;
  const int32_t *row_map, *column_map;  // from the padded, enlarged map to the source, -1 for padding
  const float* affine;                  // [batch, 3, channels], may be null
  const T* weights;                     // [out_channels, channels, taps], or taps first; or one for each expert
  bool taps_last;
  const float* alpha;  // [batch, experts]: weights are mixed anew for each sample; or null
  int64_t expert_count;
  const float *bias, *channel_bias;  // [out_channels], [batch or 1, out_channels]; each may be null
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
    if (form.m == 1 && !alpha) {
      const int64_t depth = round_up(form.taps() * channels, kWidestVector);
      const int64_t rows = std::min(kMostTaskRows, kTaskBytes / (depth * int64_t(sizeof(float))));
      const int64_t per_task = rows / all.width;
      const int64_t weight_bytes = round_up(out_channels, kPanel) * depth * int64_t(sizeof(float));
      if (per_task * all.width >= kFewestTaskRows && weight_bytes <= kMostTaskWeights &&
          ceil_div(all.count, per_task) >= kFewestTasks)
        return run_tasks(all, per_task, depth);
    }
    run_blocks(all);
  }

  // Columns, strip by strip: each task gathers those of a few, and multiplies them panel by panel with all weights,
  // which are packed before.
  void run_tasks(const Strips& all, int64_t per_task, int64_t depth) const {
    const int64_t panels = ceil_div(out_channels, kPanel), columns = panels * kPanel,
                  per_panel = form.taps() * channels * kPanel;
    static thread_local AlignedFloats kept;
    float* panel = kept.at_least(panels * per_panel + bias_rows() * columns);
    float* biases = panel + panels * per_panel;
    fill_biases(biases, columns);
    share_out(panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        kernels.pack_columns(weights_of(p, 0), of_panel(p), 0, per_panel / kPanel, panel + p * per_panel);
    });
    share_out(ceil_div(all.count, per_task), 1, [&](int64_t begin, int64_t end) {
      static thread_local AlignedFloats matrix;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * per_task, count = std::min(per_task, all.count - first), rows = count * all.width;
        float* inputs = matrix.at_least(rows * (depth + kPanel));
        float* sums = inputs + rows * depth;
        for (int64_t s = 0; s < count; ++s)
          for (int64_t c = 0; c < channels; c += kChunk)
            gather_columns(all, first + s, c, inputs + s * all.width * depth, depth);
        for (int64_t p = 0; p < panels; ++p) {
          Ahead none;
          kernels.multiply(Matrix::of_rows(inputs, depth), rows, per_panel / kPanel, panel + p * per_panel, sums,
                           kPanel, false, none);
          for (int64_t s = 0; s < count; ++s) {
            const Place at = place(all, first + s);
            write_pixels(at, results(all, at), sums + s * all.width * kPanel, kPanel, p * kPanel, of_panel(p), biases,
                         columns);
          }
        }
      }
      matrix.release_above(kBlockBytes / int64_t(sizeof(float)));
    });
    kept.release_above(2 * kBlockBytes / int64_t(sizeof(float)));
  }

  // How many output channels a panel of the weights has.
  int64_t of_panel(int64_t p) const { return std::min(kPanel, out_channels - p * kPanel); }

  // Some strips and their matrices: of tiles the inputs [frequency][block of channels][tile][kDepthBlock], of columns
  // [pixel][depth]; sums [panel][frequency][tile][kPanel]. What is read together lies together.
  struct Block {
    int64_t first, count, rows;  // strips, and tiles in them
    float *inputs, *sums;
    int64_t per_input, per_sum, frequencies;  // of one frequency
    int64_t per_row, per_block;

    Matrix inputs_of(int64_t f) const { return {inputs + f * per_input, per_row, per_block}; }
    float* sums_of(int64_t panel, int64_t f, int64_t row) const {
      return sums + (panel * frequencies + f) * per_sum + row * kPanel;
    }
  };

  // Block by block, the steps one after the other.
  void run_blocks(const Strips& all) const {
    const int64_t frequencies = form.frequencies(), strip = all.width;
    const int64_t depth =
        is_transformed() ? round_up(channels, kDepthBlock) : round_up(form.taps() * channels, kWidestVector);
    const int64_t panels = ceil_div(out_channels, kPanel), columns = panels * kPanel;
    const int64_t strip_bytes = frequencies * strip * (depth + columns) * int64_t(sizeof(float));
    const int64_t most = std::max<int64_t>(1, kBlockBytes / strip_bytes);
    const int64_t whole = block_limit(all);
    const int64_t strips_per_block = most < whole ? ceil_div(whole, ceil_div(whole, most)) : most / whole * whole;
    const int64_t tiles = std::min(strips_per_block, all.count) * strip;
    const int64_t per_input = spread(tiles * depth), per_sum = tiles * kPanel + kSpread;

    static thread_local AlignedFloats kept;
    float* inputs = kept.at_least(frequencies * (per_input + panels * per_sum) + bias_rows() * columns);
    float* sums = inputs + frequencies * per_input;
    float* biases = sums + panels * frequencies * per_sum;
    fill_biases(biases, columns);

    for (int64_t first = 0, count; first < all.count; first += count) {
      count = std::min(strips_per_block, all.count - first);
      if (most < whole) count = std::min(count, whole - first % whole);
      const int64_t rows = count * strip;
      const Block block{first,
                        count,
                        rows,
                        inputs,
                        sums,
                        per_input,
                        per_sum,
                        frequencies,
                        is_transformed() ? kDepthBlock : depth,
                        is_transformed() ? rows * kDepthBlock : kDepthBlock};
      gather(all, block);
      multiply(all, block);
      share_out(rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t some = begin; some < end; some += kTilesTogether)
          for (int64_t p = 0; p < panels; ++p)
            for (int64_t tile = some; tile < std::min(end, some + kTilesTogether); ++tile)
              write_tile(place(all, first + tile / strip, tile % strip), block.sums_of(p, 0, tile), per_sum, p, biases,
                         columns);
      });
    }
    kept.release_above(2 * kBlockBytes / int64_t(sizeof(float)));
  }

  bool is_transformed() const { return form.m > 1; }

  // What a block should not go beyond, or hold a multiple of: with weights of each sample a sample, else all.
  int64_t block_limit(const Strips& all) const { return alpha ? all.tile_rows * all.per_row : all.count; }

  // The inputs of a block.
  void gather(const Strips& all, const Block& block) const {
    const int64_t chunks = ceil_div(channels, kChunk);
    share_out(block.count * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t s = task / chunks, c = task % chunks * kChunk, row = s * all.width;
        if (is_transformed())
          gather_tiles(all, block.first + s, c, block.inputs + c / kDepthBlock * block.per_block + row * block.per_row,
                       block.per_input, block.per_row);
        else
          gather_columns(all, block.first + s, c, block.inputs + row * block.per_row, block.per_row);
      }
    });
  }

  // The products of a block, panel by panel of the weights: all its rows at once, or with weights of each sample those
  // of a sample. A panel's experts are read from memory for the first sample of a block alone.
  void multiply(const Strips& all, const Block& block) const {
    const int64_t per_sample = block_limit(all), sample = block.first / per_sample;
    const int64_t samples = (block.first + block.count - 1) / per_sample - sample + 1;
    const int64_t panels = ceil_div(out_channels, kPanel), wanted = form.taps() * channels;
    const int64_t at_once = round_up(ceil_div(wanted, ceil_div(wanted, most_at_once(all))), kDepthBlock);
    const int64_t per_frequency = spread(at_once * kPanel);
    share_out(panels * samples, 1, [&](int64_t begin, int64_t end) {
      static thread_local AlignedFloats scratch;
      float* panel = scratch.at_least(form.frequencies() * per_frequency);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task / samples, b = sample + task % samples;
        const int64_t from = std::max(block.first, b * per_sample),
                      until = std::min(block.first + block.count, (b + 1) * per_sample);
        const int64_t row = (from - block.first) * all.width, rows = (until - from) * all.width;
        const Weights<T> of_task = weights_of(p, b);
        for (int64_t c = 0; c < wanted; c += at_once) {
          const int64_t n = std::min(at_once, wanted - c), next = c + n < wanted ? c + n : 0;
          if (is_transformed())
            kernels.transform_weights(of_task, of_panel(p), c, n, panel, per_frequency);
          else
            kernels.pack_columns(of_task, of_panel(p), c, n, panel);
          Ahead ahead;
          if (next > 0)
            ahead = rows_of(of_task, of_panel(p), next, std::min(at_once, wanted - next));
          else if (task + 1 < end && samples == 1)
            ahead = rows_of(weights_of(p + 1, b), of_panel(p + 1), 0, std::min(at_once, wanted));
          for (int64_t f = 0; f < form.frequencies(); ++f) {
            Matrix inputs = block.inputs_of(f);
            inputs.data = inputs.at(row, c / kDepthBlock);
            ahead.matrix = f + 1 < form.frequencies() ? inputs.data + block.per_input
                                                      : block.inputs_of(0).at(row, next / kDepthBlock);
            kernels.multiply(inputs, rows, n, panel + f * per_frequency, block.sums_of(p, f, row), kPanel, c > 0,
                             ahead);
          }
        }
      }
    });
  }

  // How many channels' weights are used at once, or how much of a column's depth; whole blocks.
  int64_t most_at_once(const Strips& all) const {
    if (!is_transformed()) return kPanelDepth;
    const int64_t bytes = block_limit(all) * all.width < kFewTiles ? kTransformedForFew : kTransformedForMany;
    return bytes / (form.frequencies() * kPanel * int64_t(sizeof(float))) / kDepthBlock * kDepthBlock;
  }

  // What pack_columns() or transform_weights() will read of some weights; nothing of a mixture, which sees to it
  // itself.
  Ahead rows_of(const Weights<T>& from, int64_t count, int64_t first, int64_t wanted) const {
    if (from.alpha) return {};
    constexpr int64_t size = sizeof(T);
    if (form.m == 1) return {{{from.rows + first, count, wanted * size, from.per_row * size}}};
    if (taps_last) return {{{from.rows + first * from.taps, count, wanted * from.taps * size, from.per_row * size}}};
    return {{{from.rows + first, count * from.taps, wanted * size, channels * size}}};
  }

  // Those of a panel, for a sample.
  Weights<T> weights_of(int64_t p, int64_t b) const {
    const int64_t taps = form.kernel * form.kernel, per_row = taps * channels;
    return {weights + p * kPanel * per_row,
            per_row,
            channels,
            taps,
            taps_last,
            alpha ? alpha + b * expert_count : nullptr,
            expert_count,
            out_channels * per_row};
  }

  // How many results a strip has that begins there.
  int64_t results(const Strips& all, const Place& at) const {
    return std::min(all.width, ceil_div(out_width - at.column, form.m)) * form.m;
  }

  Window window(const Place& at, int64_t results) const {
    return {row_map + at.row * form.stride, column_map + at.column * form.stride, form.reach(form.m),
            form.reach(results)};
  }

  // kChunk channels, from the c-th on, of a strip's columns: all that each of its results is computed from.
  void gather_columns(const Strips& all, int64_t strip, int64_t c, float* to, int64_t depth) const {
    const Place at = place(all, strip);
    const int64_t here = results(all, at);
    if (form.taps() == 1 && form.stride == 1) return gather(at.sample, c, window(at, here), to + c, depth);
    static thread_local AlignedFloats kept;
    const int64_t width = form.reach(here);
    float* pixels = kept.at_least(form.kernel * width * kChunk);
    gather(at.sample, c, window(at, here), pixels, kChunk);
    const int64_t wanted = std::min(kChunk, channels - c), taps = form.taps();
    for (int64_t t = 0; t < here; ++t)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* from = pixels + (tap / form.kernel * width + t * form.stride + tap % form.kernel) * kChunk;
        float* column = to + t * depth;
        if (taps_last)
          for (int64_t i = 0; i < wanted; ++i) column[(c + i) * taps + tap] = from[i];
        else
          std::memcpy(column + tap * channels + c, from, wanted * sizeof(float));
      }
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

  // A panel's channels of a tile of the result, where it is inside the map.
  void write_tile(const Place& at, const float* sums, int64_t per_sum, int64_t p, const float* biases,
                  int64_t columns) const {
    if (at.column >= out_width) return;
    if (!is_transformed()) return write_pixels(at, 1, sums, kPanel, p * kPanel, of_panel(p), biases, columns);
    kernels.transform_output(sums, per_sum, of_panel(p), bias_of(at, biases, columns) + p * kPanel, scale,
                             out_height - at.row, out_width - at.column, destination(at, p * kPanel));
  }

  // Channels [k, k + wanted) of pixels side by side.
  void write_pixels(const Place& at, int64_t pixels, const float* sums, int64_t per_sum, int64_t k, int64_t wanted,
                    const float* biases, int64_t columns) const {
    kernels.write_pixels(sums, pixels, per_sum, wanted, bias_of(at, biases, columns) + k, scale, destination(at, k));
  }

  Destination<T> destination(const Place& at, int64_t k) const {
    const int64_t to = ((at.sample * out_height + at.row) * out_width + at.column) * out_channels + k;
    return {out + to, residual ? residual + to : nullptr, out_width * out_channels, out_channels};
  }

  const float* bias_of(const Place& at, const float* biases, int64_t columns) const {
    return biases + (bias_rows() > 1 ? at.sample : 0) * columns;
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

// All tensors dense and NHWC, parameters in float32, out not empty: cpu_impl.py sees to it. weights: as they are, dense
// in either layout, x's dtype; with alpha [batch, experts] the experts, contiguous.
void conv2d(Tensor x, std::optional<Tensor> skip, std::optional<Tensor> affine, bool silu, Tensor row_map,
            Tensor column_map, Tensor weights, int64_t m, int64_t kernel, int64_t stride, std::optional<Tensor> bias,
            std::optional<Tensor> channel_bias, std::optional<Tensor> residual, double scale, int64_t isa, Tensor out,
            std::optional<Tensor> alpha) {
  const int64_t channels = x.size(1) + (skip ? skip->size(1) : 0), out_channels = out.size(1);
  const int64_t experts = alpha ? alpha->size(1) : 0, plain = out_channels * channels * kernel * kernel;
  const Form form{m, kernel, stride};
  form.check();
  if (out.numel() == 0 || weights.numel() != (alpha ? experts : 1) * plain)
    throw std::invalid_argument("weights: expected [out, in, kernel, kernel], or one for each expert");
  if (alpha && alpha->size(0) != x.size(0)) throw std::invalid_argument("alpha: expected [batch, experts]");
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
                   static_cast<const T*>(weights.const_data_ptr()),
                   alpha || weights.stride(1) != 1,
                   data_or_null<float>(alpha),
                   experts,
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsd_cpu, m) {
  m.def(
      "conv2d(Tensor x, Tensor? skip, Tensor? affine, bool silu, Tensor row_map, Tensor column_map, "
      "Tensor weights, int m, int kernel, int stride, Tensor? bias, Tensor? channel_bias, Tensor? residual, float "
      "scale, int isa, "
      "Tensor(a!) out, Tensor? alpha=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
}

}  // namespace fastsd
