// conv2d as an implicit GEMM: y = (W * nearest(u) + bias + channel_bias + residual) · s with u = act(norm(z)) and
// z = cat(x, skip).
//
// conv2d_coefficients merges statistics to three numbers for each sample and channel: the partial ones of
// group_norm_silu.cu, or the moments that the convolution which made x has noted.
// A block of conv2d_implicit_gemm computes TILE_K output channels of TILE_H × TILE_W positions of one sample. It goes
// through the input STEP channels at a time: the halo, all that the tile's windows touch, is brought to shared memory
// and there normalised and activated once; then each tap of the window is one matrix product, of the halo shifted by
// that tap and the tap's weights. Where the tiles are too few for the card, a block takes only a part of the input
// channels and leaves its sums in a workspace, which conv2d_reduce adds up in a fixed order.
//
// Nothing depends on the order of blocks, and there are no atomics: two runs are equal to the bit.
//
// Maps are channels last, [B, H, W, C]. The channels of x and those of skip are each padded to a multiple of 8, by the
// host in the weights and here in shared memory; with these C' channels the weights are [K, taps, C'], or as many of
// these for each sample.
//
// Defined by the host: DTYPE, the maps' element, __half or __nv_bfloat16; PARAMETER_DTYPE, that of norm weight and
// bias, bias and channel_bias; VECTOR, elements of one access to x and skip, which divides the channels of both;
// OUT_VECTOR, the same for residual and y; KERNEL_SIZE, 1 or 3; STRIDE; TILE_H, TILE_W, TILE_K; WARP_K, output channels
// of a warp; STEP, 16 or 32; MOMENTS, 1 to note those of y, which then has no residual and no scale, and comes from one
// launch.
#include "moments.cuh"
#include "product.cuh"

using namespace fastsd;

namespace {

using P = PARAMETER_DTYPE;

constexpr int kTaps = KERNEL_SIZE * KERNEL_SIZE;
constexpr int kHaloHeight = (TILE_H - 1) * STRIDE + KERNEL_SIZE;
constexpr int kHaloWidth = (TILE_W - 1) * STRIDE + KERNEL_SIZE;
constexpr int kHalo = kHaloHeight * kHaloWidth;

constexpr int kWarpPositions = 32;
constexpr int kWarpsOfK = TILE_K / WARP_K;
constexpr int kWarps = TILE_H * TILE_W / kWarpPositions * kWarpsOfK;
constexpr int kThreads = kWarps * kWarp;
constexpr int kResidentThreads = 512;    // on one multiprocessor: bounds registers to 128
constexpr int kScratchRow = WARP_K + 8;  // floats; the 8 keep rows out of each other's banks

// a warp's positions are a patch of the map
constexpr int kPatchWidth = TILE_W < kWarpPositions ? TILE_W : kWarpPositions;
constexpr int kPatchHeight = kWarpPositions / kPatchWidth;

constexpr int kReduceThreads = 256;

static_assert(TILE_H * TILE_W % kWarpPositions == 0 && TILE_K % WARP_K == 0 && WARP_K % 16 == 0,
              "a warp computes whole fragments");
static_assert(TILE_W % kPatchWidth == 0 && TILE_H % kPatchHeight == 0, "patches tile the map");

__device__ int padded(int channels) {
  return (channels + kColumn - 1) / kColumn * kColumn;
}

__device__ float parameter(const P* values, i64 index, float otherwise) {
  return values == nullptr ? otherwise : to_float(values[index]);
}

// ---- input

// STEP channels of x or of skip: the map that they are in, its channels, the first one of the step, and where that
// one is among the C' of the weights.
struct Channels {
  const T* map;
  int of_map, first, padded_first;
};

struct Input {
  const T *x, *skip;
  int x_channels, skip_channels, height, width;
  const float* coefficients;  // [B, 3, C']: center, scale, offset; or null
  bool activate;

  __device__ int x_steps() const { return (x_channels + STEP - 1) / STEP; }
  __device__ int steps() const { return x_steps() + (skip_channels + STEP - 1) / STEP; }
  __device__ int padded_channels() const { return padded(x_channels) + padded(skip_channels); }
  __device__ Channels channels(int step) const {
    const int in_x = x_steps();
    if (step < in_x) return {x, x_channels, step * STEP, step * STEP};
    return {skip, skip_channels, (step - in_x) * STEP, padded(x_channels) + (step - in_x) * STEP};
  }
};

// As torch's nearest neighbour, in float32.
__device__ int nearest(int index, float factor, int size) {
  if (factor == 1.0f) return index;
  const int source = static_cast<int>(floorf(static_cast<float>(index) * factor));
  return source < size ? source : size - 1;
}

// The places of the enlarged map that a tile needs. A thread has the same column of every few places.
struct Halo {
  i64 sample;
  int first_row, first_column, height, width;  // of the enlarged map
  float row_factor, column_factor;

  // Whether a place lies in the map and not in the padding.
  __device__ bool holds(int place) const {
    const int row = first_row + place / kHaloWidth, column = first_column + place % kHaloWidth;
    return 0 <= row && row < height && 0 <= column && column < width;
  }
  // The first of a position's channels in the map as it is stored, for a place that lies in it.
  __device__ const T* source(int place, const Input& input, const Channels& channels) const {
    const int row = nearest(first_row + place / kHaloWidth, row_factor, input.height);
    const int column = nearest(first_column + place % kHaloWidth, column_factor, input.width);
    return channels.map + ((sample * input.height + row) * input.width + column) * channels.of_map;
  }

  // Starts to copy the map as it is, where it can be read by whole columns.
  __device__ void fetch(const Input& input, const Channels& channels, T* shared) const {
    if (VECTOR < kColumn) return;
    const int thread = threadIdx.x, column = thread % kColumns, channel = channels.first + column * kColumn;
#pragma unroll 1
    for (int place = thread / kColumns; place < kHalo; place += kThreads / kColumns) {
      const bool valid = channel < channels.of_map && holds(place);
      const T* from = valid ? source(place, input, channels) + channel : channels.map;
      cp_async_16(shared + element(place, column), from, valid);
    }
  }

  // Turns what fetch() brought, and what was waited for, into u: each thread what it copied itself. Half a column at a
  // time, as the coefficients of a whole one take registers that the sums need.
  __device__ void activate(const Input& input, const Channels& channels, T* shared) const {
    if (VECTOR == kColumn && input.coefficients == nullptr && !input.activate) return;
    constexpr int kHalf = kColumn / 2, kPiece = VECTOR < kHalf ? VECTOR : kHalf;
    const int thread = threadIdx.x, column = thread % kColumns, coefficients_row = input.padded_channels();
#pragma unroll 1
    for (int half = 0; half < kColumn; half += kHalf) {
      const int of_step = column * kColumn + half, channel = channels.first + of_step;
      float center[kHalf] = {}, scale[kHalf], offset[kHalf] = {};
#pragma unroll
      for (int i = 0; i < kHalf; ++i) scale[i] = 1.0f;
      if (input.coefficients != nullptr && channel < channels.of_map) {
        const float* from = input.coefficients + sample * 3 * coefficients_row + channels.padded_first + of_step;
        load(from, center);
        load(from + coefficients_row, scale);
        load(from + 2 * coefficients_row, offset);
      }
#pragma unroll 1
      for (int place = thread / kColumns; place < kHalo; place += kThreads / kColumns) {
        T* to = shared + element(place, column) + half;
        float u[kHalf] = {};
        if (channel < channels.of_map && holds(place)) {
#pragma unroll
          for (int first = 0; first < kHalf; first += kPiece) {
            const T* from = VECTOR == kColumn ? to : source(place, input, channels) + channel + first;
            float piece[kPiece] = {};
            if (channel + first < channels.of_map) load(from, piece);
#pragma unroll
            for (int v = 0; v < kPiece; ++v) u[first + v] = piece[v];
          }
#pragma unroll
          for (int i = 0; i < kHalf; ++i) {
            u[i] = (u[i] - center[i]) * scale[i] + offset[i];
            if (input.activate) u[i] = silu(u[i]);
            if (channel + i >= channels.of_map) u[i] = 0.0f;
          }
        }
        store(to, u);
      }
    }
  }
};

// Starts to copy one tap's weights [TILE_K, STEP], zeros beyond the last channels.
__device__ void fetch_weights(const T* weight, i64 padded_channels, int out_channels, int first_k,
                              const Channels& channels, int tap, T* shared) {
#pragma unroll 1
  for (int item = threadIdx.x; item < TILE_K * kColumns; item += kThreads) {
    const int row = item / kColumns, column = item % kColumns, k = first_k + row;
    const bool valid = k < out_channels && channels.first + column * kColumn < channels.of_map;
    const i64 offset = (static_cast<i64>(k) * kTaps + tap) * padded_channels + channels.padded_first + column * kColumn;
    cp_async_16(shared + element(row, column), valid ? weight + offset : weight, valid);
  }
}

// ---- output

// y = (sum + offset + residual) · scale for OUT_VECTOR channels that start at `index` of the map
__device__ void write(const float* sum, const float* offset, const T* residual, float output_scale, T* y, i64 index) {
  float more[OUT_VECTOR] = {}, result[OUT_VECTOR];
  if (residual != nullptr) load(residual + index, more);
#pragma unroll
  for (int v = 0; v < OUT_VECTOR; ++v) result[v] = (sum[v] + offset[v] + more[v]) * output_scale;
  store(y + index, result);
}

// The sum over the lanes that hold the same columns of mma's sums, the same bits in each of them.
__device__ float sum_of_rows(float value) {
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// moments [channels, 2]: mean and M2 of each channel over a patch of which rows × columns positions lie in the map.
// They are those of y as it is stored: rounded, so that a constant map has no variance and its very value as the mean,
// and infinite where y is.
__device__ void write_moments(const float (&sum)[kWarpPositions / 16][WARP_K / 8][4], const float* offset, int rows,
                              int columns, int channels, float* moments) {
  constexpr int kOwn = kWarpPositions / 8;  // positions of a lane
  const int lane = threadIdx.x % kWarp;
  const float count = static_cast<float>(rows * columns);
  bool inside[kOwn];
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int place = own * 8 + lane / 4;
    inside[own] = place / kPatchWidth < rows && place % kPatchWidth < columns;
  }
#pragma unroll
  for (int column = 0; column < WARP_K / 4; ++column) {
    const int j = column / 2, v = column % 2, k = j * 8 + lane % 4 * 2 + v;
    float stored[kOwn], total = 0.0f, squares = 0.0f;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      stored[own] = to_float(from_float<T>(sum[own / 2][j][own % 2 * 2 + v] + offset[k]));
      total += inside[own] ? stored[own] : 0.0f;
    }
    const float mean = sum_of_rows(total) / count;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const float deviation = inside[own] ? stored[own] - mean : 0.0f;
      squares += deviation * deviation;
    }
    const float of_channel[2] = {mean, sum_of_rows(squares)};
    if (lane < 4 && k < channels) store(moments + 2 * k, of_channel);
  }
}

}  // namespace

// coefficients [B, 3, C']: center, scale and offset of act((z − center) · scale + offset), one warp for a group.
// Of three kinds of statistics two are null: partials as group_norm_silu_stats leaves them, cut by tile, chunk and
// chunks; moments [B, patches, C, 2] as conv2d_implicit_gemm leaves them, of patches of a map of map_width columns; or
// mean and rstd [B, groups].
extern "C" __global__ void __launch_bounds__(kWarp)
    conv2d_coefficients(const float* partials, const float* moments, const float* mean, const float* rstd,
                        const P* norm_weight, const P* norm_bias, float* coefficients, i64 x_channels,
                        i64 skip_channels, i64 space, i64 num_groups, i64 norm_weight_stride, i64 norm_bias_stride,
                        i64 tile, i64 chunk, i64 chunks, i64 map_width, i64 patch_height, i64 patch_width, float eps) {
  const int lane = threadIdx.x, channels = static_cast<int>(x_channels + skip_channels);
  const int width = channels / static_cast<int>(num_groups);
  const i64 row = blockIdx.x, sample = row / num_groups;
  const int first_channel = static_cast<int>(row % num_groups) * width;
  const float all = static_cast<float>(width) * static_cast<float>(space);
  float center, residue = 0.0f, scale;
  if (mean != nullptr) {
    center = mean[row];
    scale = rstd[row];
  } else {
    Moments merged;
    if (moments != nullptr) {
      const int columns = static_cast<int>(map_width), rows = static_cast<int>(space / map_width);
      const int high = static_cast<int>(patch_height), wide = static_cast<int>(patch_width);
      const int across = (columns + wide - 1) / wide, patches = (rows + high - 1) / high * across;
      const float* own = moments + (sample * patches * channels + first_channel) * 2;
      const auto of = [&](int part) -> Moments {
        float of_channel[2];
        load(own + (static_cast<i64>(part / width) * channels + part % width) * 2, of_channel);
        return {of_channel[0], 0.0f, of_channel[1]};
      };
      const auto elements = [&](int part) {
        const int patch = part / width, below = rows - patch / across * high, right = columns - patch % across * wide;
        return static_cast<float>((below < high ? below : high) * (right < wide ? right : wide));
      };
      merged = merge(patches * width, all, of, elements);
    } else {
      const i64 pieces = tile < width ? (width + tile - 1) / tile : 1, splits = pieces * chunks;
      const float* own = partials + row * splits * 3;
      const auto of = [&](int split) -> Moments { return {own[3 * split], own[3 * split + 1], own[3 * split + 2]}; };
      const auto elements = [&](int split) {
        const i64 left = width - split / chunks * tile, positions = space - split % chunks * chunk;
        return static_cast<float>(tile < left ? tile : left) *
               static_cast<float>(chunk < positions ? chunk : positions);
      };
      merged = merge(static_cast<int>(splits), all, of, elements);
    }
    center = merged.mean;
    residue = merged.residue;
    scale = rsqrtf(merged.m2 / all + eps);
  }
  const int x_padded = padded(static_cast<int>(x_channels)),
            all_padded = x_padded + padded(static_cast<int>(skip_channels));
  float* to = coefficients + sample * 3 * all_padded;
#pragma unroll 1
  for (int i = lane; i < width; i += kWarp) {
    const int channel = first_channel + i;
    const float weighted = scale * parameter(norm_weight, sample * norm_weight_stride + channel, 1.0f);
    const float bias = parameter(norm_bias, sample * norm_bias_stride + channel, 0.0f);
    const int at = channel < x_channels ? channel : x_padded + channel - static_cast<int>(x_channels);
    to[at] = center;
    to[all_padded + at] = weighted;
    to[2 * all_padded + at] = bias - residue * weighted;
  }
}

// y [B, H', W', K], or where there are splits workspace [splits, B, H', W', K rounded up to 8]; moments [B, patches of
// rows, patches of columns, K, 2], if noted.
// Grid: samples × tiles of rows × tiles of columns × splits × tiles of output channels.
// Shared: two halos and two taps of weights, later the warps' scratch; then TILE_K floats.
extern "C" __global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    conv2d_implicit_gemm(const T* x, const T* skip, const T* weight, const float* coefficients, const P* bias,
                         const P* channel_bias, const T* residual, T* y, float* workspace, float* moments, i64 batch,
                         i64 x_channels, i64 skip_channels, i64 height, i64 width, i64 enlarged_height,
                         i64 enlarged_width, i64 left, i64 top, i64 out_channels, i64 out_height, i64 out_width,
                         i64 weight_stride, i64 channel_bias_stride, i64 given_splits, i64 activate, float row_factor,
                         float column_factor, float output_scale) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int warp_position = warp / kWarpsOfK * kWarpPositions, warp_k = warp % kWarpsOfK * WARP_K;
  const Input input{x,
                    skip,
                    static_cast<int>(x_channels),
                    static_cast<int>(skip_channels),
                    static_cast<int>(height),
                    static_cast<int>(width),
                    coefficients,
                    activate != 0};
  const int channels_of_y = static_cast<int>(out_channels);
  const i64 splits = MOMENTS ? 1 : given_splits;  // known, it leaves registers for the moments

  // blocks that share a halo follow each other
  const int tiles_k = (channels_of_y + TILE_K - 1) / TILE_K;
  const int tiles_w = static_cast<int>((out_width + TILE_W - 1) / TILE_W);
  const int tiles_h = static_cast<int>((out_height + TILE_H - 1) / TILE_H);
  u32 block = blockIdx.x;
  const int first_k = static_cast<int>(block % tiles_k) * TILE_K;
  block /= tiles_k;
  const int split = static_cast<int>(block % splits);
  block /= static_cast<u32>(splits);
  const int first_column = static_cast<int>(block % tiles_w) * TILE_W;
  block /= tiles_w;
  const int first_row = static_cast<int>(block % tiles_h) * TILE_H;
  const i64 sample = block / tiles_h;
  weight += sample * weight_stride;

  const Halo halo{sample,
                  first_row * STRIDE - static_cast<int>(top),
                  first_column * STRIDE - static_cast<int>(left),
                  static_cast<int>(enlarged_height),
                  static_cast<int>(enlarged_width),
                  row_factor,
                  column_factor};
  const int first_step = static_cast<int>(input.steps() * static_cast<i64>(split) / splits);
  const int end_step = static_cast<int>(input.steps() * static_cast<i64>(split + 1) / splits);
  const i64 weight_row = input.padded_channels();

  T* halos = reinterpret_cast<T*>(shared_memory());
  T* weights = halos + 2 * kHalo * STEP;
  float sum[kWarpPositions / 16][WARP_K / 8][4] = {};
  // rows of shared memory that this lane addresses in ldmatrix: positions for a, output channels for b
  int places[kWarpPositions / 16];
#pragma unroll
  for (int i = 0; i < kWarpPositions / 16; ++i) {
    const int position = warp_position + i * 16 + lane % 16;
    places[i] = position / TILE_W * STRIDE * kHaloWidth + position % TILE_W * STRIDE;
  }
  const int row_of_b = warp_k + lane / 16 * 8 + lane % 8;

  halo.fetch(input, input.channels(first_step), halos);
  fetch_weights(weight, weight_row, channels_of_y, first_k, input.channels(first_step), 0, weights);
  cp_async_commit();
  int stage = 0;
#pragma unroll 1
  for (int step = first_step; step < end_step; ++step) {
    T* u = halos + (step - first_step) % 2 * kHalo * STEP;
    cp_async_wait<0>();
    halo.activate(input, input.channels(step), u);
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      const T* w = weights + stage * TILE_K * STEP;
      stage ^= 1;
      cp_async_wait<0>();
      // now all see this tap's weights and the halo, and nobody reads those of the tap before
      __syncthreads();
      if (tap == 0 && step + 1 < end_step) {
        halo.fetch(input, input.channels(step + 1), halos + (step + 1 - first_step) % 2 * kHalo * STEP);
      }
      const int next_tap = (tap + 1) % kTaps, next_step = next_tap == 0 ? step + 1 : step;
      if (next_step < end_step) {
        fetch_weights(weight, weight_row, channels_of_y, first_k, input.channels(next_step), next_tap,
                      weights + stage * TILE_K * STEP);
      }
      cp_async_commit();

      const int shift = tap / KERNEL_SIZE * kHaloWidth + tap % KERNEL_SIZE;
      int shifted[kWarpPositions / 16];
#pragma unroll
      for (int i = 0; i < kWarpPositions / 16; ++i) shifted[i] = places[i] + shift;
      multiply_step(u, shifted, w, row_of_b, sum);
    }
  }

  // From fragments to rows: 16 positions at a time through the warp's own scratch.
  __syncthreads();
  float* scratch = reinterpret_cast<float*>(shared_memory()) + warp * 16 * kScratchRow;
  constexpr int kPipeline = 2 * (kHalo + TILE_K) * STEP * static_cast<int>(sizeof(T));
  constexpr int kScratch = kWarps * 16 * kScratchRow * static_cast<int>(sizeof(float));
  float* offsets = reinterpret_cast<float*>(shared_memory() + (kPipeline > kScratch ? kPipeline : kScratch));
  for (int i = thread; i < TILE_K; i += kThreads) {
    const int k = first_k + i;
    const bool valid = k < channels_of_y;
    offsets[i] =
        valid ? parameter(bias, k, 0.0f) + parameter(channel_bias, sample * channel_bias_stride + k, 0.0f) : 0.0f;
  }
  __syncthreads();
  if (MOMENTS) {
    const int row = first_row + warp_position / TILE_W, column = first_column + warp_position % TILE_W;
    const int below = static_cast<int>(out_height) - row, right = static_cast<int>(out_width) - column;
    // the same in the whole warp
    if (below > 0 && right > 0) {
      const i64 rows = (out_height + kPatchHeight - 1) / kPatchHeight,
                columns = (out_width + kPatchWidth - 1) / kPatchWidth;
      const i64 patch = (sample * rows + row / kPatchHeight) * columns + column / kPatchWidth;
      write_moments(sum, offsets + warp_k, below < kPatchHeight ? below : kPatchHeight,
                    right < kPatchWidth ? right : kPatchWidth, channels_of_y - first_k - warp_k,
                    moments + (patch * out_channels + first_k + warp_k) * 2);
    }
  }
  const i64 positions = batch * out_height * out_width, workspace_row = padded(channels_of_y);
#pragma unroll
  for (int i = 0; i < kWarpPositions / 16; ++i) {
    __syncwarp();
    store_rows<kScratchRow>(scratch, sum[i]);
    __syncwarp();
    constexpr int kVectors = WARP_K / OUT_VECTOR;
#pragma unroll 1
    for (int item = lane; item < 16 * kVectors; item += kWarp) {
      const int place = warp_position + i * 16 + item / kVectors, k_of_warp = item % kVectors * OUT_VECTOR;
      const int row = first_row + place / TILE_W, column = first_column + place % TILE_W;
      const int k = first_k + warp_k + k_of_warp;
      if (row >= out_height || column >= out_width || k >= channels_of_y) continue;
      const i64 position = (sample * out_height + row) * out_width + column;
      float of_row[OUT_VECTOR];
      load_pieces<OUT_VECTOR>(scratch + item / kVectors * kScratchRow + k_of_warp, of_row);
      if (!MOMENTS && workspace != nullptr) {
        store_pieces<OUT_VECTOR>(workspace + (split * positions + position) * workspace_row + k, of_row);
      } else {
        write(of_row, offsets + warp_k + k_of_warp, residual, output_scale, y, position * out_channels + k);
      }
    }
  }
}

// y from workspace [splits, B · space, K rounded up to 8]; a thread for each OUT_VECTOR channels of a position.
extern "C" __global__ void __launch_bounds__(kReduceThreads)
    conv2d_reduce(const float* workspace, const P* bias, const P* channel_bias, const T* residual, T* y, i64 batch,
                  i64 space, i64 out_channels, i64 channel_bias_stride, i64 splits, float output_scale) {
  const i64 item = static_cast<i64>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const i64 vectors = out_channels / OUT_VECTOR, position = item / vectors, k = item % vectors * OUT_VECTOR;
  if (position >= batch * space) return;
  const i64 row = padded(static_cast<int>(out_channels));
  float sum[OUT_VECTOR] = {}, offset[OUT_VECTOR];
#pragma unroll 1
  for (i64 split = 0; split < splits; ++split) {
    float more[OUT_VECTOR];
    load_pieces<OUT_VECTOR>(workspace + (split * batch * space + position) * row + k, more);
#pragma unroll
    for (int v = 0; v < OUT_VECTOR; ++v) sum[v] += more[v];
  }
#pragma unroll
  for (int v = 0; v < OUT_VECTOR; ++v) {
    offset[v] =
        parameter(bias, k + v, 0.0f) + parameter(channel_bias, position / space * channel_bias_stride + k + v, 0.0f);
  }
  write(sum, offset, residual, output_scale, y, position * out_channels + k);
}
