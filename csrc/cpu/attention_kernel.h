// The vectorised loops of attention, compiled once per instruction set by foreach_isa.h.
//
// Every lane is a query: scores are [keys, queries], so that softmax never looks across a vector, keys and values are
// read as they lie, one number at a time for all lanes, and nothing is transposed but the queries and the results.

#include "vector_kernel.h"

typedef int32_t Bits __attribute__((vector_size(4 * FASTSD_LANES)));

constexpr int kQueries = 2 * kLanes;
// Rows of a tile of sums that stays in registers, each of two vectors
constexpr int kRows = FASTSD_VECTORS == 32 ? 12 : 6;

// e^x = 2^n 2^r for x <= 0, 2^r to 1.4e-7; 0 from -88.02 down, where e^x is denormal, NaN for NaN.
static inline __attribute__((always_inline)) Vector exp_of(Vector x) {
  const Vector zero = {};
  x = x < -88.02f ? zero - 88.02f : x;
  // the sum's last bits are n + 127, the exponent of 2^n
  const Vector shifted = x * 1.44269504f + (12582912.0f + 127.0f);
  const Vector r = x * 1.44269504f - (shifted - (12582912.0f + 127.0f));
  Vector p = r * 1.326472731e-3f + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  Bits exponent;
  __builtin_memcpy(&exponent, &shifted, sizeof exponent);
  exponent <<= 23;
  Vector power;
  __builtin_memcpy(&power, &exponent, sizeof power);
  return p * power;
}

static inline __attribute__((always_inline)) Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

// The scores of N keys, scores[N, queries], and the largest so far of every query.
template <int N>
static void score_tile(const Segment& of, const float* __restrict q, int64_t width, float scale,
                       float* __restrict scores, Vector* most) {
  const float* __restrict keys = of.keys;
  const int64_t stride = of.key_stride;
  Vector sum[N][2] = {};
  for (int64_t c = 0; c < width; ++c) {
    Vector q0, q1;
    read(q + c * kQueries, q0);
    read(q + c * kQueries + kLanes, q1);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const float k = keys[i * stride + c];
      sum[i][0] += k * q0;
      sum[i][1] += k * q1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < 2; ++j) {
      sum[i][j] = of.bias ? sum[i][j] * scale + of.bias[i] : sum[i][j] * scale;
      write(scores + i * kQueries + j * kLanes, sum[i][j]);
      most[j] = larger(sum[i][j], most[j]);
    }
}

template <int N>
static void score_rest(int64_t count, const Segment& of, const float* q, int64_t width, float scale, float* scores,
                       Vector* most) {
  if constexpr (N > 0) {
    if (count == N) return score_tile<N>(of, q, width, scale, scores, most);
    score_rest<N - 1>(count, of, q, width, scale, scores, most);
  }
}

// out[N, queries] = out * keep + values^T weights, over the keys of a block. These are summed by themselves first: a
// sum over thousands of keys, one after the other, would lose digits.
template <int N>
static void value_tile(Segments block, int64_t first, const float* __restrict weights, const Vector* keep,
                       float* __restrict out) {
  Vector sum[N][2] = {};
  for (const Segment* of = block.data; of < block.data + block.count; ++of) {
    const float* __restrict v = of->values + first;
    for (int64_t key = 0; key < of->count; ++key) {
      Vector p0, p1;
      read(weights, p0);
      read(weights + kLanes, p1);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        sum[i][0] += v[i] * p0;
        sum[i][1] += v[i] * p1;
      }
      v += of->value_stride;
      weights += kQueries;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < 2; ++j) {
      Vector before;
      read(out + i * kQueries + j * kLanes, before);
      write(out + i * kQueries + j * kLanes, before * keep[j] + sum[i][j]);
    }
}

template <int N>
static void values_rest(int64_t count, Segments block, int64_t first, const float* weights, const Vector* keep,
                        float* out) {
  if constexpr (N > 0) {
    if (count == N) return value_tile<N>(block, first, weights, keep, out);
    values_rest<N - 1>(count, block, first, weights, keep, out);
  }
}

// The scores of a block of keys, block by block in the order of their segments.
static void score_block(Segments block, const float* q, int64_t width, float scale, float* scores, Vector* most) {
  for (const Segment* of = block.data; of < block.data + block.count; ++of) {
    Segment rest = *of;
    // tiles of about the same size, none of which is too small to fill the pipelines
    for (int64_t tiles = (rest.count + kRows - 1) / kRows; tiles > 0; --tiles) {
      const int64_t count = (rest.count + tiles - 1) / tiles;
      score_rest<kRows>(count, rest, q, width, scale, scores, most);
      scores += count * kQueries;
      rest.keys += count * rest.key_stride;
      rest.bias = rest.bias ? rest.bias + count : nullptr;
      rest.count -= count;
    }
  }
}

// One block of keys and kQueries queries: the largest score and the sum of weights of each so far, and the weighted sum
// of values, sums[width, queries].
static void attend_block(Segments block, int64_t keys, const float* q, int64_t width, float scale, float* most_so_far,
                         float* total_so_far, float* sums, float* scores) {
  const Vector zero = {};
  Vector before[2], most[2], keep[2], offset[2];
  for (int j = 0; j < 2; ++j) {
    read(most_so_far + j * kLanes, before[j]);
    most[j] = before[j];
  }
  score_block(block, q, width, scale, scores, most);
  for (int j = 0; j < 2; ++j) {
    // with no score above minus infinity every weight is 0, and the quotient at the end NaN
    offset[j] = most[j] == -__builtin_inff() ? zero : most[j];
    keep[j] = exp_of(before[j] - offset[j]);
  }
  Vector sum[2] = {zero, zero};
  for (int64_t key = 0; key < keys; ++key)
    for (int j = 0; j < 2; ++j) {
      Vector p;
      read(scores + key * kQueries + j * kLanes, p);
      p = exp_of(p - offset[j]);
      sum[j] += p;
      write(scores + key * kQueries + j * kLanes, p);
    }
  for (int j = 0; j < 2; ++j) {
    Vector total;
    read(total_so_far + j * kLanes, total);
    write(total_so_far + j * kLanes, total * keep[j] + sum[j]);
    write(most_so_far + j * kLanes, most[j]);
  }
  const int64_t tiles = (width + kRows - 1) / kRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = width * tile / tiles, end = width * (tile + 1) / tiles;
    values_rest<kRows>(end - first, block, first, scores, keep, sums + first * kQueries);
  }
}

// What attend_segments() needs memory for: of `groups` times kQueries queries q, sums and out, each
// [groups, width, queries], and most and total, [groups, queries]; scores of a group and a block.
struct Scratch {
  float *q, *sums, *out, *most, *total, *scores;

  Scratch(float* memory, int64_t groups, int64_t width) {
    const int64_t queries = groups * kQueries;
    q = memory;
    sums = q + queries * width;
    out = sums + queries * width;
    most = out + queries * width;
    total = most + queries;
    scores = total + queries;
  }
};

// Softmax over all keys of the segments, and the weighted sum of their values, out[groups, width, queries], which is
// scaled by `share` and, where `add`, added to what stands there. A block of keys meets all queries while it is in the
// cache.
static void attend_segments(Segments segments, const Scratch& of, int64_t groups, int64_t width, float scale,
                            float share, bool add) {
  for (int64_t i = 0; i < groups * width * kQueries; ++i) of.sums[i] = 0.0f;
  for (int64_t i = 0; i < groups * kQueries; ++i) {
    of.most[i] = -__builtin_inff();
    of.total[i] = 0.0f;
  }

  Segment pieces[kBlockKeys];
  Segment rest = {};
  for (int64_t next = 0; next < segments.count || rest.count > 0;) {
    int64_t keys = 0;
    Segments block = {pieces, 0};
    while (keys < kBlockKeys && (next < segments.count || rest.count > 0)) {
      if (rest.count == 0) rest = segments.data[next++];
      Segment& piece = pieces[block.count++] = rest;
      if (piece.count > kBlockKeys - keys) piece.count = kBlockKeys - keys;
      rest.keys += piece.count * rest.key_stride;
      rest.values += piece.count * rest.value_stride;
      rest.bias = rest.bias ? rest.bias + piece.count : nullptr;
      rest.count -= piece.count;
      keys += piece.count;
    }
    for (int64_t g = 0; g < groups; ++g)
      attend_block(block, keys, of.q + g * width * kQueries, width, scale, of.most + g * kQueries,
                   of.total + g * kQueries, of.sums + g * width * kQueries, of.scores);
  }

  for (int64_t i = 0; i < groups * width; ++i)
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i * kQueries + j * kLanes;
      Vector sum, total, result = {};
      read(of.sums + at, sum);
      read(of.total + i / width * kQueries + j * kLanes, total);
      if (add) read(of.out + at, result);
      result += share * (sum / total);
      write(of.out + at, result);
    }
}

// to[width, queries] from the tokens of some queries; zero where there are fewer.
template <typename T>
static void gather_queries(const T* const* from, int64_t count, int64_t width, float* to) {
  int64_t c = 0;
  for (; count >= kQueries && c + kLanes <= width; c += kLanes)
    for (int j = 0; j < kQueries; j += kLanes) {
      Vector block[kLanes];
      for (int i = 0; i < kLanes; ++i) read(from[j + i] + c, block[i]);
      exchange_all<1>(block);
      for (int i = 0; i < kLanes; ++i) write(to + (c + i) * kQueries + j, block[i]);
    }
  for (; c < width; ++c)
    for (int64_t i = 0; i < kQueries; ++i) to[c * kQueries + i] = i < count ? load(from[i] + c) : 0.0f;
}

// The tokens of the results of some queries from result[width, queries].
template <typename T>
static void scatter_results(const float* result, int64_t count, int64_t width, T* const* to) {
  int64_t c = 0;
  for (; count >= kQueries && c + kLanes <= width; c += kLanes)
    for (int j = 0; j < kQueries; j += kLanes) {
      Vector block[kLanes];
      for (int i = 0; i < kLanes; ++i) read(result + (c + i) * kQueries + j, block[i]);
      exchange_all<1>(block);
      for (int i = 0; i < kLanes; ++i) {
        float lanes[kLanes];
        write(lanes, block[i]);
        for (int l = 0; l < kLanes; ++l) store(to[j + i] + c + l, lanes[l]);
      }
    }
  for (; c < width; ++c)
    for (int64_t i = 0; i < kQueries && i < count; ++i) store(to[i] + c, result[c * kQueries + i]);
}

// Attention of some queries to the keys of their window and to cells: one softmax over both, or, where `share` is
// given, one for either, mixed with that share of the first.
template <typename T>
static void attend(const Queries<T>& queries, Segments regional, Segments cells, const float* share, int64_t width,
                   float scale, float* scratch) {
  for (int64_t first = 0; first < queries.count; first += queries_at_once(width)) {
    const int64_t left = queries.count - first, count = left < queries_at_once(width) ? left : queries_at_once(width);
    const int64_t groups = (count + kQueries - 1) / kQueries;
    const Scratch of(scratch, groups, width);
    for (int64_t g = 0; g < groups; ++g)
      gather_queries(queries.from + first + g * kQueries, count - g * kQueries, width, of.q + g * width * kQueries);
    if (share && cells.count > 0) {
      attend_segments(regional, of, groups, width, scale, *share, false);
      attend_segments(cells, of, groups, width, scale, 1.0f - *share, true);
    } else {
      // the host function puts the segments of both side by side
      attend_segments({regional.data, regional.count + cells.count}, of, groups, width, scale, 1.0f, false);
    }
    for (int64_t g = 0; g < groups; ++g)
      scatter_results(of.out + g * width * kQueries, count - g * kQueries, width, queries.to + first + g * kQueries);
  }
}

// mean[width] of the tokens of a cell; row and token are strides.
template <typename T>
static void pool(const T* x, int64_t height, int64_t columns, int64_t row, int64_t token, int64_t width,
                 float* __restrict mean) {
  for (int64_t c = 0; c < width; ++c) mean[c] = 0.0f;
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const T* __restrict from = x + i * row + j * token;
      for (int64_t c = 0; c < width; ++c) mean[c] += load(from + c);
    }
  const float count = float(height * columns);
  for (int64_t c = 0; c < width; ++c) mean[c] /= count;
}

template <typename T>
static void to_float(const T* __restrict x, int64_t count, float* __restrict y) {
  for (int64_t i = 0; i < count; ++i) y[i] = load(x + i);
}

template <typename T>
static AttentionKernels<T> attention_kernels() {
  return {attend<T>, pool<T>, to_float<T>};
}
