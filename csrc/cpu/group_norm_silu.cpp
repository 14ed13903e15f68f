// GroupNorm, then SiLU, on the CPU. Formula: kernels/fastsd_kernels/group_norm_silu/reference.py.
//
// Channels last: blocks of rows are reduced to per-channel moments in parallel, merged in a fixed order, and the
// blocks are normalised in parallel; of a small map, one task does all of a bundle of groups. Channels first: a group
// is one contiguous piece, so one task does all of it while it is in cache. How the work is cut depends on the shape
// alone, never on the number of threads, so that any number of threads gives the same bits.

#include "group_norm_silu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <vector>

#include "elements.h"
#include "host.h"
#include "isa.h"

#define FASTSD_KERNEL "group_norm_silu_kernel.h"
#include "foreach_isa.h"

namespace fastsd {
namespace {

using torch::stable::parallel_for;  // equal shares: the same thread finds in its cache what it left there
using torch::stable::Tensor;

constexpr int64_t kBlockBytes = 192 * 1024;      // of a channels-last block; small against a core's L2
constexpr int64_t kBlockMultiple = 8;            // blocks, or about as many bundles, of a sample: for 2, 4 or 8 threads
constexpr int64_t kBundleBytes = 512 * 1024;     // the most of a bundle of groups; half of a 1 MiB L2
constexpr int64_t kBundleChannels = 128;         // the fewest of a bundle: its rows are read and written piece by piece
constexpr int64_t kBundleRows = 64;              // of a block of a bundle
constexpr int64_t kFewestRows = 16;              // of a block, or its own cost outweighs its rows
constexpr int64_t kFetchElements = 64 * 1024;    // fetching more than this ahead would push the present out
constexpr int64_t kBlockLength = 8 * 1024;       // elements of a channels-first block; small against L1
constexpr int64_t kElementsPerTask = 16 * 1024;  // less than this is not worth another thread

template <typename T>
Kernels<T> kernels_for(Isa isa, bool silu) {
  switch (isa) {
    case Isa::avx512:
      return avx512::kernels<T>(silu);
    case Isa::avx2:
      return avx2::kernels<T>(silu);
    default:
      return baseline::kernels<T>(silu);
  }
}

// A row of a table [rows, 3, width]; Row: Moments or Affine.
template <typename Row>
Row row_of(float* table, int64_t row, int64_t width) {
  float* p = table + row * 3 * width;
  return {p, p + width, p + 2 * width};
}

template <typename T>
struct Problem {
  // Channels below x_channels are x's, the others skip's.
  const T *x, *skip;
  T* y;
  const float *weight, *bias, *channel_bias;                // [batch or 1, channels]; each may be null
  int64_t weight_stride, bias_stride, channel_bias_stride;  // from sample to sample, 0 where all share one row
  int64_t batch, x_channels, channels, groups, space;
  double eps;
  Kernels<T> kernels;

  int64_t group_size() const { return channels / groups; }

  const float* shift_of(int64_t b, int64_t channel) const {
    return channel_bias ? channel_bias + b * channel_bias_stride + channel : nullptr;
  }

  const float* weights_of(int64_t b, int64_t channel) const {
    return weight ? weight + b * weight_stride + channel : nullptr;
  }

  const float* biases_of(int64_t b, int64_t channel) const { return bias ? bias + b * bias_stride + channel : nullptr; }

  // What maps the channels [first, first + group_size) of a group with this mean and sum of squared deviations.
  void map_group(int64_t b, int64_t first, double mean, double squares, Affine affine) const {
    const double rstd = 1 / std::sqrt(squares / double(group_size() * space) + eps);
    kernels.map_group(group_size(), mean, rstd, shift_of(b, first), weights_of(b, first), biases_of(b, first), affine);
  }

  // The same for all groups of the channels [first, first + count) of a channels-last map, from the moments of every
  // block of `rows` positions, before the shift: a table [blocks, 3, width].
  void fold_blocks(int64_t b, int64_t first, int64_t count, float* moments, int64_t rows, int64_t width,
                   Affine affine) const {
    std::vector<double> mean(count), squares(count);
    kernels.merge_blocks(row_of<Moments>(moments, 0, width), 3 * width, rows, space, count, mean.data(),
                         squares.data());
    for (int64_t c = 0; c < count; c += group_size()) {
      double group_mean, group_squares;
      kernels.fold_channels(group_size(), space, mean.data() + c, squares.data() + c, shift_of(b, first + c),
                            &group_mean, &group_squares);
      map_group(b, first + c, group_mean, group_squares, affine.at(c));
    }
  }

  // Positions in a channels-last block.
  int64_t rows_per_block() const {
    const int64_t sample_bytes = space * channels * int64_t(sizeof(T));
    const int64_t wanted = ceil_div(ceil_div(sample_bytes, kBlockBytes), kBlockMultiple) * kBlockMultiple;
    return std::min(space, std::max(ceil_div(space, wanted), kFewestRows));
  }

  // Of a channels-last map: the parts of channels [first, first + count) that x and skip hold, each as
  // part(its data from the first of them on, channels to take, channels of its rows, how far behind `first`).
  template <typename Part>
  void for_inputs(int64_t position, int64_t first, int64_t count, Part part) const {
    const int64_t skip_channels = channels - x_channels, from_x = std::clamp<int64_t>(x_channels - first, 0, count);
    if (from_x) part(x + position * x_channels + first, from_x, x_channels, 0);
    if (count > from_x)
      part(skip + position * skip_channels + first + from_x - x_channels, count - from_x, skip_channels, from_x);
  }

  // Of rows [position, position + rows) and channels [first, first + count) of a channels-last map.
  void take_moments(int64_t position, int64_t rows, int64_t first, int64_t count, Moments out) const {
    for_inputs(position, first, count, [&](const T* from, int64_t n, int64_t stride, int64_t at) {
      kernels.channel_moments(from, rows, n, stride, out.at(at));
    });
  }

  void normalise(int64_t position, int64_t rows, int64_t first, int64_t count, Affine affine) const {
    T* out = y + position * channels + first;
    for_inputs(position, first, count, [&](const T* from, int64_t n, int64_t stride, int64_t at) {
      kernels.normalise_rows(from, out + at, rows, n, stride, channels, affine.at(at));
    });
  }

  // Channels of a bundle of groups whose part of a channels-last sample stays in a core's cache; 0 if there is no such.
  int64_t bundle_channels() const {
    const int64_t width = ceil_div(groups, kBlockMultiple) * group_size();
    const bool fits = width * space * int64_t(sizeof(T)) <= kBundleBytes;
    return fits && groups >= kBlockMultiple && width >= kBundleChannels ? width : 0;
  }

  // The statistics of a channels-last map, as the table [batch, 3, channels] of what normalises it.
  void fill_affines(float* affines) const {
    const int64_t rows = rows_per_block(), blocks = ceil_div(space, rows);
    AlignedFloats moments(batch * blocks * 3 * channels);
    parallel_for(0, batch * blocks, ceil_div(kElementsPerTask, rows * channels), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, first = task % blocks * rows, n = std::min(rows, space - first);
        take_moments(b * space + first, n, 0, channels, row_of<Moments>(moments.data(), task, channels));
      }
    });
    parallel_for(0, batch, ceil_div(kElementsPerTask, blocks * channels), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        fold_blocks(b, 0, channels, moments.data() + b * blocks * 3 * channels, rows, channels,
                    row_of<Affine>(affines, b, channels));
    });
  }

  // A task takes the statistics of a bundle of groups and normalises it while it is in cache.
  void run_bundles(int64_t width) const {
    const int64_t bundles = ceil_div(channels, width), blocks = ceil_div(space, kBundleRows);
    parallel_for(0, batch * bundles, ceil_div(kElementsPerTask, width * space), [&](int64_t begin, int64_t end) {
      AlignedFloats moments(blocks * 3 * width), affines(3 * width);
      const Affine affine = row_of<Affine>(affines.data(), 0, width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / bundles, first = task % bundles * width, count = std::min(width, channels - first);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t row = block * kBundleRows, n = std::min(kBundleRows, space - row);
          take_moments(b * space + row, n, first, count, row_of<Moments>(moments.data(), block, width));
        }
        fold_blocks(b, first, count, moments.data(), kBundleRows, width, affine);
        normalise(b * space, space, first, count, affine);
      }
    });
  }

  void run_channels_last() const {
    if (const int64_t width = bundle_channels()) return run_bundles(width);
    const int64_t rows = rows_per_block();
    AlignedFloats affines(batch * 3 * channels);
    fill_affines(affines.data());
    parallel_for(0, batch * space, ceil_div(kElementsPerTask, channels), [&](int64_t begin, int64_t end) {
      // from the end, where the statistics left off: what they read last is still in cache
      for (int64_t stop = end; stop > begin;) {
        const int64_t b = (stop - 1) / space, position = std::max({begin, b * space, stop - rows});
        normalise(position, stop - position, 0, channels, row_of<Affine>(affines.data(), b, channels));
        stop = position;
      }
    });
  }

  // The same, and the mean of each channel of the result, [batch, channels]: of a block while it is in cache.
  void run_channels_last(float* means) const {
    const int64_t rows = rows_per_block(), blocks = ceil_div(space, rows);
    AlignedFloats affines(batch * 3 * channels), moments(batch * blocks * 3 * channels);
    fill_affines(affines.data());
    parallel_for(0, batch * blocks, ceil_div(kElementsPerTask, rows * channels), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, first = task % blocks * rows, n = std::min(rows, space - first);
        normalise(b * space + first, n, 0, channels, row_of<Affine>(affines.data(), b, channels));
        kernels.channel_moments(y + (b * space + first) * channels, n, channels, channels,
                                row_of<Moments>(moments.data(), task, channels));
      }
    });
    std::vector<double> mean(channels), squares(channels);
    for (int64_t b = 0; b < batch; ++b) {
      kernels.merge_blocks(row_of<Moments>(moments.data(), b * blocks, channels), 3 * channels, rows, space, channels,
                           mean.data(), squares.data());
      std::copy(mean.begin(), mean.end(), means + b * channels);
    }
  }

  const T* plane(int64_t b, int64_t c) const {
    return c < x_channels ? x + (b * x_channels + c) * space
                          : skip + (b * (channels - x_channels) + c - x_channels) * space;
  }

  // How many of the channels from c on, at most `most`, lie in one tensor.
  int64_t in_one_tensor(int64_t c, int64_t most) const {
    return c < x_channels ? std::min(most, x_channels - c) : most;
  }

  void group_moments(int64_t b, int64_t first, double* mean, double* squares) const {
    double count = 0;
    *mean = *squares = 0;
    for (int64_t c = 0; c < group_size();) {
      const int64_t planes = in_one_tensor(first + c, std::clamp<int64_t>(kBlockLength / space, 1, group_size() - c));
      for (int64_t at = 0; at < space; at += kBlockLength) {
        const int64_t n = std::min(kBlockLength, space - at);
        double block_mean, block_squares;
        kernels.plane_moments(plane(b, first + c) + at, planes, n, shift_of(b, first + c), &block_mean, &block_squares);
        // Chan, Golub and LeVeque's update
        const double block_count = double(planes * n), off = block_mean - *mean,
                     share = block_count / (count + block_count);
        *mean += off * share;
        *squares += block_squares + off * off * count * share;
        count += block_count;
      }
      c += planes;
    }
  }

  void run_channels_first() const {
    parallel_for(0, batch * groups, ceil_div(kElementsPerTask, group_size() * space), [&](int64_t begin, int64_t end) {
      AlignedFloats affines(3 * group_size());
      const Affine affine{affines.data(), affines.data() + group_size(), affines.data() + 2 * group_size()};
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / groups, first = task % groups * group_size();
        double mean, squares;
        group_moments(b, first, &mean, &squares);
        map_group(b, first, mean, squares, affine);
        for (int64_t c = 0; c < group_size();) {
          const int64_t planes = in_one_tensor(first + c, group_size() - c);
          T* out = y + (b * channels + first + c) * space;
          // what the next task of this thread reads, if it lies right behind
          const T* next = plane(b, first + c) + group_size() * space;
          const bool fetch = planes == group_size() && task + 1 < end && planes * space <= kFetchElements;
          kernels.normalise_planes(plane(b, first + c), out, planes, space, affine.at(c), fetch ? next : nullptr);
          c += planes;
        }
      }
    });
  }
};

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// From sample to sample of [channels], [1, channels] or [batch, channels].
int64_t sample_stride(const std::optional<Tensor>& tensor, int64_t channels) {
  return tensor && tensor->dim() == 2 && tensor->size(0) > 1 ? channels : 0;
}

template <typename T>
Problem<T> problem_of(const Tensor& x, const std::optional<Tensor>& skip, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& channel_bias, int64_t groups,
                      double eps, bool silu, Isa isa, void* out) {
  const int64_t batch = x.size(0), x_channels = x.size(1), channels = x_channels + (skip ? skip->size(1) : 0);
  int64_t space = 1;
  for (int64_t d = 2; d < x.dim(); ++d) space *= x.size(d);
  return {
      static_cast<const T*>(x.const_data_ptr()),
      data_or_null<T>(skip),
      static_cast<T*>(out),
      data_or_null<float>(weight),
      data_or_null<float>(bias),
      data_or_null<float>(channel_bias),
      sample_stride(weight, channels),
      sample_stride(bias, channels),
      sample_stride(channel_bias, channels),
      batch,
      x_channels,
      channels,
      groups,
      space,
      eps,
      kernels_for<T>(isa, silu),
  };
}

void check_groups(const Tensor& x, const std::optional<Tensor>& skip, int64_t groups) {
  const int64_t channels = x.size(1) + (skip ? skip->size(1) : 0);
  if (x.numel() + (skip ? skip->numel() : 0) == 0 || groups < 1 || channels % groups)
    throw std::invalid_argument("x, skip: expected at least one element, and channels that the groups divide");
}

// All tensors dense in the layout named, parameters in float32, x and skip not both empty: cpu_impl.py sees to it.
void group_norm_silu(Tensor x, std::optional<Tensor> skip, std::optional<Tensor> weight, std::optional<Tensor> bias,
                     std::optional<Tensor> channel_bias, int64_t groups, double eps, bool silu, bool channels_last,
                     int64_t isa, Tensor out) {
  check_groups(x, skip, groups);
  with_element(x, [&](auto element) {
    const auto problem = problem_of<decltype(element)>(x, skip, weight, bias, channel_bias, groups, eps, silu,
                                                       checked_isa(isa), out.mutable_data_ptr());
    if (channels_last)
      problem.run_channels_last();
    else
      problem.run_channels_first();
  });
}

// The same, channels last, and the mean of each channel of the result: means [batch, channels].
void group_norm_silu_mean(Tensor x, std::optional<Tensor> skip, std::optional<Tensor> weight,
                          std::optional<Tensor> bias, int64_t groups, double eps, bool silu, int64_t isa, Tensor out,
                          Tensor means) {
  check_groups(x, skip, groups);
  with_element(x, [&](auto element) {
    problem_of<decltype(element)>(x, skip, weight, bias, std::nullopt, groups, eps, silu, checked_isa(isa),
                                  out.mutable_data_ptr())
        .run_channels_last(static_cast<float*>(means.mutable_data_ptr()));
  });
}

// The same up to the statistics: out [batch, 3, channels] are center, scale and offset of each channel, such that
// (x - center) * scale + offset is normalised. Channels last; otherwise as above.
void group_norm_affine(Tensor x, std::optional<Tensor> skip, std::optional<Tensor> weight, std::optional<Tensor> bias,
                       int64_t groups, double eps, int64_t isa, Tensor out) {
  check_groups(x, skip, groups);
  with_element(x, [&](auto element) {
    problem_of<decltype(element)>(x, skip, weight, bias, std::nullopt, groups, eps, false, checked_isa(isa), nullptr)
        .fill_affines(static_cast<float*>(out.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsd_cpu, m) {
  m.def(
      "group_norm_silu(Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? channel_bias, int groups, "
      "float eps, bool silu, bool channels_last, int isa, Tensor(a!) out) -> ()");
  m.def(
      "group_norm_silu_mean(Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, int groups, float eps, bool silu, "
      "int isa, Tensor(a!) out, Tensor(b!) means) -> ()");
  m.def(
      "group_norm_affine(Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, int groups, float eps, int isa, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_mean", TORCH_BOX(&group_norm_silu_mean));
  m.impl("group_norm_affine", TORCH_BOX(&group_norm_affine));
}

}  // namespace fastsd
