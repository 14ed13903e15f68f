// How the weights of a convolution lie in memory for each algorithm.

#pragma once

#include <cstdint>
#include <stdexcept>

#include "host.h"
#include "product.h"

namespace fastsd {

// The matrices of an algorithm. Tiles are m times m pixels of the result: for m = 1 each is one product with all
// weights that reach it, for m = 2 and 4 a product per frequency of Winograd's.
struct Form {
  int64_t m, kernel, stride;

  int64_t frequencies() const { return m == 1 ? 1 : (m + 2) * (m + 2); }
  int64_t taps() const { return m == 1 ? kernel * kernel : 1; }  // pixels side by side in a row of the matrix
  // rows or columns of the input that so many of the result are computed from
  int64_t reach(int64_t results) const { return (results - 1) * stride + kernel; }
  // of Winograd's algorithms; columns are multiplied with weights as they are
  int64_t packed_size(int64_t out_channels, int64_t channels) const {
    return frequencies() * channels * round_up(out_channels, kPanel);
  }

  void check() const {
    if (m != 1 && m != 2 && m != 4) throw std::invalid_argument("m: expected 1, 2 or 4");
    if (kernel != 3 && (kernel != 1 || m != 1)) throw std::invalid_argument("kernel: expected 3, or 1 for m = 1");
    if (stride != 1 && (stride != 2 || m != 1)) throw std::invalid_argument("stride: expected 1, or 2 for m = 1");
  }
};

}  // namespace fastsd
