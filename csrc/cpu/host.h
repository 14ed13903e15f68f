// What the host functions of the CPU kernels share.

#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "isa.h"

namespace fastsd {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Calls work(begin, end) for pieces of [0, count), each done by whatever thread is free first: pieces of half of what
// is a thread's share of the rest, and at least `grain`. Equal shares would make all wait for a core that something
// else keeps busy. Which thread does what must not matter for the result.
template <typename Work>
void share_out(int64_t count, int64_t grain, const Work& work) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(count, grain));
  if (threads <= 1) return work(0, count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next; begin < count;) {
      const int64_t end = std::min(count, begin + std::max(grain, (count - begin) / (2 * threads)));
      if (!next.compare_exchange_weak(begin, end)) continue;
      work(begin, end);
      begin = next;
    }
  });
}

constexpr int64_t kHugePage = 2 * 1024 * 1024;

// A hint, which may be refused: products jump over more small pages than a core remembers the places of, and a fault
// for each can take longer than what fills it. From the start of a page on.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

// Uninitialised floats on a cache line of their own, where full-width loads never straddle two.
class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t n) : size_(n) {
    const int64_t bytes = n * int64_t(sizeof(float)), unit = bytes < kHugePage ? kLine : kHugePage;
    const int64_t whole = round_up(std::max<int64_t>(bytes, 1), unit);
    floats_.reset(static_cast<float*>(std::aligned_alloc(unit, whole)));
    if (!floats_) throw std::bad_alloc();
    ask_for_huge_pages(floats_.get(), whole);
  }
  float* data() { return floats_.get(); }

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
    floats_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Free {
    void operator()(float* floats) const { std::free(floats); }
  };
  std::unique_ptr<float, Free> floats_;
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
