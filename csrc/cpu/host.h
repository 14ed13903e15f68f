// What the host functions of the CPU kernels share.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <stdexcept>

#include "isa.h"

namespace fastsd {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Uninitialised floats on a cache line of their own, where full-width loads never straddle two.
class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t n) : lines_(new Line[ceil_div(n * int64_t(sizeof(float)), sizeof(Line))]), size_(n) {}
  float* data() { return lines_[0].values; }

  // At least n floats, with whatever they hold. Memory that is kept from call to call: fresh pages cost as much as
  // the work that fills them.
  float* at_least(int64_t n) {
    if (size_ < n) {
      release_above(0);
      *this = AlignedFloats(n);
    }
    return data();
  }

  // Nothing, if it is more than n floats: one large call should not keep its memory for good.
  void release_above(int64_t n) {
    if (size_ <= n) return;
    lines_.reset();
    size_ = 0;
  }

 private:
  struct alignas(64) Line {
    float values[16];
  };
  std::unique_ptr<Line[]> lines_;
  int64_t size_ = 0;
};

// Calls function with an element of x's dtype.
template <typename Function>
void with_element(const torch::stable::Tensor& x, const Function& function) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(c10::Half{});
    case ScalarType::BFloat16:
      return function(c10::BFloat16{});
    default:
      throw std::invalid_argument("expected float16, bfloat16 or float32");
  }
}

inline Isa checked_isa(int64_t isa) {
  if (isa < 0 || isa > int64_t(best_isa())) throw std::invalid_argument("isa: this machine does not have it");
  return Isa(isa);
}

}  // namespace fastsd
