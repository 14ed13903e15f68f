// Digests of tensors. What for: kernels/fastsd_kernels/digest.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "host.h"
#include "isa.h"

#define FASTSD_KERNEL "digest_kernel.h"
#include "foreach_isa.h"

namespace fastsd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 128 * 1024;  // bytes; large against what it costs to hand one out

// Of contiguous data: digest.py sees to it.
int64_t digest(Tensor x, int64_t isa) {
  const auto* data = static_cast<const unsigned char*>(x.const_data_ptr());
  const int64_t n = x.numel() * x.element_size(), chunks = ceil_div(n, kChunk);
  const Isa which = checked_isa(isa);
  const auto digest_of = which == Isa::avx512 ? avx512::digest_of
                         : which == Isa::avx2 ? avx2::digest_of
                                              : baseline::digest_of;
  std::vector<uint64_t> of_chunk(chunks);
  share_out(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) of_chunk[i] = digest_of(data + i * kChunk, std::min(kChunk, n - i * kChunk));
  });
  uint64_t all = uint64_t(n);
  for (uint64_t chunk : of_chunk) all = baseline::mix(all, chunk);
  return int64_t(all);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsd_cpu, m) {
  m.def("digest(Tensor x, int isa) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, m) {
  m.impl("digest", TORCH_BOX(&digest));
}

}  // namespace fastsd
