// The vectorised loops of group_norm_silu, compiled once per instruction set by foreach_isa.h.

#include "silu_kernel.h"
#include "vector_kernel.h"

// Moments are taken in one pass, relative to a pivot: the mean of the first eighth of a block. Then the sum of squared
// deviations from the pivot is at most 9 times that from the mean, whatever the data, so little can cancel between the
// two; for data that is alike throughout next to nothing does.

// A channels-last block is read in bands of so many rows: enough to take the accumulators up seldom, and few enough
// that the hardware fetches each row ahead as a stream of its own.
constexpr int64_t kBand = 8;

static inline float* at(float* sums, int64_t channel) {
  return sums + channel;
}

static inline Moments at(Moments sums, int64_t channel) {
  return sums.at(channel);
}

// Neighbouring channels of a band, as many as V holds.
template <typename V, typename T>
static inline __attribute__((always_inline)) void add_band(const T* x, int64_t rows, int64_t stride, float* sum) {
  V total, value;
  read(sum, total);
  for (int64_t r = 0; r < rows; ++r) {
    read(x + r * stride, value);
    total += value;
  }
  write(sum, total);
}

template <typename V, typename T>
static inline __attribute__((always_inline)) void add_band(const T* x, int64_t rows, int64_t stride, Moments sums) {
  V pivot, drift, spread, value;
  read(sums.pivot, pivot);
  read(sums.drift, drift);
  read(sums.spread, spread);
  for (int64_t r = 0; r < rows; ++r) {
    read(x + r * stride, value);
    value -= pivot;
    drift += value;
    spread += value * value;
  }
  write(sums.drift, drift);
  write(sums.spread, spread);
}

// Rows [rows, channels], `stride` apart, band by band into sums of each channel; Sums: float*, or Moments.
template <typename T, typename Sums>
static inline __attribute__((always_inline)) void add_rows(const T* x, int64_t rows, int64_t channels, int64_t stride,
                                                           Sums sums) {
  for (int64_t r = 0; r < rows; r += kBand, x += kBand * stride) {
    int64_t c = 0;
    if (rows - r >= kBand)
      for (; c + kLanes <= channels; c += kLanes) add_band<Vector>(x + c, kBand, stride, at(sums, c));
    const int64_t n = rows - r < kBand ? rows - r : kBand;
    for (; c + kLanes <= channels; c += kLanes) add_band<Vector>(x + c, n, stride, at(sums, c));
    for (; c < channels; ++c) add_band<float>(x + c, n, stride, at(sums, c));
  }
}

// A channels-last block [rows, channels], rows `stride` apart: the moments of each channel.
template <typename T>
static void channel_moments(const T* x, int64_t rows, int64_t channels, int64_t stride, Moments out) {
  const int64_t lead = rows < 8 ? rows : rows < 32 ? 4 : rows / 8;
  for (int64_t c = 0; c < channels; ++c) out.pivot[c] = out.drift[c] = out.spread[c] = 0.0f;
  add_rows(x, lead, channels, stride, out.pivot);
  for (int64_t c = 0; c < channels; ++c) out.pivot[c] *= 1.0f / float(lead);
  add_rows(x, rows, channels, stride, out);
}

// Sums over a run of one channel's elements, each less the center, in W interleaved lanes: of them and their squares.
template <int W, typename T>
static inline void add_run(const T* x, int64_t n, float center, float* sum, float* square_sum) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    for (int j = 0; j < W; ++j) {
      float d = load(x + i + j) - center;
      sum[j] += d;
      square_sum[j] += d * d;
    }
  for (int j = 0; i < n; ++i, ++j) {
    float d = load(x + i) - center;
    sum[j] += d;
    square_sum[j] += d * d;
  }
}

template <int W, typename F>
static inline double sum_of_lanes(const F* lanes) {
  double sum = 0;
  for (int j = 0; j < W; ++j) sum += lanes[j];
  return sum;
}

// The same as plane_moments for planes that do not fill the lanes, each of which would take all planes' first elements;
// shift is not null.
template <typename T>
static void short_plane_moments(const T* x, int64_t count, int64_t n, const float* shift, double* mean,
                                double* squares) {
  double sum = 0, square_sum = 0;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < n; ++i) sum += double(load(x + c * n + i)) + shift[c];
  const double center = sum / double(count * n);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < n; ++i) {
      const double d = double(load(x + c * n + i)) + shift[c] - center;
      square_sum += d * d;
    }
  *mean = center;
  *squares = square_sum;
}

// Channels-first planes [count, n], shift[c] added to each: mean and sum of squared deviations over all of them.
template <typename T>
static void plane_moments(const T* x, int64_t count, int64_t n, const float* shift, double* mean, double* squares) {
  constexpr int W = 64;
  if (!shift) {
    n *= count;
    count = 1;
  }
  if (n < W && count > 1) return short_plane_moments(x, count, n, shift, mean, squares);
  float drift[W] = {}, spread[W] = {};
  const int64_t lead = n < 8 * W ? n : n / 8;
  for (int64_t i = 0; i < lead; ++i) drift[i % W] += load(x + i);
  const float pivot = float(sum_of_lanes<W>(drift)) / float(lead) + (shift ? shift[0] : 0.0f);
  for (int j = 0; j < W; ++j) drift[j] = 0.0f;
  double lost = 0;  // to rounding of the centers
  for (int64_t c = 0; c < count; ++c) {
    const double exact_center = double(pivot) - (shift ? shift[c] : 0.0f);
    const float center = float(exact_center);
    add_run<W>(x + c * n, n, center, drift, spread);
    lost += double(n) * (center - exact_center);
  }
  const double total = double(count * n), total_drift = sum_of_lanes<W>(drift) + lost;
  *mean = pivot + total_drift / total;
  *squares = sum_of_lanes<W>(spread) - total_drift * total_drift / total;
}

// Per channel, mean and sum of squared deviations over all channels-last blocks. Block k holds min(rows, total - k *
// rows) positions and its moments lie k * stride behind the first's. The blocks' means are taken relative to the first
// pivot: in double precision, nothing that matters cancels.
template <int W>
static inline void merge_columns(Moments blocks, int64_t stride, int64_t rows, int64_t total, double* mean,
                                 double* squares) {
  double origin[W], first[W] = {}, second[W] = {}, within[W] = {};
  for (int j = 0; j < W; ++j) origin[j] = blocks.pivot[j];
  for (int64_t k = 0; k * rows < total; ++k) {
    const float *pivot = blocks.pivot + k * stride, *drift = blocks.drift + k * stride;
    const float* spread = blocks.spread + k * stride;
    const double n = double(total - k * rows < rows ? total - k * rows : rows), inverse = 1.0 / n;
    for (int j = 0; j < W; ++j) {
      double off_pivot = drift[j] * inverse, off_origin = (pivot[j] - origin[j]) + off_pivot;
      first[j] += n * off_origin;
      second[j] += n * off_origin * off_origin;
      within[j] += spread[j] - drift[j] * off_pivot;
    }
  }
  for (int j = 0; j < W; ++j) {
    mean[j] = origin[j] + first[j] / double(total);
    squares[j] = within[j] + (second[j] - first[j] * first[j] / double(total));
  }
}

static void merge_blocks(Moments blocks, int64_t stride, int64_t rows, int64_t total, int64_t channels, double* mean,
                         double* squares) {
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) merge_columns<16>(blocks.at(c), stride, rows, total, mean + c, squares + c);
  for (; c < channels; ++c) merge_columns<1>(blocks.at(c), stride, rows, total, mean + c, squares + c);
}

// The mean of a channel to which shift[c] is added; shift may be null.
static inline double shifted_mean(const double* mean, const float* shift, int64_t c) {
  return mean[c] + (shift ? shift[c] : 0.0f);
}

// Sum of the squared distances of such a channel's `count` values from a center.
static inline double squares_about(double center, int64_t count, const double* mean, const double* squares,
                                   const float* shift, int64_t c) {
  const double off = shifted_mean(mean, shift, c) - center;
  return squares[c] + double(count) * off * off;
}

// Of the channels of a group, each of `count` values with this mean and sum of squared deviations, shift[c] added to
// each: mean and sum of squared deviations over all of them.
static void fold_channels(int64_t channels, int64_t count, const double* mean, const double* squares,
                          const float* shift, double* group_mean, double* group_squares) {
  constexpr int W = 8;
  double first[W] = {}, second[W] = {};
  int64_t c = 0;
  for (; c + W <= channels; c += W)
    for (int j = 0; j < W; ++j) first[j] += shifted_mean(mean, shift, c + j);
  for (; c < channels; ++c) first[0] += shifted_mean(mean, shift, c);
  const double center = sum_of_lanes<W>(first) / double(channels);
  for (c = 0; c + W <= channels; c += W)
    for (int j = 0; j < W; ++j) second[j] += squares_about(center, count, mean, squares, shift, c + j);
  for (; c < channels; ++c) second[0] += squares_about(center, count, mean, squares, shift, c);
  *group_mean = center;
  *group_squares = sum_of_lanes<W>(second);
}

// What normalises the channels of a group with this mean and 1 / deviation, shift[c] added to each; shift, weight and
// bias may be null.
static void map_group(int64_t channels, double mean, double rstd, const float* shift, const float* weight,
                      const float* bias, Affine out) {
  float* __restrict centers = out.center;
  float* __restrict scales = out.scale;
  float* __restrict offsets = out.offset;
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = rstd * (weight ? weight[c] : 1.0f);
    const double center = mean - (shift ? shift[c] : 0.0f);
    const float rounded = float(center);
    centers[c] = rounded;
    scales[c] = float(scale);
    offsets[c] = float((bias ? bias[c] : 0.0f) - (center - double(rounded)) * scale);
  }
}

template <typename T>
static inline void prefetch_run(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i, 0, 2);
}

template <bool silu, typename T>
static inline void normalise_columns(const T* __restrict x, T* __restrict y, int64_t n, const float* __restrict center,
                                     const float* __restrict scale, const float* __restrict offset,
                                     Activation<silu> activate) {
  for (int64_t c = 0; c < n; ++c) store(y + c, activate((load(x + c) - center[c]) * scale[c] + offset[c]));
}

// A channels-last block x [rows, channels] into y, rows x_stride and y_stride apart. Both are fetched ahead, y to be
// written: otherwise the arithmetic and the memory wait for each other. Where x's rows do not lie one behind the other,
// x is a bundle that has just been read.
template <bool silu, typename T>
static void normalise_rows(const T* x, T* y, int64_t rows, int64_t channels, int64_t x_stride, int64_t y_stride,
                           Affine affine) {
  const int64_t strip = 256, ahead = 4096 / int64_t(sizeof(T));  // 4 KiB, 64 cache lines
  const int64_t y_ahead = channels == y_stride ? ahead : 4 * y_stride;
  const Activation<silu> activate;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += strip) {
      const int64_t n = channels - c < strip ? channels - c : strip;
      const T* in = x + r * x_stride + c;
      T* out = y + r * y_stride + c;
      for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) {
        if (channels == x_stride) __builtin_prefetch(in + ahead + i);
        __builtin_prefetch(out + y_ahead + i, 1);
      }
      normalise_columns(in, out, n, affine.center + c, affine.scale + c, affine.offset + c, activate);
    }
}

template <bool silu, typename T>
static inline void normalise_run(const T* __restrict x, T* __restrict y, int64_t n, float center, float scale,
                                 float offset, Activation<silu> activate) {
  for (int64_t i = 0; i < n; ++i) store(y + i, activate((load(x + i) - center) * scale + offset));
}

// Channels-first planes [count, n]; meanwhile as many at `next` are fetched, unless it is null.
template <bool silu, typename T>
static void normalise_planes(const T* x, T* y, int64_t count, int64_t n, Affine affine, const T* next) {
  const int64_t strip = 512;
  const Activation<silu> activate;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < n; i += strip) {
      const int64_t at = c * n + i, length = n - i < strip ? n - i : strip;
      if (next) prefetch_run(next + at, length);
      normalise_run(x + at, y + at, length, affine.center[c], affine.scale[c], affine.offset[c], activate);
    }
}

template <typename T>
static Kernels<T> kernels(bool silu) {
  return {channel_moments<T>, merge_blocks,     silu ? normalise_rows<true, T> : normalise_rows<false, T>,
          fold_channels,      plane_moments<T>, silu ? normalise_planes<true, T> : normalise_planes<false, T>,
          map_group};
}
