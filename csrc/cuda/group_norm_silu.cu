// group_norm_silu: y = act((z − mean) · rstd · w + b) with z = cat(x, skip) + channel_bias, in two launches.
//
// The grid is samples × channel tiles × chunks of positions. A tile is a number of whole groups, or a piece of one
// group where groups are wider than a tile. group_norm_silu_stats leaves each block's mean and sum of squared
// deviations (M2) of each group it holds; group_norm_silu_apply merges them in a fixed order and writes y.
//
// Defined by the host: DTYPE, the feature maps' element; PARAMETER_DTYPE, that of weight, bias and channel_bias;
// VECTOR, elements of one memory access; CHANNELS_LAST, 1 for [B, S, C] maps and 0 for [B, C, S]. VECTOR divides the
// innermost extent of x, skip and y.
#include "moments.cuh"

using namespace fastsd;

namespace {

using T = DTYPE;
using P = PARAMETER_DTYPE;

constexpr int kMaxThreads = 256;
constexpr int kBlocksPerMultiprocessor = 3;  // bounds registers to 80: with 64, eight channels a thread would spill

// How the launch was cut up; the same numbers go to both kernels.
struct Cut {
  int channels, group_width;  // C, C / num_groups
  i64 space;
  int tile, chunk, chunks;  // channels of a tile, positions of a chunk

  __device__ int pieces() const { return tile < group_width ? (group_width + tile - 1) / tile : 1; }
  __device__ int splits() const { return pieces() * chunks; }
  __device__ int positions(int of_chunk) const {
    const i64 left = space - static_cast<i64>(of_chunk) * chunk;
    return left < chunk ? static_cast<int>(left) : chunk;
  }
  // elements of one group that its split number `split` covers
  __device__ float elements(int split) const {
    const int left = group_width - split / chunks * tile;
    return static_cast<float>(tile < left ? tile : left) * static_cast<float>(positions(split % chunks));
  }
};

// What this block works on.
struct Part {
  i64 sample, first_position;
  int split, first_channel, channels, positions;
  int first_group, groups, group_width;  // group_width: channels of each group that lie in this part

  __device__ explicit Part(const Cut& cut) {
    const int run = cut.tile > cut.group_width ? cut.tile : cut.group_width;
    const int pieces = cut.pieces(), tiles = (cut.channels + run - 1) / run * pieces;
    const int block = blockIdx.x, tile = block / cut.chunks % tiles, chunk = block % cut.chunks;
    const int start = tile / pieces * run, piece = tile % pieces;
    sample = block / cut.chunks / tiles;
    split = piece * cut.chunks + chunk;
    first_position = static_cast<i64>(chunk) * cut.chunk;
    positions = cut.positions(chunk);
    first_channel = start + piece * cut.tile;
    const int end = start + run < cut.channels ? start + run : cut.channels;
    channels = cut.tile < end - first_channel ? cut.tile : end - first_channel;
    first_group = first_channel / cut.group_width;
    group_width = cut.group_width < channels ? cut.group_width : channels;
    groups = channels / group_width;
  }
};

// The feature maps x and skip, read as if concatenated.
struct Source {
  const T *x, *skip;
  i64 x_channels, skip_channels, space;

  // element (sample, channel, position 0)
  __device__ const T* channel(i64 sample, i64 channel) const {
    const bool in_x = channel < x_channels;
    const T* map = in_x ? x : skip;
    const i64 width = in_x ? x_channels : skip_channels, own = in_x ? channel : channel - x_channels;
    return map + sample * width * space + (CHANNELS_LAST ? own : own * space);
  }
  // from one position to the next
  __device__ i64 stride(i64 channel) const {
    return !CHANNELS_LAST ? 1 : channel < x_channels ? x_channels : skip_channels;
  }
};

// How threads share a channels-last tile: `across` columns of VECTOR channels times `down` rows of positions.
struct Mesh {
  int columns, across, down, column, row;

  __device__ explicit Mesh(int tile) {
    const int threads = blockDim.x, thread = threadIdx.x;
    columns = tile / VECTOR;
    across = columns < threads ? columns : threads;
    down = threads / across;
    column = thread % across;
    row = thread / across;
  }
};

struct Statistic {
  float mean, residue, rstd;
};

// One channel's entries while statistics are taken, and while they are applied.
struct Shifted {
  float shift, center;
};
struct Applied {
  float shift, mean, scale, offset;
};

// Σ(z − center) and Σ(z − center)² of each of the part's groups, into sums[group] and squares[group].
// cells: scratch, 2 · down · tile floats (channels last) or one per warp.
#if CHANNELS_LAST

__device__ void sum_groups(const Part& part, const Source& source, int tile, const Shifted* table, float* cells,
                           float* sums, float* squares) {
  const Mesh mesh(tile);
  const int threads = blockDim.x, thread = threadIdx.x;
  float* square_cells = cells + mesh.down * tile;
  for (int column = mesh.column; column * VECTOR < part.channels && mesh.row < mesh.down; column += mesh.across) {
    const int channel = column * VECTOR;
    float shift[VECTOR], center[VECTOR], sum[VECTOR] = {}, square[VECTOR] = {};
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      shift[v] = table[channel + v].shift;
      center[v] = table[channel + v].center;
    }
    const i64 stride = source.stride(part.first_channel + channel);
    const T* from =
        source.channel(part.sample, part.first_channel + channel) + (part.first_position + mesh.row) * stride;
#pragma unroll 2
    for (int position = mesh.row; position < part.positions; position += mesh.down) {
      float z[VECTOR];
      load(from, z);
      from += mesh.down * stride;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        const float deviation = (z[v] + shift[v]) - center[v];
        sum[v] += deviation;
        square[v] += deviation * deviation;
      }
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      cells[mesh.row * tile + channel + v] = sum[v];
      square_cells[mesh.row * tile + channel + v] = square[v];
    }
  }
  __syncthreads();
  for (int channel = thread; channel < part.channels; channel += threads) {
    float sum = 0.0f, square = 0.0f;
    for (int row = 0; row < mesh.down; ++row) {
      sum += cells[row * tile + channel];
      square += square_cells[row * tile + channel];
    }
    cells[channel] = sum;
    square_cells[channel] = square;
  }
  __syncthreads();
  for (int group = thread / kWarp; group < part.groups; group += threads / kWarp) {
    const int lane = thread % kWarp, first = group * part.group_width;
    float sum = 0.0f, square = 0.0f;
    for (int channel = lane; channel < part.group_width; channel += kWarp) {
      sum += cells[first + channel];
      square += square_cells[first + channel];
    }
    sum = warp_sum(sum);
    square = warp_sum(square);
    if (lane == 0) {
      sums[group] = sum;
      squares[group] = square;
    }
  }
  __syncthreads();
}

__device__ void apply(const Part& part, const Source& source, int tile, const Applied* table, bool activate,
                      i64 channels, T* y) {
  const Mesh mesh(tile);
  for (int column = mesh.column; column * VECTOR < part.channels && mesh.row < mesh.down; column += mesh.across) {
    const int channel = column * VECTOR;
    Applied entry[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) entry[v] = table[channel + v];
    const i64 stride = source.stride(part.first_channel + channel);
    const T* from = source.channel(part.sample, part.first_channel + channel) + part.first_position * stride;
    T* to = y + (part.sample * source.space + part.first_position + mesh.row) * channels + part.first_channel + channel;
#pragma unroll 2
    for (int position = mesh.row; position < part.positions; position += mesh.down) {
      float z[VECTOR];
      load(from + position * stride, z);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        z[v] = ((z[v] + entry[v].shift) - entry[v].mean) * entry[v].scale + entry[v].offset;
        if (activate) z[v] = silu(z[v]);
      }
      store(to, z);
      to += mesh.down * channels;
    }
  }
}

#else

__device__ void sum_groups(const Part& part, const Source& source, int, const Shifted* table, float* cells, float* sums,
                           float* squares) {
  const int vectors = part.positions / VECTOR, threads = blockDim.x;
  float sum = 0.0f, square = 0.0f;
#pragma unroll 2
  for (int item = threadIdx.x; item < part.channels * vectors; item += threads) {
    const int channel = item / vectors, position = (item - channel * vectors) * VECTOR;
    const Shifted entry = table[channel];
    float z[VECTOR];
    load(source.channel(part.sample, part.first_channel + channel) + part.first_position + position, z);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      const float deviation = (z[v] + entry.shift) - entry.center;
      sum += deviation;
      square += deviation * deviation;
    }
  }
  sum = block_sum(sum, cells);
  square = block_sum(square, cells);
  if (threadIdx.x == 0) {
    *sums = sum;
    *squares = square;
  }
  __syncthreads();
}

__device__ void apply(const Part& part, const Source& source, int, const Applied* table, bool activate, i64 channels,
                      T* y) {
  const int vectors = part.positions / VECTOR, threads = blockDim.x;
  T* to = y + (part.sample * channels + part.first_channel) * source.space + part.first_position;
#pragma unroll 2
  for (int item = threadIdx.x; item < part.channels * vectors; item += threads) {
    const int channel = item / vectors, position = (item - channel * vectors) * VECTOR;
    const Applied entry = table[channel];
    float z[VECTOR];
    load(source.channel(part.sample, part.first_channel + channel) + part.first_position + position, z);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      z[v] = ((z[v] + entry.shift) - entry.mean) * entry.scale + entry.offset;
      if (activate) z[v] = silu(z[v]);
    }
    store(to + channel * source.space + position, z);
  }
}

#endif

__device__ float parameter(const P* values, i64 index, float otherwise) {
  return values == nullptr ? otherwise : to_float(values[index]);
}

}  // namespace

// partials [B, groups, splits]: of the elements that a split covers.
// Shared: tile · Shifted, 2 · groups of a tile floats, then the cells of sum_groups.
extern "C" __global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    group_norm_silu_stats(const T* x, const T* skip, const P* channel_bias, Moments* partials, i64 x_channels,
                          i64 skip_channels, i64 space, i64 num_groups, i64 channel_bias_stride, i64 tile, i64 chunk,
                          i64 chunks) {
  const int channels = static_cast<int>(x_channels + skip_channels), thread = threadIdx.x, threads = blockDim.x;
  const int width = channels / static_cast<int>(num_groups);
  const Cut cut{channels, width, space, static_cast<int>(tile), static_cast<int>(chunk), static_cast<int>(chunks)};
  const Part part(cut);
  const Source source{x, skip, x_channels, skip_channels, space};

  Shifted* table = reinterpret_cast<Shifted*>(shared_memory());
  float* sums = reinterpret_cast<float*>(table + tile);
  float* squares = sums + part.groups;
  float* cells = squares + part.groups;
#pragma unroll 1
  for (int channel = thread; channel < part.channels; channel += threads) {
    const i64 index = part.sample * channel_bias_stride + part.first_channel + channel;
    table[channel] = {parameter(channel_bias, index, 0.0f), 0.0f};
  }
  const float elements = cut.elements(part.split);
  // first about 0, then about the mean that this gave
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    __syncthreads();
    if (pass == 1) {
      for (int channel = thread; channel < part.channels; channel += threads) {
        table[channel].center = sums[channel / part.group_width] / elements;
      }
      __syncthreads();
    }
    sum_groups(part, source, cut.tile, table, cells, sums, squares);
  }

#pragma unroll 1
  for (int group = thread; group < part.groups; group += threads) {
    // the first pass left the mean a few ulp off; the deviations about it know by how much
    const float correction = sums[group] / elements;
    const float m2 = squares[group] - sums[group] * correction;
    const float center = table[group * part.group_width].center, mean = center + correction;
    const i64 row = part.sample * num_groups + part.first_group + group;
    partials[row * cut.splits() + part.split] = {mean, correction - (mean - center), m2 < 0.0f ? 0.0f : m2};
  }
}

// y: [B, C, S] or [B, S, C]. Shared: tile · Applied, then groups of a tile · Statistic.
extern "C" __global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    group_norm_silu_apply(const T* x, const T* skip, const P* weight, const P* bias, const P* channel_bias,
                          const Moments* partials, T* y, i64 x_channels, i64 skip_channels, i64 space, i64 num_groups,
                          i64 channel_bias_stride, i64 tile, i64 chunk, i64 chunks, float eps, i64 activate) {
  const int channels = static_cast<int>(x_channels + skip_channels), thread = threadIdx.x, threads = blockDim.x;
  const int width = channels / static_cast<int>(num_groups);
  const Cut cut{channels, width, space, static_cast<int>(tile), static_cast<int>(chunk), static_cast<int>(chunks)};
  const Part part(cut);
  const Source source{x, skip, x_channels, skip_channels, space};

  Applied* table = reinterpret_cast<Applied*>(shared_memory());
  Statistic* statistics = reinterpret_cast<Statistic*>(table + tile);
  const int splits = cut.splits();
  const float elements = static_cast<float>(width) * static_cast<float>(space);
#pragma unroll 1
  for (int group = thread / kWarp; group < part.groups; group += threads / kWarp) {
    const Moments* own = partials + (part.sample * num_groups + part.first_group + group) * splits;
    const Moments merged =
        merge(splits, elements, [&](int split) { return own[split]; }, [&](int split) { return cut.elements(split); });
    const float rstd = rsqrtf(merged.m2 / elements + eps);
    if (thread % kWarp == 0) statistics[group] = {merged.mean, merged.residue, rstd};
  }
  __syncthreads();
#pragma unroll 1
  for (int channel = thread; channel < part.channels; channel += threads) {
    const i64 of_map = part.first_channel + channel;
    const Statistic statistic = statistics[channel / part.group_width];
    const float shift = parameter(channel_bias, part.sample * channel_bias_stride + of_map, 0.0f);
    const float scale = statistic.rstd * parameter(weight, of_map, 1.0f);
    const float offset = parameter(bias, of_map, 0.0f) - statistic.residue * scale;
    table[channel] = {shift, statistic.mean, scale, offset};
  }
  __syncthreads();
  apply(part, source, cut.tile, table, activate != 0, channels, y);
}
