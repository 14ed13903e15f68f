// attention: softmax(scale · q kᵀ + bias) v of every head, without a matrix of scores in memory.
//
// A block has 16 · WARPS queries of one head. It goes through the head's keys: the next keys and values are on their
// way to shared memory while the warps multiply those that are there, as attention.cuh says. q, k and v are read where
// they are, by their strides.
//
// A key's bias is that of its sample, -inf for one that is left out and for the places behind the last key. Where it is
// -inf for all of them, the sum of the weights is 0 and the result NaN, as the definition has it.
//
// Nothing depends on the order of blocks, and there are no atomics: two runs are equal to the bit. Defined by the host:
// what attention.cuh takes.
#include "attention.cuh"

using namespace fastsd;

namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -3.40282347e38f;

// In units of ln 2. The lowest numbers, which stand for -inf in some models' masks, would become it: a query would get
// NaN where the definition weighs all keys alike.
__device__ float in_base_2(float bias) {
  const float scaled = bias * kLog2E;
  return scaled == kNever && bias != kNever ? kLowest : scaled;
}

}  // namespace

// y [B, heads, N, d] from q [B, heads, N, d], k and v [B, heads, M, d] and bias [B, M], which may be null and has a
// batch stride of 0 where samples share a row.
// Grid: samples and heads × tiles of queries. Shared: queries, later the result; then keys, values and biases: a tile
// each of all keys, where one holds them, else two.
extern "C" __global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    attention_attend(const T* q, const T* k, const T* v, const float* bias, T* y, i64 q_batch_stride, i64 q_head_stride,
                     i64 q_token_stride, i64 k_batch_stride, i64 k_head_stride, i64 k_token_stride, i64 v_batch_stride,
                     i64 v_head_stride, i64 v_token_stride, i64 y_batch_stride, i64 y_head_stride, i64 y_token_stride,
                     i64 bias_batch_stride, i64 heads, i64 query_count, i64 key_count, i64 tiles, float scale) {
  const int thread = threadIdx.x, warp = thread / kWarp;
  const u32 tile_count = static_cast<u32>(tiles), matrix = blockIdx.x / tile_count;
  const u32 sample = matrix / static_cast<u32>(heads), head = matrix - sample * static_cast<u32>(heads);
  const int first_query = static_cast<int>(blockIdx.x - matrix * tile_count) * kQueries;
  const int last_query = static_cast<int>(query_count), last_key = static_cast<int>(key_count);
  const int key_tiles = (last_key + KEYS - 1) / KEYS, stages = key_tiles > 1 ? 2 : 1;

  T* queries = reinterpret_cast<T*>(shared_memory());
  T* keys = queries + kQueries * kPitch;
  T* values = keys + stages * KEYS * kPitch;
  float* biases = reinterpret_cast<float*>(values + stages * KEYS * kPitch);
  T* own_queries = queries + warp * kWarpQueries * kPitch;

  const T* k_matrix = k + sample * k_batch_stride + head * k_head_stride;
  const T* v_matrix = v + sample * v_batch_stride + head * v_head_stride;
  const auto fetch_keys = [&](int tile) {
    const int stage = tile % 2, start = tile * KEYS;
#pragma unroll 1
    for (int item = thread; item < KEYS * kPieces; item += kThreads) {
      const int row = item / kPieces, element = item % kPieces * VECTOR;
      const bool valid = start + row < last_key;
      const i64 token = valid ? start + row : 0;
      const int to = (stage * KEYS + row) * kPitch + element;
      fetch(k_matrix + token * k_token_stride + element, valid, keys + to);
      fetch(v_matrix + token * v_token_stride + element, valid, values + to);
    }
#pragma unroll 1
    for (int row = thread; row < KEYS; row += kThreads) {
      float of_key = start + row < last_key ? 0.0f : kNever;
      if (bias != nullptr && start + row < last_key) of_key = in_base_2(bias[sample * bias_batch_stride + start + row]);
      biases[stage * KEYS + row] = of_key;
    }
    cp_async_commit();
  };

  const T* q_matrix = q + sample * q_batch_stride + head * q_head_stride;
#pragma unroll 1
  for (int item = thread; item < kQueries * kPieces; item += kThreads) {
    const int row = item / kPieces, element = item % kPieces * VECTOR;
    const bool valid = first_query + row < last_query;
    const i64 token = valid ? first_query + row : 0;
    fetch(q_matrix + token * q_token_stride + element, valid, queries + row * kPitch + element);
  }
  cp_async_commit();
  fetch_keys(0);
  clear_padding(queries, kQueries);
  clear_padding(keys, stages * KEYS);

  u32 held[kHoldQueries ? kSteps : 1][4];
  if constexpr (kHoldQueries) {
    cp_async_wait<1>();
    __syncthreads();
    hold_queries(held, own_queries);
  }
  Softmax softmax;
  softmax.clear();
#pragma unroll 1
  for (int tile = 0; tile < key_tiles; ++tile) {
    cp_async_wait<0>();
    // now all see this tile, and nobody reads the one before
    __syncthreads();
    if (tile + 1 < key_tiles) fetch_keys(tile + 1);
    const int stage = tile % 2;
    float scores[KEYS / 8][4];
    multiply_keys(held, own_queries, keys + stage * KEYS * kPitch, scores);
    softmax.weigh(scores, biases + stage * KEYS, scale);
    multiply_values(scores, values + stage * KEYS * kPitch, softmax.values);
  }

  const float factor[2] = {softmax.factor(0, 1.0f), softmax.factor(1, 1.0f)};
  T* y_matrix = y + sample * y_batch_stride + head * y_head_stride;
  write_rows(
      own_queries, [&](int j, int i) { return softmax.values[j][i] * factor[i / 2]; },
      [&](int row) {
        const i64 query = first_query + warp * kWarpQueries + row;
        return query < last_query ? y_matrix + query * y_token_stride : nullptr;
      });
}
