// The vectorised loops of linear, compiled once per instruction set by foreach_isa.h.

#include "vector_kernel.h"

#include "gelu_kernel.h"
#include "product_kernel.h"

template <typename T>
static void widen(const T* x, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; ++k) to[k] = load(x + k);
}

// The sum of term(k) over all k, term(k, V) being one of as many elements as V holds.
template <typename Term>
static inline __attribute__((always_inline)) float sum_of(int64_t depth, const Term& term) {
  constexpr int independent = 4;  // sums, so that none waits for the one before
  Vector sums[independent] = {};
  int64_t k = 0;
  for (; k + independent * kLanes <= depth; k += independent * kLanes)
    for (int i = 0; i < independent; ++i) sums[i] += term(k + i * kLanes, Vector{});
  for (; k + kLanes <= depth; k += kLanes) sums[0] += term(k, Vector{});
  const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += all[i];
  for (; k < depth; ++k) sum += term(k, 0.0f);
  return sum;
}

// A row, normalised. What the mean lacks in its last bits shows in the mean of the differences from it.
template <typename T>
static void normalise(const T* x, int64_t depth, const RowNorm& norm, float* to) {
  const float mean = sum_of(depth,
                            [&](int64_t k, auto value) __attribute__((always_inline)) {
                              read(x + k, value);
                              return value;
                            }) /
                     float(depth);
  const float residue = sum_of(depth,
                               [&](int64_t k, auto value) __attribute__((always_inline)) {
                                 read(x + k, value);
                                 value -= mean;
                                 write(to + k, value);
                                 return value;
                               }) /
                        float(depth);
  const float squares = sum_of(depth, [&](int64_t k, auto value) __attribute__((always_inline)) {
    read(to + k, value);
    value -= residue;
    return value * value;
  });
  const float scale = 1.0f / __builtin_sqrtf(squares / float(depth) + norm.eps);
  for (int64_t k = 0; k < depth; ++k) {
    const float u = (to[k] - residue) * scale;
    to[k] = u * (norm.weight ? norm.weight[k] : 1.0f) + (norm.bias ? norm.bias[k] : 0.0f);
  }
}

template <Follows follows>
using GeluOf = std::conditional_t<follows == Follows::quick_gelu, QuickGelu, Gelu>;

// One row's features: act(sums + bias) + residual. Of geglu the sums are a panel of values, then one of gates, and so
// is the bias.
template <Follows follows, int N, typename T>
static inline __attribute__((always_inline)) void finish_features(const float* __restrict sums,
                                                                  const float* __restrict bias,
                                                                  const float* __restrict gates,
                                                                  const T* __restrict residual, T* __restrict out,
                                                                  const GeluOf<follows>& gelu) {
  float y[N];
  for (int i = 0; i < N; ++i) {
    y[i] = sums[i] + bias[i];
    if (follows == Follows::gelu || follows == Follows::quick_gelu) y[i] = gelu(y[i]);
    if (follows == Follows::geglu) y[i] *= gelu(gates[i] + bias[kPanel + i]);
  }
  if (residual)
    for (int i = 0; i < N; ++i) y[i] += load(residual + i);
  for (int i = 0; i < N; ++i) store(out + i, y[i]);
}

// The features of a panel. sums: [rows, kPanel], of geglu [2, rows, kPanel]; bias: [kPanel], or twice that.
template <Follows follows, typename T>
static void finish(const float* sums, const float* bias, int64_t rows, int64_t features, const Rows<T>& to) {
  const GeluOf<follows> gelu;
  for (int64_t row = 0; row < rows; ++row) {
    const float *from = sums + row * kPanel, *gates = from + rows * kPanel;
    T* out = to.out + row * to.out_row;
    const T* residual = to.residual ? to.residual + row * to.residual_row : nullptr;
    int64_t i = 0;
    for (; i + kLanes <= features; i += kLanes)
      finish_features<follows, kLanes>(from + i, bias + i, gates + i, residual ? residual + i : nullptr, out + i, gelu);
    for (; i < features; ++i)
      finish_features<follows, 1>(from + i, bias + i, gates + i, residual ? residual + i : nullptr, out + i, gelu);
  }
}

template <typename T>
static LinearKernels<T> linear_kernels(Follows follows) {
  return {widen<T>, normalise<T>, pack_panel<T>, multiply,
          follows == Follows::geglu        ? finish<Follows::geglu, T>
          : follows == Follows::quick_gelu ? finish<Follows::quick_gelu, T>
          : follows == Follows::gelu       ? finish<Follows::gelu, T>
                                           : finish<Follows::nothing, T>};
}
