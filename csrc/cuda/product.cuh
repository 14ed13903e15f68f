// What products of matrices that go through shared memory share: STEP elements of each row at a time.
//
// Defined by the host: DTYPE, __half or __nv_bfloat16; STEP, 16, 32 or 64.
#pragma once

#include "device.cuh"

namespace fastsd {

// each variant has its own: nothing here may be linked with that of another
namespace {

using T = DTYPE;

constexpr int kColumn = 8;  // elements that lie together in shared memory, 16 bytes
constexpr int kColumns = STEP / kColumn;

static_assert(STEP == 16 || STEP == 32 || STEP == 64, "the columns of a row are permuted by their bits");

// Where in shared memory 8 elements of a row of STEP start. Columns are permuted from row to row, so that 8 rows in
// succession have the same column in 8 different groups of banks.
__device__ inline int element(int row, int column) {
  return (row * kColumns + (column ^ row / (8 / kColumns) % kColumns)) * kColumn;
}

// As load() and store(), of any power of two, in accesses of up to 16 bytes.
template <int kCount, class Element>
__device__ inline void load_pieces(const Element* from, float* to) {
  constexpr int kWidest = 16 / static_cast<int>(sizeof(Element)), kPiece = kCount < kWidest ? kCount : kWidest;
#pragma unroll
  for (int first = 0; first < kCount; first += kPiece) {
    float piece[kPiece];
    load(from + first, piece);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) to[first + i] = piece[i];
  }
}
template <int kCount, class Element>
__device__ inline void store_pieces(Element* to, const float* from) {
  constexpr int kWidest = 16 / static_cast<int>(sizeof(Element)), kPiece = kCount < kWidest ? kCount : kWidest;
#pragma unroll
  for (int first = 0; first < kCount; first += kPiece) {
    float piece[kPiece];
#pragma unroll
    for (int i = 0; i < kPiece; ++i) piece[i] = from[first + i];
    store(to + first, piece);
  }
}

// sum += u · wᵀ over one step, for 16 · kRows rows of u and 8 · kFragments rows of w. A lane gives the rows of shared
// memory that it addresses: row_of_u of each 16, row_of_w of the first 16.
template <int kRows, int kFragments>
__device__ inline void multiply_step(const T* u, const int (&row_of_u)[kRows], const T* w, int row_of_w,
                                     float (&sum)[kRows][kFragments][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int column = 0; column < kColumns; column += 2) {
    u32 a[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) ldmatrix_x4(a[i], u + element(row_of_u[i], column + lane / 16));
#pragma unroll
    for (int j = 0; j < kFragments / 2; ++j) {
      u32 b[4];
      ldmatrix_x4(b, w + element(row_of_w + j * 16, column + lane / 8 % 2));
      const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        mma_m16n8k16<T>(sum[i][2 * j], a[i], low);
        mma_m16n8k16<T>(sum[i][2 * j + 1], a[i], high);
      }
    }
  }
}

// Writes 16 rows of sums as rows of kPitch floats; the whole warp takes part.
template <int kPitch, int kFragments>
__device__ inline void store_rows(float* rows, const float (&sum)[kFragments][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
    float* to = rows + lane / 4 * kPitch + j * 8 + lane % 4 * 2;
    store_pieces<2>(to, sum[j]);
    store_pieces<2>(to + 8 * kPitch, sum[j] + 2);
  }
}

}  // namespace

}  // namespace fastsd
