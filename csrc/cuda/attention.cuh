// What kernels of softmax attention share. A warp has 16 queries. It goes through the keys, KEYS at a time, as
// FlashAttention does: the softmax is taken as it comes, and its weights go from the first product to the second in
// registers. Scores and the biases of keys are in units of ln 2.
//
// Defined by the host: DTYPE, __half or __nv_bfloat16; HEAD_WIDTH, d; VECTOR, elements of one access to q, k and v,
// which divides d and all strides; with 8 they are copied asynchronously; WARPS; KEYS, a multiple of 16.
#pragma once

#include "device.cuh"

namespace fastsd {

// each variant has its own: nothing here may be linked with that of another
namespace {

using T = DTYPE;

constexpr int kThreads = WARPS * kWarp;
constexpr int kWarpQueries = 16;
constexpr int kQueries = WARPS * kWarpQueries;
constexpr int kSteps = (HEAD_WIDTH + 15) / 16;  // of the product of queries and keys
constexpr int kColumns = (HEAD_WIDTH + 7) / 8;  // of that of weights and values
constexpr int kPadded = kSteps * 16;            // zeros behind d
constexpr int kPitch = kPadded + 8;             // an odd number of 16 bytes keeps 8 rows out of each other's banks
constexpr int kPieces = HEAD_WIDTH / VECTOR;    // of a row
constexpr int kResidentThreads = HEAD_WIDTH <= 160 ? 384 : 256;  // bounds registers: to 168, to 255
constexpr bool kHoldQueries = HEAD_WIDTH <= 128;                 // in registers, else they are read again for each tile
// of one access to the result, whose rows are dense
constexpr int kOutVector = HEAD_WIDTH % 8 == 0 ? 8 : HEAD_WIDTH % 4 == 0 ? 4 : HEAD_WIDTH % 2 == 0 ? 2 : 1;
constexpr float kNever = __builtin_bit_cast(float, 0xff800000u);  // -inf, for which NVRTC has no name

static_assert(KEYS % 16 == 0 && HEAD_WIDTH % VECTOR == 0 && VECTOR <= 8, "whole fragments and whole accesses");

// Brings one piece of a row to shared memory, or zeros.
__device__ inline void fetch(const T* from, bool valid, T* to) {
  if constexpr (VECTOR == 8) {
    cp_async_16(to, from, valid);
  } else {
    float elements[VECTOR] = {};
    if (valid) load(from, elements);
    store(to, elements);
  }
}

// Zeros in the elements behind d of `rows` rows, which no fetch touches.
__device__ inline void clear_padding(T* to, int rows) {
  if constexpr (HEAD_WIDTH < kPadded) {
    constexpr int kVector = VECTOR;
    constexpr int kPiecesBehind = (kPadded - HEAD_WIDTH) / kVector;
    const float zeros[kVector] = {};
    for (int item = threadIdx.x; item < rows * kPiecesBehind; item += kThreads) {
      store(to + item / kPiecesBehind * kPitch + HEAD_WIDTH + item % kPiecesBehind * kVector, zeros);
    }
  }
}

// The maximum and the sum of the four lanes that share a row of a fragment.
__device__ inline float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}
__device__ inline float row_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

__device__ inline u32 packed(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  u32 word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

// A warp's softmax as far as it has come. A lane has two rows, lane / 4 and 8 below it, of each fragment.
struct Softmax {
  float largest[2], sum[2];  // sum: of this lane's keys alone
  float values[kColumns][4];

  __device__ void clear() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      largest[row] = kNever;
      sum[row] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[j][i] = 0.0f;
    }
  }

  // Scores become weights relative to the new maximum; what there is already is brought to the same measure.
  __device__ void weigh(float (&scores)[KEYS / 8][4], const float* bias, float scale) {
    const float before[2] = {largest[0], largest[1]};
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      float of_key[2];
      load(bias + j * 8 + threadIdx.x % 4 * 2, of_key);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[j][i] = fmaf(scores[j][i], scale, of_key[i % 2]);
        largest[i / 2] = fmaxf(largest[i / 2], scores[j][i]);
      }
    }
    float base[2], factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      largest[row] = row_max(largest[row]);
      // so far all may be left out: -inf less -inf is no number
      base[row] = largest[row] == kNever ? 0.0f : largest[row];
      factor[row] = exp2_fast(before[row] - base[row]);
      sum[row] *= factor[row];
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[j][i] *= factor[i / 2];
    }
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[j][i] = exp2_fast(scores[j][i] - base[i / 2]);
        sum[i / 2] += scores[j][i];
      }
    }
  }

  // What to multiply the values of a row by, for a softmax that has `share` of the result.
  __device__ float factor(int row, float share) const { return __fdividef(share, row_sum(sum[row])); }
};

// Takes the warp's queries, which wait in shared memory, to registers.
__device__ inline void hold_queries(u32 (&held)[kHoldQueries ? kSteps : 1][4], const T* queries) {
  if constexpr (kHoldQueries) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ldmatrix_x4(held[step], queries + lane % 16 * kPitch + step * 16 + lane / 16 * 8);
    }
  }
}

// scores = queries · keysᵀ
__device__ inline void multiply_keys(const u32 (&held)[kHoldQueries ? kSteps : 1][4], const T* queries, const T* keys,
                                     float (&scores)[KEYS / 8][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[j][i] = 0.0f;
  }
  const T* row_of_a = queries + lane % 16 * kPitch + lane / 16 * 8;
  const T* row_of_b = keys + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    u32 a[4];
    if constexpr (kHoldQueries) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[step][i];
    } else {
      ldmatrix_x4(a, row_of_a + step * 16);
    }
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
      u32 b[4];
      ldmatrix_x4(b, row_of_b + j * 16 * kPitch + step * 16);
      const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<T>(scores[2 * j], a, low);
      mma_m16n8k16<T>(scores[2 * j + 1], a, high);
    }
  }
}

// sum += weights · values. As the first product leaves its sums in a lane, so the second takes its factors.
__device__ inline void multiply_values(const float (&weights)[KEYS / 8][4], const T* values,
                                       float (&sum)[kColumns][4]) {
  const int lane = threadIdx.x % kWarp;
  const T* row_of_b = values + lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step) {
    const float (&left)[4] = weights[2 * step], (&right)[4] = weights[2 * step + 1];
    const u32 a[4] = {packed(left[0], left[1]), packed(left[2], left[3]), packed(right[0], right[1]),
                      packed(right[2], right[3])};
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      u32 b[4];
      ldmatrix_x4<true>(b, row_of_b + step * 16 * kPitch + j * 8);
      const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<T>(sum[j], a, low);
      if (j + 1 < kColumns) mma_m16n8k16<T>(sum[j + 1], a, high);
    }
  }
}

// Writes the warp's results, result(column of fragments, place in one), by way of its 16 rows of shared memory, whose
// queries nobody needs any more. row(of the warp) gives where a row goes; from the first that is null on there is none.
template <class Result, class Row>
__device__ inline void write_rows(T* rows, Result result, Row row) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    T* to = rows + lane / 4 * kPitch + j * 8 + lane % 4 * 2;
    const float upper[2] = {result(j, 0), result(j, 1)}, lower[2] = {result(j, 2), result(j, 3)};
    store(to, upper);
    store(to + 8 * kPitch, lower);
  }
  __syncwarp();
  constexpr int kOutPieces = HEAD_WIDTH / kOutVector;
#pragma unroll 1
  for (int item = lane; item < kWarpQueries * kOutPieces; item += kWarp) {
    T* to = row(item / kOutPieces);
    if (to == nullptr) break;
    const int element = item % kOutPieces * kOutVector;
    float piece[kOutVector];
    load(rows + item / kOutPieces * kPitch + element, piece);
    store(to + element, piece);
  }
}

}  // namespace

}  // namespace fastsd
