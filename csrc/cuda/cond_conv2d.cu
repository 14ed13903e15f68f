// cond_conv2d: what surrounds the convolution, which is conv2d.cu's with weights of each sample.
//
// With routing, cond_conv2d_activate writes u = act(norm(z)), z = cat(x, skip), and sums of it over chunks of
// positions. cond_conv2d_route finishes the mean and leaves alpha' = alpha + routing(R · mean(u) + r), and with it the
// mixed biases. cond_conv2d_mix leaves W_b = Σ alpha'_be · W_e. Sums are taken in a fixed order, without atomics.
//
// Maps are channels last, [B, S, C].
//
// Defined by the host: DTYPE, the maps' and the experts' element; PARAMETER_DTYPE, that of all given to route; VECTOR,
// elements of one access to x, skip and u, which divides the channels of both; MIX_VECTOR, the same for the experts;
// HELD, experts that a thread keeps in registers while it mixes.
#include "device.cuh"

using namespace fastsd;

namespace {

using T = DTYPE;
using P = PARAMETER_DTYPE;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 3;  // bounds registers to 80
constexpr int kColumn = 8;                   // channels to whose multiple those of the coefficients are padded

// a tile of the activation: columns of VECTOR channels, and rows of positions at a time
constexpr int kColumns = 8;
constexpr int kRows = kThreads / kColumns;
constexpr int kTile = kColumns * VECTOR;

__device__ float parameter(const P* values, i64 index, float otherwise) {
  return values == nullptr ? otherwise : to_float(values[index]);
}

__device__ i64 padded(i64 channels) {
  return (channels + kColumn - 1) / kColumn * kColumn;
}

// What the norm does to VECTOR channels: (z − center) · scale + offset.
struct Coefficients {
  float center[VECTOR] = {}, scale[VECTOR], offset[VECTOR] = {};

  // from: of the sample [3, row]; or null
  __device__ Coefficients(const float* from, i64 row, i64 channel) {
    constexpr int kPiece = VECTOR < 4 ? VECTOR : 4;
#pragma unroll
    for (int first = 0; first < VECTOR; first += kPiece) {
      float pieces[3][kPiece] = {};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (from != nullptr) load(from + i * row + channel + first, pieces[i]);
      }
#pragma unroll
      for (int v = 0; v < kPiece; ++v) {
        center[first + v] = pieces[0][v];
        scale[first + v] = from == nullptr ? 1.0f : pieces[1][v];
        offset[first + v] = pieces[2][v];
      }
    }
  }
};

}  // namespace

// u [B, S, C], or null where it is z; sums [B, chunks, C]. coefficients [B, 3, C'] as conv2d_coefficients leaves them,
// or null. Grid: samples × chunks of positions × tiles of channels. Shared: kRows · kTile floats.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    cond_conv2d_activate(const T* x, const T* skip, const float* coefficients, T* u, float* sums, i64 x_channels,
                         i64 skip_channels, i64 space, i64 chunk, i64 chunks, i64 activate) {
  const int thread = threadIdx.x, column = thread % kColumns, row = thread / kColumns;
  const i64 channels = x_channels + skip_channels;
  const u32 tiles = static_cast<u32>((channels + kTile - 1) / kTile), of_all = blockIdx.x / tiles;
  const int first_channel = static_cast<int>(blockIdx.x % tiles) * kTile;
  const i64 sample = of_all / static_cast<u32>(chunks), first = of_all % static_cast<u32>(chunks) * chunk;
  const i64 end = first + chunk < space ? first + chunk : space;
  float* cells = reinterpret_cast<float*>(shared_memory());

  const int channel = first_channel + column * VECTOR;
  float sum[VECTOR] = {};
  if (channel < channels) {
    const bool in_x = channel < x_channels;
    const i64 stride = in_x ? x_channels : skip_channels, own = in_x ? channel : channel - x_channels;
    const T* map = (in_x ? x : skip) + sample * space * stride + own;
    const i64 x_padded = padded(x_channels), coefficients_row = x_padded + padded(skip_channels);
    const Coefficients norm(coefficients == nullptr ? nullptr : coefficients + sample * 3 * coefficients_row,
                            coefficients_row, in_x ? own : x_padded + own);
#pragma unroll 2
    for (i64 position = first + row; position < end; position += kRows) {
      float z[VECTOR];
      load(map + position * stride, z);
      if (u != nullptr) {
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
          z[v] = (z[v] - norm.center[v]) * norm.scale[v] + norm.offset[v];
          if (activate) z[v] = silu(z[v]);
          // what is convolved is rounded, and its mean is that of it
          z[v] = to_float(from_float<T>(z[v]));
        }
        store(u + (sample * space + position) * channels + channel, z);
      }
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sum[v] += z[v];
    }
  }
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) cells[row * kTile + column * VECTOR + v] = sum[v];
  __syncthreads();
  if (thread < kTile && first_channel + thread < channels) {
    float total = 0.0f;
    for (int i = 0; i < kRows; ++i) total += cells[i * kTile + thread];
    sums[of_all * channels + first_channel + thread] = total;
  }
}

// alpha [samples, experts]; rows [samples, K], or null. sums [samples, chunks, C] of cond_conv2d_activate, of which the
// first chunk gives way to the means; null without routing. given [samples or 1, experts], or null. A block for each
// sample.
extern "C" __global__ void __launch_bounds__(kThreads)
    cond_conv2d_route(float* sums, const P* routing_weight, const P* routing_bias, const P* given,
                      const P* expert_biases, const P* channel_bias, float* alpha, float* rows, i64 channels,
                      i64 out_channels, i64 space, i64 chunks, i64 experts, i64 given_stride, i64 channel_bias_stride,
                      i64 softmax) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const i64 sample = blockIdx.x;
  float* own = alpha + sample * experts;
  float top = 0.0f, total = 0.0f;
  if (sums != nullptr) {
    float* means = sums + sample * chunks * channels;
    for (i64 channel = thread; channel < channels; channel += kThreads) {
      float sum = 0.0f;
      for (i64 chunk = 0; chunk < chunks; ++chunk) sum += means[chunk * channels + channel];
      means[channel] = sum / static_cast<float>(space);
    }
    __syncthreads();
    for (i64 expert = warp; expert < experts; expert += kWarps) {
      float logit = 0.0f;
      for (i64 channel = lane; channel < channels; channel += kWarp) {
        logit += to_float(routing_weight[expert * channels + channel]) * means[channel];
      }
      logit = warp_sum(logit) + parameter(routing_bias, expert, 0.0f);
      if (lane == 0) own[expert] = logit;
    }
    __syncthreads();
    if (softmax) {
      top = own[0];
      for (i64 expert = 1; expert < experts; ++expert) top = fmaxf(top, own[expert]);
      for (i64 expert = 0; expert < experts; ++expert) total += expf(own[expert] - top);
    }
    __syncthreads();
  }
  for (i64 expert = thread; expert < experts; expert += kThreads) {
    float routed = 0.0f;
    if (sums != nullptr) routed = softmax ? expf(own[expert] - top) / total : 1.0f / (1.0f + expf(-own[expert]));
    own[expert] = routed + parameter(given, sample * given_stride + expert, 0.0f);
  }
  if (rows == nullptr) return;
  __syncthreads();
  for (i64 k = thread; k < out_channels; k += kThreads) {
    float row = parameter(channel_bias, sample * channel_bias_stride + k, 0.0f);
    for (i64 expert = 0; expert < experts; ++expert) {
      row += own[expert] * to_float(expert_biases[expert * out_channels + k]);
    }
    rows[sample * out_channels + k] = row;
  }
}

// mixed [samples, numel] from experts [count, numel]; a thread for MIX_VECTOR neighbours of samples_per_block samples.
// Experts in excess of HELD are read anew for each sample.
extern "C" __global__ void __launch_bounds__(kThreads)
    cond_conv2d_mix(const T* experts, const float* alpha, T* mixed, i64 numel, i64 samples, i64 count,
                    i64 samples_per_block) {
  const i64 vectors = numel / MIX_VECTOR;
  const u32 blocks = static_cast<u32>((vectors + kThreads - 1) / kThreads);
  const i64 item = static_cast<i64>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  const i64 first_sample = blockIdx.x / blocks * samples_per_block;
  const i64 end = first_sample + samples_per_block < samples ? first_sample + samples_per_block : samples;
  if (item >= vectors) return;
  // pointers that move on: of products the compiler does not see that 16 bytes can be stored at once
  experts += item * MIX_VECTOR;
  alpha += first_sample * count;
  mixed += first_sample * numel + item * MIX_VECTOR;
  float held[HELD][MIX_VECTOR];
#pragma unroll 1
  for (i64 sample = first_sample; sample < end; ++sample) {
    float sum[MIX_VECTOR] = {};
#pragma unroll 1
    for (i64 first = 0; first < count; first += HELD) {
      if (sample == first_sample || count > HELD) {
#pragma unroll
        for (int e = 0; e < HELD; ++e) {
          if (first + e < count) load(experts + (first + e) * numel, held[e]);
        }
      }
#pragma unroll
      for (int e = 0; e < HELD; ++e) {
        if (first + e >= count) continue;
        const float weight = alpha[first + e];
#pragma unroll
        for (int v = 0; v < MIX_VECTOR; ++v) sum[v] += weight * held[e][v];
      }
    }
    store(mixed, sum);
    alpha += count;
    mixed += numel;
  }
}
