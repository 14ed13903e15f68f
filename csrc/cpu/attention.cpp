// Full attention on the CPU. Formula: kernels/fastsd_kernels/attention/reference.py.
//
// A task is some queries of one head of one sample. Keys and values are read where they lie, but for many queries, and
// where they are of 16 bits: then those of each head are copied before, in parallel, and lie side by side.

#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "elements.h"
#include "host.h"
#include "isa.h"

#define FASTSD_KERNEL "attention_kernel.h"
#include "foreach_isa.h"

namespace fastsd {

template <typename T>
AttentionKernels<T> attention_kernels_for(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return avx512::attention_kernels<T>();
    case Isa::avx2:
      return avx2::attention_kernels<T>();
    default:
      return baseline::attention_kernels<T>();
  }
}

template AttentionKernels<float> attention_kernels_for(Isa);
template AttentionKernels<c10::Half> attention_kernels_for(Isa);
template AttentionKernels<c10::BFloat16> attention_kernels_for(Isa);

namespace {

using torch::stable::Tensor;

constexpr int64_t kWidenedPerTask = 64;  // tokens
constexpr int64_t kManyQueries = 1024;
constexpr int64_t kCopiedFloats = 4 * 1024 * 1024;  // that are kept between calls

template <typename T>
struct FullAttention {
  Tokens<const T> q, k, v;
  Tokens<T> out;
  const float* bias;  // [batch, keys], or null
  int64_t batch, heads, queries, keys, width;
  float scale;
  AttentionKernels<T> kernels;

  // to[batch, heads, keys, width]
  Tokens<const float> widen(const Tokens<const T>& x, float* to) const {
    share_out(batch * heads * keys, kWidenedPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t head = token / keys;
        kernels.to_float(x.at(head / heads, head % heads, token % keys), width, to + token * width);
      }
    });
    return {to, heads * keys * width, keys * width, width};
  }

  void run() const {
    if constexpr (std::is_same_v<T, float>)
      if (!is_copied()) return attend(k, v);
    const int64_t floats = batch * heads * keys * width;
    static thread_local AlignedFloats kept;
    float* wide = kept.at_least(2 * floats);
    attend(widen(k, wide), widen(v, wide + floats));
    kept.release_above(kCopiedFloats);
  }

  // Whether so many queries read keys and values that it pays to lay those of a head side by side.
  bool is_copied() const { return (k.token != width || v.token != width) && queries >= kManyQueries; }

  void attend(const Tokens<const float>& of_keys, const Tokens<const float>& of_values) const {
    const int64_t parts = ceil_div(queries, kTaskQueries);
    share_out(batch * heads * parts, 1, [&](int64_t begin, int64_t end) {
      static thread_local AlignedFloats memory;
      float* scratch = memory.at_least(scratch_floats(width));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, b = task / parts / heads, h = task / parts % heads;
        const Segment all{of_keys.at(b, h, 0), of_values.at(b, h, 0), bias ? bias + b * keys : nullptr, keys,
                          of_keys.token,       of_values.token};
        const int64_t first = part * kTaskQueries, last = std::min(queries, first + kTaskQueries);
        const T* from[kTaskQueries];
        T* to[kTaskQueries];
        for (int64_t i = first; i < last; ++i) {
          from[i - first] = q.at(b, h, i);
          to[i - first] = out.at(b, h, i);
        }
        kernels.attend({from, to, last - first}, Segments{&all, 1}, Segments{&all, 0}, nullptr, width, scale, scratch);
      }
      memory.release_above(kKeptFloats);
    });
  }
};

// q and out [batch, heads, queries, width], k and v [batch, heads, keys, width], innermost stride 1, none of them
// empty; bias [batch, keys] dense in float32. cpu_impl.py sees to it.
void attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, double scale, int64_t isa, Tensor out) {
  if (q.numel() == 0 || k.numel() == 0) throw std::invalid_argument("q, k: expected at least one token");
  with_element(q, [&](auto element) {
    using T = decltype(element);
    FullAttention<T>{
        tokens_of<const T>(q, q.const_data_ptr()),
        tokens_of<const T>(k, k.const_data_ptr()),
        tokens_of<const T>(v, v.const_data_ptr()),
        tokens_of<T>(out, out.mutable_data_ptr()),
        bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
        q.size(0),
        q.size(1),
        q.size(2),
        k.size(2),
        q.size(3),
        float(scale),
        attention_kernels_for<T>(checked_isa(isa)),
    }
        .run();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsd_cpu, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, int isa, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
}

}  // namespace fastsd
