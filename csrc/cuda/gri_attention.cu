// gri_attention: the tokens of a map attend to their window's tokens, and to cells, which are means over the map.
//
// gri_attention_pool makes the cells. A block of gri_attention_attend has 16 · WARPS queries of one window. It goes
// through the window's keys and then through the cells: the next keys and values are on their way to shared memory
// while the warps multiply those that are there, as attention.cuh says. Keys are read where they are, by the strides of
// k and v; nothing is permuted.
//
// A key has a bias: the logarithm of the tokens that a cell stands for, 0 for a token, -inf for a cell that is left out
// and for the places behind the last key.
//
// Nothing depends on the order of blocks, and there are no atomics: two runs are equal to the bit. Defined by the host:
// what attention.cuh takes.
#include "attention.cuh"

using namespace fastsd;

namespace {

__device__ int least(int a, int b) {
  return a < b ? a : b;
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
  const int thread = threadIdx.x, warp = thread / kWarp;
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
        hold_queries(held, own_queries);
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

  const float rest = gate == nullptr ? 1.0f : 1.0f - regional_share();
  const float factor[2] = {softmax.factor(0, rest), softmax.factor(1, rest)};
  T* y_matrix = y + sample * y_batch_stride + head * y_head_stride;
  write_rows(
      own_queries,
      [&](int j, int i) {
        const float own = softmax.values[j][i] * factor[i / 2];
        return gate == nullptr ? own : own + regional[(j * 4 + i) * kThreads + thread];
      },
      [&](int row) {
        const int query = first_query + warp * kWarpQueries + row;
        return query < own_count ? y_matrix + window.token(query, width) * y_token_stride : nullptr;
      });
}
