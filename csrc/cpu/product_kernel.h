// Products of matrices for the vectorised kernels, which include this file and vector_kernel.h inside their namespace.

// sum[R] += the k-th column of a times the k-th row of two vectors of b.
template <int R>
static inline __attribute__((always_inline)) void multiply_column(const float* a, int64_t per_row, const float* b,
                                                                  int64_t k, Vector (&sum)[R][2]) {
  Vector left, right;
  read(b + k * kPanel, left);
  read(b + k * kPanel + kLanes, right);
  for (int r = 0; r < R; ++r) {
    const float value = a[r * per_row + k];
    sum[r][0] += value * left;
    sum[r][1] += value * right;
  }
}

// out[R, kPanel] = a[R, depth] b[depth, kPanel], or += it; the sums of two vectors' columns stay in registers, those of
// each part of the depth by themselves. The next block of the rows is fetched meanwhile, and behind the last `next`.
template <int R>
static void multiply_rows(Matrix a, int64_t depth, const float* b, float* out, int64_t out_row, bool add,
                          const float* next, Ahead& ahead) {
  constexpr int64_t line = 64 / sizeof(float);
  const int64_t blocks = (depth + kDepthBlock - 1) / kDepthBlock;
  const int64_t parts = (depth + kSummedDepth - 1) / kSummedDepth;
  for (int s = 0; s < kPanel; s += 2 * kLanes)
    for (int64_t part = 0; part < parts; ++part) {
      Vector sum[R][2] = {};
      for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
        const float *rows = a.at(0, block), *following = block + 1 < blocks ? a.at(0, block + 1) : next;
        const float* columns = b + block * kDepthBlock * kPanel + s;
        const int64_t left = depth - block * kDepthBlock, last = left < kDepthBlock ? left : kDepthBlock;
        int64_t k = 0;
        for (; k + line <= last; k += line) {
          if (s == 0)
            for (int r = 0; r < R; ++r) __builtin_prefetch(following + r * a.per_row + k);
          for (int64_t i = k; i < k + line; i += 2) {
            multiply_column<R>(rows, a.per_row, columns, i, sum);
            multiply_column<R>(rows, a.per_row, columns, i + 1, sum);
            ahead.fetch_line();
          }
        }
        for (; k < last; ++k) multiply_column<R>(rows, a.per_row, columns, k, sum);
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) {
          float* to = out + r * out_row + s + v * kLanes;
          Vector before = {};
          if (add || part > 0) read(to, before);
          write(to, before + sum[r][v]);
        }
    }
}

// As many rows at a time as the registers hold; the rows are spread evenly, so that none is left for a slow last step.
// `after`: what will be multiplied next.
static void multiply_block(Matrix a, int64_t rows, int64_t depth, const float* b, float* out, int64_t out_row, bool add,
                           const float* after, Ahead& ahead) {
  constexpr int most = FASTSD_VECTORS == 32 ? 12 : 6;
  const int64_t steps = (rows + most - 1) / most;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t first = step * rows / steps, n = (step + 1) * rows / steps - first;
    const Matrix from{a.at(first, 0), a.per_row, a.per_block};
    const float* next = step + 1 < steps ? a.at(first + n, 0) : after;
    float* to = out + first * out_row;
    switch (n) {
#define FASTSD_ROWS(R)                                               \
  case R:                                                            \
    multiply_rows<R>(from, depth, b, to, out_row, add, next, ahead); \
    break;
      FASTSD_ROWS(1)
      FASTSD_ROWS(2)
      FASTSD_ROWS(3)
      FASTSD_ROWS(4)
      FASTSD_ROWS(5)
      FASTSD_ROWS(6)
#if FASTSD_VECTORS == 32
      FASTSD_ROWS(7)
      FASTSD_ROWS(8)
      FASTSD_ROWS(9)
      FASTSD_ROWS(10)
      FASTSD_ROWS(11)
      FASTSD_ROWS(12)
#endif
#undef FASTSD_ROWS
    }
  }
}

// out[rows, kPanel] = a[rows, depth] b[depth, kPanel], or += it, so much of the depth at a time that b's part stays in
// the cache.
static void multiply(Matrix a, int64_t rows, int64_t depth, const float* b, float* out, int64_t out_row, bool add,
                     Ahead& ahead) {
  const int64_t blocks = (depth + kDepthBlock - 1) / kDepthBlock, steps = (depth + kPanelDepth - 1) / kPanelDepth;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t first = step * blocks / steps, end = (step + 1) * blocks / steps;
    const int64_t n = step + 1 < steps ? (end - first) * kDepthBlock : depth - first * kDepthBlock;
    const Matrix part{a.at(0, first), a.per_row, a.per_block};
    const float* after = step + 1 < steps ? a.at(0, end) : ahead.matrix ? ahead.matrix : a.data;
    multiply_block(part, rows, n, b + first * kDepthBlock * kPanel, out, out_row, add || step > 0, after, ahead);
  }
}

// to[depth, kPanel] from as many rows [depth] of weights; the columns past the last are zero.
template <typename T>
static void pack_panel(const T* rows, int64_t count, int64_t per_row, int64_t depth, float* to) {
  int64_t d = 0;
  for (; count == kPanel && d + kLanes <= depth; d += kLanes)
    for (int64_t k = 0; k < kPanel; k += kLanes) {
      Vector block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        float row[kLanes];
        for (int j = 0; j < kLanes; ++j) row[j] = load(rows + (k + i) * per_row + d + j);
        read(row, block[i]);
      }
      exchange_all<1>(block);
      for (int i = 0; i < kLanes; ++i) write(to + (d + i) * kPanel + k, block[i]);
    }
  for (; d < depth; ++d)
    for (int64_t k = 0; k < kPanel; ++k) to[d * kPanel + k] = k < count ? load(rows + k * per_row + d) : 0.0f;
}
