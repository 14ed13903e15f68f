// gri_attention: the tokens of a map attend to their window's tokens, and to cells, which are means over the map.
//
// gri_attention_pool makes the cells. A block of gri_attention_attend has 16 · WARPS queries of one window, a warp 16
// of them. It goes through the window's keys and then through the cells, KEYS at a time, as FlashAttention does: the
// next keys and values are on their way to shared memory while the warps multiply those that are there, the softmax is
// taken as it comes, and its weights go from the first product to the second in registers. Keys are read where they
// are, by the strides of k and v; nothing is permuted.
//
// A key has a bias: the logarithm of the tokens that a cell stands for, 0 for a token, -inf for a cell that is left out
// and for the places behind the last key. Scores and biases are in units of ln 2.
//
// Nothing depends on the order of blocks, and there are no atomics: two runs are equal to the bit.
//
// Defined by the host: DTYPE, __half or __nv_bfloat16; HEAD_WIDTH, d; VECTOR, elements of one access to q, k and v,
// which divides d and all strides; with 8 they are copied asynchronously; WARPS; KEYS, a multiple of 16.
#include "device.cuh"

using namespace fastsd;

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

__device__ int least(int a, int b) {
  return a < b ? a : b;
}

// Brings one piece of a row to shared memory, or zeros.
__device__ void fetch(const T* from, bool valid, T* to) {
  if constexpr (VECTOR == 8) {
    cp_async_16(to, from, valid);
  } else {
    float elements[VECTOR] = {};
    if (valid) load(from, elements);
    store(to, elements);
  }
}

// Zeros in the elements behind d of `rows` rows, which no fetch touches.
__device__ void clear_padding(T* to, int rows) {
  if constexpr (HEAD_WIDTH < kPadded) {
    constexpr int kVector = VECTOR;
    constexpr int kPiecesBehind = (kPadded - HEAD_WIDTH) / kVector;
    const float zeros[kVector] = {};
    for (int item = threadIdx.x; item < rows * kPiecesBehind; item += kThreads) {
      store(to + item / kPiecesBehind * kPitch + HEAD_WIDTH + item % kPiecesBehind * kVector, zeros);
    }
  }
}

// An area of the map: rows and columns from the first on to before the end.
struct Area {
  int top, left, bottom, right;

  __device__ int size() const { return (bottom - top) * (right - left); }
  // Where in a map of `width` the area's token of this number is.
  __device__ int token(u32 index, i64 width) const {
    const u32 row = index / static_cast<u32>(right - left);
    return (top + static_cast<int>(row)) * static_cast<int>(width) + left +
           static_cast<int>(index - row * static_cast<u32>(right - left));
  }
  __device__ bool holds(const Area& other) const {
    return top <= other.top && other.bottom <= bottom && left <= other.left && other.right <= right;
  }
};

// One of the areas that a map is cut into; those at its far edges are smaller.
__device__ Area area(u32 index, u32 across, i64 height, i64 width, i64 map_height, i64 map_width) {
  const u32 row = index / across;
  const int top = static_cast<int>(row) * static_cast<int>(height);
  const int left = static_cast<int>(index - row * across) * static_cast<int>(width);
  return {top, left, least(top + static_cast<int>(height), static_cast<int>(map_height)),
          least(left + static_cast<int>(width), static_cast<int>(map_width))};
}

// The maximum and the sum of the four lanes that share a row of a fragment.
__device__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}
__device__ float row_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

__device__ u32 packed(float low, float high) {
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

// scores = queries · keysᵀ
__device__ void multiply_keys(const u32 (&held)[kHoldQueries ? kSteps : 1][4], const T* queries, const T* keys,
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
__device__ void multiply_values(const float (&weights)[KEYS / 8][4], const T* values, float (&sum)[kColumns][4]) {
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

}  // namespace

// cells [B, heads, G, d] of two maps: the means of the tokens that each cell has, a thread for each VECTOR of them.
// Grid: samples and heads × maps × parts of G · d / VECTOR.
extern "C" __global__ void __launch_bounds__(256, 4)
    gri_attention_pool(const T* first, const T* second, T* first_cells, T* second_cells, i64 first_batch_stride,
                       i64 first_head_stride, i64 first_token_stride, i64 second_batch_stride, i64 second_head_stride,
                       i64 second_token_stride, i64 heads, i64 height, i64 width, i64 cell_height, i64 cell_width,
                       i64 cells_across, i64 cell_count) {
  const u32 items = static_cast<u32>(cell_count) * kPieces, parts = (items + blockDim.x - 1) / blockDim.x;
  const u32 item = blockIdx.x % parts * blockDim.x + threadIdx.x;
  const bool is_first = blockIdx.x / parts % 2 == 0;
  const u32 matrix = blockIdx.x / parts / 2, sample = matrix / static_cast<u32>(heads);
  const u32 head = matrix - sample * static_cast<u32>(heads);
  if (item >= items) return;

  const u32 cell = item / kPieces, element = item % kPieces * VECTOR;
  const Area own = area(cell, static_cast<u32>(cells_across), cell_height, cell_width, height, width);
  const i64 step = is_first ? first_token_stride : second_token_stride;
  const T* from = is_first ? first + sample * first_batch_stride + head * first_head_stride
                           : second + sample * second_batch_stride + head * second_head_stride;
  from += (own.top * width + own.left) * step + element;
  float mean[VECTOR] = {};
#pragma unroll 1
  for (int row = 0; row < own.bottom - own.top; ++row) {
#pragma unroll 4
    for (int column = 0; column < own.right - own.left; ++column) {
      float token[VECTOR];
      load(from + (row * width + column) * step, token);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) mean[i] += token[i];
    }
  }
  const float tokens = static_cast<float>(own.size());
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) mean[i] = __fdividef(mean[i], tokens);
  store((is_first ? first_cells : second_cells) + (matrix * cell_count + cell) * HEAD_WIDTH + element, mean);
}

// y [B, heads, N, d] from q, k, v [B, heads, N, d] and k_cells, v_cells [B, heads, G, d], which may be null. gate
// [heads] is null for one softmax over all keys. Without regions a window is the whole map, and none of its keys count.
// Grid: samples and heads × windows × tiles of a window's queries; in a window at the edge the last ones may be empty.
// Shared: queries, later the result; two tiles each of keys, of values and of biases; with a gate, sums of the regions.
extern "C" __global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    gri_attention_attend(const T* q, const T* k, const T* v, const T* k_cells, const T* v_cells, const float* gate,
                         T* y, i64 q_batch_stride, i64 q_head_stride, i64 q_token_stride, i64 k_batch_stride,
                         i64 k_head_stride, i64 k_token_stride, i64 v_batch_stride, i64 v_head_stride,
                         i64 v_token_stride, i64 y_batch_stride, i64 y_head_stride, i64 y_token_stride, i64 heads,
                         i64 height, i64 width, i64 window_height, i64 window_width, i64 regions, i64 cell_height,
                         i64 cell_width, i64 windows_across, i64 windows, i64 tiles, i64 cells_across, i64 cell_count,
                         i64 mask_own_window, float scale) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const u32 tile_count = static_cast<u32>(tiles), window_count = static_cast<u32>(windows);
  const int first_query = static_cast<int>(blockIdx.x % tile_count) * kQueries;
  const u32 matrix = blockIdx.x / tile_count / window_count, sample = matrix / static_cast<u32>(heads);
  const u32 head = matrix - sample * static_cast<u32>(heads);
  const Area window = area(blockIdx.x / tile_count % window_count, static_cast<u32>(windows_across), window_height,
                           window_width, height, width);
  const int own_count = window.size();
  if (first_query >= own_count) return;
  const int cells = static_cast<int>(cell_count), window_tiles = regions ? (own_count + KEYS - 1) / KEYS : 0;
  const int key_tiles = window_tiles + (cells + KEYS - 1) / KEYS;

  T* queries = reinterpret_cast<T*>(shared_memory());
  T* keys = queries + kQueries * kPitch;
  T* values = keys + 2 * KEYS * kPitch;
  float* biases = reinterpret_cast<float*>(values + 2 * KEYS * kPitch);
  float* regional = biases + 2 * KEYS;
  T* own_queries = queries + warp * kWarpQueries * kPitch;

  // first the window's keys, then the cells
  const auto fetch_keys = [&](int tile) {
    const bool pooled = tile >= window_tiles;
    const int stage = tile % 2, start = (pooled ? tile - window_tiles : tile) * KEYS;
    const int count = pooled ? cells : own_count;
    // anew for each tile: they cost more in registers
    const i64 first_cell = (sample * heads + head) * cell_count * HEAD_WIDTH;
    const T* from_k = pooled ? k_cells + first_cell : k + sample * k_batch_stride + head * k_head_stride;
    const T* from_v = pooled ? v_cells + first_cell : v + sample * v_batch_stride + head * v_head_stride;
#pragma unroll 1
    for (int item = thread; item < KEYS * kPieces; item += kThreads) {
      const int row = item / kPieces, element = item % kPieces * VECTOR;
      const bool valid = start + row < count;
      const i64 token = !valid ? 0 : pooled ? start + row : window.token(start + row, width);
      const int to = (stage * KEYS + row) * kPitch + element;
      fetch(from_k + token * (pooled ? HEAD_WIDTH : k_token_stride) + element, valid, keys + to);
      fetch(from_v + token * (pooled ? HEAD_WIDTH : v_token_stride) + element, valid, values + to);
    }
#pragma unroll 1
    for (int row = thread; row < KEYS; row += kThreads) {
      float bias = start + row < count ? 0.0f : kNever;
      if (pooled && start + row < count) {
        const Area cell = area(start + row, static_cast<u32>(cells_across), cell_height, cell_width, height, width);
        bias = mask_own_window && window.holds(cell) ? kNever : log2f(static_cast<float>(cell.size()));
      }
      biases[stage * KEYS + row] = bias;
    }
    cp_async_commit();
  };

  const T* q_matrix = q + sample * q_batch_stride + head * q_head_stride;
#pragma unroll 1
  for (int item = thread; item < kQueries * kPieces; item += kThreads) {
    const int row = item / kPieces, element = item % kPieces * VECTOR;
    const bool valid = first_query + row < own_count;
    const i64 token = valid ? window.token(first_query + row, width) : 0;
    fetch(q_matrix + token * q_token_stride + element, valid, queries + row * kPitch + element);
  }
  cp_async_commit();
  clear_padding(queries, kQueries);
  clear_padding(keys, 2 * KEYS);

  u32 held[kHoldQueries ? kSteps : 1][4];
  const auto regional_share = [&] { return __fdividef(1.0f, 1.0f + expf(-gate[head])); };
  Softmax softmax;
  softmax.clear();
#pragma unroll 1
  for (int tile = -1; tile < key_tiles; ++tile) {
    if (tile >= 0) {
      cp_async_wait<0>();
      // now all see this tile, and nobody reads the one before
      __syncthreads();
    }
    if (tile + 1 < key_tiles) fetch_keys(tile + 1);
    if (tile < 0) {
      if constexpr (kHoldQueries) {
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          ldmatrix_x4(held[step], own_queries + lane % 16 * kPitch + step * 16 + lane / 16 * 8);
        }
      }
      continue;
    }
    const int stage = tile % 2;
    if (gate != nullptr && tile == window_tiles) {
      const float share = regional_share();
      const float factor[2] = {softmax.factor(0, share), softmax.factor(1, share)};
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          regional[(j * 4 + i) * kThreads + thread] = softmax.values[j][i] * factor[i / 2];
        }
      }
      softmax.clear();
    }
    float scores[KEYS / 8][4];
    multiply_keys(held, own_queries, keys + stage * KEYS * kPitch, scores);
    softmax.weigh(scores, biases + stage * KEYS, scale);
    multiply_values(scores, values + stage * KEYS * kPitch, softmax.values);
  }

  // From fragments to rows, through the place of the warp's own queries
  const float rest = gate == nullptr ? 1.0f : 1.0f - regional_share();
  const float factor[2] = {softmax.factor(0, rest), softmax.factor(1, rest)};
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    float result[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result[i] = softmax.values[j][i] * factor[i / 2];
      if (gate != nullptr) result[i] += regional[(j * 4 + i) * kThreads + thread];
    }
    T* to = own_queries + lane / 4 * kPitch + j * 8 + lane % 4 * 2;
    const float upper[2] = {result[0], result[1]}, lower[2] = {result[2], result[3]};
    store(to, upper);
    store(to + 8 * kPitch, lower);
  }
  __syncwarp();
  constexpr int kOutPieces = HEAD_WIDTH / kOutVector;
  T* y_matrix = y + sample * y_batch_stride + head * y_head_stride;
#pragma unroll 1
  for (int item = lane; item < kWarpQueries * kOutPieces; item += kWarp) {
    const int row = item / kOutPieces, element = item % kOutPieces * kOutVector;
    const int query = first_query + warp * kWarpQueries + row;
    if (query >= own_count) break;
    float piece[kOutVector];
    load(own_queries + row * kPitch + element, piece);
    store(y_matrix + window.token(query, width) * y_token_stride + element, piece);
  }
}
