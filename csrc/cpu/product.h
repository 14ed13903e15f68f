// What products of matrices are cut into.

#pragma once

#include <cstdint>

namespace fastsd {

// Columns of weights that lie side by side: whole vectors of every instruction set.
constexpr int64_t kPanel = 32;

// So many elements of a row lie side by side, at least.
constexpr int64_t kDepthBlock = 64;

// So much of a panel's depth is multiplied with at a time: what stays in a core's own cache.
constexpr int64_t kPanelDepth = 40 * kDepthBlock;

// So much of it is summed up by itself: errors of rounding grow with the length of a sum.
constexpr int64_t kSummedDepth = 6 * kDepthBlock;

// A matrix of rows that are multiplied: blocks of the depth, one behind the other within a row, or each with all rows.
struct Matrix {
  const float* data;
  int64_t per_row, per_block;

  static Matrix of_rows(const float* data, int64_t per_row) { return {data, per_row, kDepthBlock}; }
  const float* at(int64_t row, int64_t block) const { return data + row * per_row + block * per_block; }
};

// Some rows of memory, so many bytes of each.
struct Lines {
  const void* row;
  int64_t rows, bytes, row_bytes;  // left, wanted of each, from one to the next
};

// What will be wanted next, brought from memory line by line while something else is multiplied.
struct Ahead {
  Lines lines[3] = {};            // one after the other
  const float* matrix = nullptr;  // to be multiplied next, with strides as this one has
  int64_t done = 0;               // bytes of this row
  int now = 0;

  void fetch_line() {
    Lines& of = lines[now];
    if (of.rows == 0) {
      now += now < 2;
      return;
    }
    const char* line = static_cast<const char*>(of.row) + done;
    __builtin_prefetch(line, 0, 2);
    done += 64;
    if (done < of.bytes) return;
    of.row = static_cast<const char*>(of.row) + of.row_bytes;
    done = 0;
    --of.rows;
  }
};

}  // namespace fastsd
