// Linear layers on the CPU. Formula: kernels/fastsd_kernels/linear/reference.py.
//
// Weights are packed into panels of features anew at each call. Many rows are cut into tasks, each of which normalises
// its rows in its core's own cache and multiplies them with every panel. With few rows reading and packing the weights
// takes longer than that: all rows are normalised first, and a task packs a panel and multiplies all rows with it.
// Every sum is one thread's and in one order, however the work is cut: any number of threads gives the same bits.

#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "elements.h"
#include "host.h"
#include "isa.h"

#define FASTSD_KERNEL "linear_kernel.h"
#include "foreach_isa.h"

namespace fastsd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kFewRows = 512;
constexpr int64_t kTaskBytes = 768 * 1024;          // of a task's rows: what stays in a core's own cache
constexpr int64_t kMostTaskRows = 132;              // whole steps of AVX-512
constexpr int64_t kFewestTaskRows = 48;             // enough to fetch the next panel while they are multiplied
constexpr int64_t kPackedBytes = 12 * 1024 * 1024;  // of weights that are packed at once
constexpr int64_t kTasksPerThread = 4;

template <typename T>
LinearKernels<T> linear_kernels_for(Isa isa, Follows follows) {
  switch (isa) {
    case Isa::avx512:
      return avx512::linear_kernels<T>(follows);
    case Isa::avx2:
      return avx2::linear_kernels<T>(follows);
    default:
      return baseline::linear_kernels<T>(follows);
  }
}

template <typename T>
struct Linear {
  const T* x;
  int64_t x_row, rows, depth;
  const T* weight;  // [features, depth], of geglu the gates' rows behind these
  int64_t weight_row, features;
  bool geglu;
  const float* bias;  // as many as weight has rows, or null
  bool is_normed;
  RowNorm norm;
  Rows<T> to;
  LinearKernels<T> kernels;

  // Of geglu a panel of gates belongs to each of values.
  int64_t parts() const { return geglu ? 2 : 1; }
  int64_t panels() const { return ceil_div(features, kPanel); }
  int64_t panel_floats() const { return parts() * depth * kPanel; }
  // What is multiplied is x itself where nothing has to be made of it.
  bool is_read_in_place() const { return std::is_same_v<T, float> && !is_normed; }

  void run() const {
    if (rows < kFewRows)
      run_panels();
    else
      run_rows();
  }

  void run_panels() const {
    static thread_local AlignedFloats kept;
    float* biases = kept.at_least((is_read_in_place() ? 0 : rows * depth) + bias_floats());
    fill_biases(biases);
    float* wide = biases + bias_floats();
    if (!is_read_in_place())
      share_out(rows, 8, [&](int64_t begin, int64_t end) { prepare(begin, end - begin, wide + begin * depth); });
    share_out(panels(), 1, [&](int64_t begin, int64_t end) {
      static thread_local AlignedFloats scratch;
      float* panel = scratch.at_least(panel_floats() + parts() * rows * kPanel);
      for (int64_t p = begin; p < end; ++p) {
        pack(p, panel);
        multiply(p, 0, rows, inputs(0, wide), panel, panel + panel_floats(), biases, [&](int64_t part) {
          if (p + 1 == end) return Lines{};
          const int64_t row_bytes = weight_row * int64_t(sizeof(T));
          return Lines{weight_rows(p + 1, part), of_panel(p + 1), depth * int64_t(sizeof(T)), row_bytes};
        });
      }
      scratch.release_above(kPackedBytes / int64_t(sizeof(float)));
    });
    kept.release_above(kPackedBytes / int64_t(sizeof(float)));
  }

  void run_rows() const {
    const int64_t most = std::max<int64_t>(1, kPackedBytes / (panel_floats() * int64_t(sizeof(float))));
    const int64_t at_once = ceil_div(panels(), ceil_div(panels(), most));
    static thread_local AlignedFloats kept;
    float* biases = kept.at_least(at_once * panel_floats() + bias_floats());
    fill_biases(biases);
    float* packed = biases + bias_floats();
    const int64_t per_task = task_rows();
    for (int64_t first = 0; first < panels(); first += at_once) {
      const int64_t last = std::min(panels(), first + at_once);
      share_out(last - first, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) pack(first + p, packed + p * panel_floats());
      });
      share_out(ceil_div(rows, per_task), 1, [&](int64_t begin, int64_t end) {
        static thread_local AlignedFloats scratch;
        float* wide = scratch.at_least(per_task * ((is_read_in_place() ? 0 : depth) + parts() * kPanel));
        float* sums = wide + (is_read_in_place() ? 0 : per_task * depth);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task * per_task, count = std::min(per_task, rows - row);
          if (!is_read_in_place()) prepare(row, count, wide);
          for (int64_t p = first; p < last; ++p)
            multiply(p, row, count, inputs(row, wide), packed + (p - first) * panel_floats(), sums, biases,
                     [&](int64_t part) {
                       const float* next = packed + (p + 1 == last ? 0 : p + 1 - first) * panel_floats();
                       return Lines{next + part * depth * kPanel, 1, depth * kPanel * int64_t(sizeof(float)), 0};
                     });
        }
        scratch.release_above(kPackedBytes / int64_t(sizeof(float)));
      });
    }
    kept.release_above(2 * kPackedBytes / int64_t(sizeof(float)));
  }

  // About as many tasks for each thread, of about as many rows.
  int64_t task_rows() const {
    const int64_t cached = kTaskBytes / (depth * int64_t(sizeof(float)));
    const int64_t most = std::clamp(cached, kFewestTaskRows, kMostTaskRows), threads = torch::stable::get_num_threads();
    const int64_t tasks = round_up(std::max(ceil_div(rows, most), kTasksPerThread * threads), threads);
    return std::max(kFewestTaskRows, ceil_div(rows, tasks));
  }

  // The rows from `row` on: of x, or what prepare() has put at `wide`.
  Matrix inputs(int64_t row, const float* wide) const {
    if constexpr (std::is_same_v<T, float>)
      if (!is_normed) return Matrix::of_rows(x + row * x_row, x_row);
    return Matrix::of_rows(wide, depth);
  }

  // to[count, depth]: rows in float, normalised where there is a norm.
  void prepare(int64_t row, int64_t count, float* wide) const {
    for (int64_t i = 0; i < count; ++i) {
      const T* from = x + (row + i) * x_row;
      if (is_normed)
        kernels.normalise(from, depth, norm, wide + i * depth);
      else
        kernels.widen(from, depth, wide + i * depth);
    }
  }

  int64_t of_panel(int64_t p) const { return std::min(kPanel, features - p * kPanel); }

  void pack(int64_t p, float* panel) const {
    for (int64_t part = 0; part < parts(); ++part)
      kernels.pack_panel(weight_rows(p, part), of_panel(p), weight_row, depth, panel + part * depth * kPanel);
  }

  const T* weight_rows(int64_t p, int64_t part) const { return weight + (part * features + p * kPanel) * weight_row; }

  // sums: [parts, count, kPanel]; ahead(part): what is fetched meanwhile.
  template <typename Next>
  void multiply(int64_t p, int64_t row, int64_t count, const Matrix& from, const float* panel, float* sums,
                const float* biases, const Next& ahead) const {
    Rows<T> here = to;
    here.out += row * to.out_row + p * kPanel;
    if (to.residual) here.residual += row * to.residual_row + p * kPanel;
    constexpr int64_t size = sizeof(T);
    for (int64_t part = 0; part < parts(); ++part) {
      Ahead next;
      if (part == 0) {
        next.lines[0] = {here.out, count, of_panel(p) * size, to.out_row * size};
        if (to.residual) next.lines[1] = {here.residual, count, of_panel(p) * size, to.residual_row * size};
      }
      next.lines[2] = ahead(part);
      kernels.multiply(from, count, depth, panel + part * depth * kPanel, sums + part * count * kPanel, kPanel, false,
                       next);
    }
    kernels.finish(sums, biases + p * parts() * kPanel, count, of_panel(p), here);
  }

  int64_t bias_floats() const { return panels() * parts() * kPanel; }

  // Panel by panel those of the values, then those of the gates; whole panels, zero where there is none.
  void fill_biases(float* biases) const {
    std::fill_n(biases, bias_floats(), 0.0f);
    if (!bias) return;
    for (int64_t p = 0; p < panels(); ++p)
      for (int64_t part = 0; part < parts(); ++part)
        std::copy_n(bias + part * features + p * kPanel, of_panel(p), biases + (p * parts() + part) * kPanel);
  }
};

Follows follows_named(const std::string& activation) {
  if (activation == "none") return Follows::nothing;
  if (activation == "gelu") return Follows::gelu;
  if (activation == "quick_gelu") return Follows::quick_gelu;
  if (activation == "geglu") return Follows::geglu;
  throw std::invalid_argument("activation: expected one of those that linear has; got '" + activation + "'");
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// x [rows, depth], weight, residual and out [rows, features] of one dtype, the elements of a row side by side;
// parameters in float32, contiguous; out not empty: cpu_impl.py sees to it.
void linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight,
            std::optional<Tensor> norm_bias, std::optional<double> norm_eps, std::string activation,
            std::optional<Tensor> residual, int64_t isa, Tensor out) {
  const Follows follows = follows_named(activation);
  const bool geglu = follows == Follows::geglu;
  const int64_t rows = x.size(0), depth = x.size(1), features = out.size(1);
  if (weight.size(0) != (geglu ? 2 : 1) * features || weight.size(1) != depth || out.numel() == 0)
    throw std::invalid_argument("weight: expected [out, in], of geglu twice as many rows as the result has features");
  if (out.size(0) != rows || (residual && (residual->size(0) != rows || residual->size(1) != features)))
    throw std::invalid_argument("out, residual: expected a row for each of x");
  with_element(x, [&](auto element) {
    using T = decltype(element);
    Linear<T>{
        static_cast<const T*>(x.const_data_ptr()),
        x.stride(0),
        rows,
        depth,
        static_cast<const T*>(weight.const_data_ptr()),
        weight.stride(0),
        features,
        geglu,
        data_or_null(bias),
        norm_eps.has_value(),
        {data_or_null(norm_weight), data_or_null(norm_bias), float(norm_eps.value_or(0.0))},
        {static_cast<T*>(out.mutable_data_ptr()), out.stride(0),
         residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr, residual ? residual->stride(0) : 0},
        linear_kernels_for<T>(checked_isa(isa), follows)}
        .run();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsd_cpu, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, "
      "str activation, Tensor? residual, int isa, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace fastsd
