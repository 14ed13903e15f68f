// Copies of a convolution's weights, packed or transformed as conv2d.cpp reads them, and digests of the originals, by
// which packed_weights.py knows whether a copy is out of date.

#include "packed_weights.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "elements.h"
#include "isa.h"

#define FASTSD_KERNEL "packed_weights_kernel.h"
#include "foreach_isa.h"

namespace fastsd {
namespace {

using torch::stable::Tensor;

// G of Lavin and Gray, 2015: a tile's N frequencies from the R weights of a side of the kernel.
template <int N, int R>
struct WeightMatrix {
  double g[N][R];
};
constexpr WeightMatrix<4, 3> kMatrix2{{{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}}};
constexpr WeightMatrix<6, 3> kMatrix4{{{1. / 4, 0, 0},
                                       {-1. / 6, -1. / 6, -1. / 6},
                                       {-1. / 6, 1. / 6, -1. / 6},
                                       {1. / 24, 1. / 12, 1. / 6},
                                       {1. / 24, -1. / 12, 1. / 6},
                                       {0, 0, 1}}};

// U = G w G^T of weight [out, in, R, R], as packed[frequency][panel][in][kPanel]; the columns past the last are zero.
template <int N, int R, typename T>
void pack(const WeightMatrix<N, R>& matrix, const Tensor& weight, float* packed) {
  const T* data = static_cast<const T*>(weight.const_data_ptr());
  const int64_t out_channels = weight.size(0), channels = weight.size(1), panels = ceil_div(out_channels, kPanel);
  const int64_t per_out = weight.stride(0), per_in = weight.stride(1), per_row = weight.stride(2),
                per_column = weight.stride(3);
  const auto& g = matrix.g;
  share_out(panels * channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / channels, c = task % channels, here = std::min(kPanel, out_channels - p * kPanel);
      double w[R][R][kPanel] = {}, half[N][R][kPanel];
      for (int64_t k = 0; k < here; ++k)
        for (int i = 0; i < R; ++i)
          for (int j = 0; j < R; ++j)
            w[i][j][k] = load(data + (p * kPanel + k) * per_out + c * per_in + i * per_row + j * per_column);
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < R; ++j)
          for (int64_t k = 0; k < kPanel; ++k) {
            half[i][j][k] = 0;
            for (int e = 0; e < R; ++e) half[i][j][k] += g[i][e] * w[e][j][k];
          }
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) {
          float* to = packed + (((i * N + j) * panels + p) * channels + c) * kPanel;
          for (int64_t k = 0; k < kPanel; ++k) {
            double u = 0;
            for (int e = 0; e < R; ++e) u += g[j][e] * half[i][e][k];
            to[k] = float(u);
          }
        }
    }
  });
}

void pack_conv2d(Tensor weight, int64_t m, Tensor out) {
  const Form form{m, weight.size(2), 1};
  form.check();
  if (m == 1) throw std::invalid_argument("m: expected 2 or 4");
  if (weight.size(3) != form.kernel) throw std::invalid_argument("weight: expected a square kernel");
  if (out.numel() != form.packed_size(weight.size(0), weight.size(1)))
    throw std::invalid_argument("out: expected [frequencies, panels, depth, panel]");
  float* packed = static_cast<float*>(out.mutable_data_ptr());
  with_element(weight, [&](auto element) {
    using T = decltype(element);
    if (m == 2) pack<4, 3, T>(kMatrix2, weight, packed);
    if (m == 4) pack<6, 3, T>(kMatrix4, weight, packed);
  });
}

// A digest of the data, any memory format, without gaps: packed_weights.py sees to it.
int64_t digest(Tensor weight, int64_t isa) {
  constexpr int64_t chunk = 256 * 1024;
  const auto* data = static_cast<const unsigned char*>(weight.const_data_ptr());
  const int64_t n = weight.numel() * weight.element_size(), chunks = ceil_div(n, chunk);
  std::vector<uint64_t> of_chunk(chunks);
  const Isa which = checked_isa(isa);
  const auto digest_of = which == Isa::avx512 ? avx512::digest_of
                         : which == Isa::avx2 ? avx2::digest_of
                                              : baseline::digest_of;
  share_out(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) of_chunk[k] = digest_of(data + k * chunk, std::min(chunk, n - k * chunk));
  });
  uint64_t all = uint64_t(n);
  for (uint64_t part : of_chunk) {
    all = (all ^ part) * 0xbf58476d1ce4e5b9;
    all ^= all >> 29;
  }
  return int64_t(all);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsd_cpu, m) {
  m.def("pack_conv2d(Tensor weight, int m, Tensor(a!) out) -> ()");
  m.def("digest(Tensor weight, int isa) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, m) {
  m.impl("pack_conv2d", TORCH_BOX(&pack_conv2d));
  m.impl("digest", TORCH_BOX(&digest));
}

}  // namespace fastsd
