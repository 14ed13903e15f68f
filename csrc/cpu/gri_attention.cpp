// Global-regional interactive attention on the CPU. Formula: kernels/fastsd_kernels/gri_attention/reference.py.
//
// The keys and values of the cells are pooled first, in parallel. Then a task is some queries of one window, of one
// head: their keys are rows of the window, read where they lie (16-bit ones are widened first), and runs of cells.

#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "elements.h"
#include "host.h"
#include "isa.h"

namespace fastsd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kPooledPerTask = 16 * 1024;  // values that make a task of pooling

struct Size {
  int64_t height, width;
};

// Cells that all queries of a window leave out: their rows, [top, bottom), and columns, [left, right).
struct Inside {
  int64_t top, bottom, left, right;
};

// The cells of one axis that lie inside [start, stop).
void cells_inside(int64_t length, int64_t step, int64_t start, int64_t stop, int64_t* first, int64_t* last) {
  *first = ceil_div(start, step);
  *last = stop == length ? ceil_div(length, step) : stop / step;
  *last = std::max(*first, *last);
}

template <typename T>
struct Attention {
  Tokens<const T> q, k, v;
  Tokens<T> out;
  int64_t batch, heads, width;
  Size grid, window, pool;  // a height of 0: no windows, no cells
  bool mask_own_window;
  const float* share;    // [heads], or null
  const float* v_cells;  // [batch, heads, cells, width], or null for the means of v
  float scale;
  AttentionKernels<T> kernels;

  Size cells() const {
    return pool.height ? Size{ceil_div(grid.height, pool.height), ceil_div(grid.width, pool.width)} : Size{0, 0};
  }

  // means[batch, heads, cells, width]
  void pool_tokens(const Tokens<const T>& x, float* means) const {
    const auto [rows, columns] = cells();
    const int64_t per_row = grid.width * pool.height * width;
    share_out(batch * heads * rows, ceil_div(kPooledPerTask, per_row),
              [&, columns = columns, rows = rows](int64_t begin, int64_t end) {
                for (int64_t task = begin; task < end; ++task) {
                  const int64_t head = task / rows, top = task % rows * pool.height;
                  const int64_t height = std::min(pool.height, grid.height - top);
                  for (int64_t column = 0; column < columns; ++column) {
                    const int64_t left = column * pool.width;
                    kernels.pool(x.at(head / heads, head % heads, top * grid.width + left), height,
                                 std::min(pool.width, grid.width - left), grid.width * x.token, x.token, width,
                                 means + (task * columns + column) * width);
                  }
                }
              });
  }

  // ln of how many tokens each cell has
  std::vector<float> biases() const {
    const auto [rows, columns] = cells();
    std::vector<float> bias(rows * columns);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t height = std::min(pool.height, grid.height - i * pool.height);
        bias[i * columns + j] = float(std::log(double(height * std::min(pool.width, grid.width - j * pool.width))));
      }
    return bias;
  }

  // Runs of cells but for those inside, behind what is in `segments`.
  void add_cells(const float* keys, const float* values, const float* bias, Inside inside,
                 std::vector<Segment>* segments) const {
    const auto [rows, columns] = cells();
    int64_t start = 0;
    for (int64_t i = inside.top; i < inside.bottom && inside.left < inside.right; ++i) {
      add_run(keys, values, bias, start, i * columns + inside.left, segments);
      start = i * columns + inside.right;
    }
    add_run(keys, values, bias, start, rows * columns, segments);
  }

  void add_run(const float* keys, const float* values, const float* bias, int64_t start, int64_t stop,
               std::vector<Segment>* segments) const {
    if (start < stop)
      segments->push_back({keys + start * width, values + start * width, bias + start, stop - start, width, width});
  }

  // The rows of a window, as segments; `widened` is room for its keys and values where these are no floats.
  void add_window(int64_t b, int64_t h, int64_t top, int64_t left, Size size, float* widened,
                  std::vector<Segment>* segments) const {
    for (int64_t i = 0; i < size.height; ++i) {
      const int64_t first = (top + i) * grid.width + left;
      if constexpr (std::is_same_v<T, float>) {
        segments->push_back({k.at(b, h, first), v.at(b, h, first), nullptr, size.width, k.token, v.token});
      } else {
        float* values = widened + size.width * width;
        for (int64_t j = 0; j < size.width; ++j) {
          kernels.to_float(k.at(b, h, first + j), width, widened + j * width);
          kernels.to_float(v.at(b, h, first + j), width, values + j * width);
        }
        segments->push_back({widened, values, nullptr, size.width, width, width});
        widened = values + size.width * width;
      }
    }
  }

  void run() const {
    const auto [cell_rows, cell_columns] = cells();
    const int64_t cell_floats = cell_rows * cell_columns * width;
    AlignedFloats pooled(2 * batch * heads * cell_floats);
    float *pooled_keys = pooled.data(), *pooled_values = pooled_keys + batch * heads * cell_floats;
    if (cell_floats) {
      pool_tokens(k, pooled_keys);
      if (!v_cells) pool_tokens(v, pooled_values);
    }
    const float* all_values = v_cells ? v_cells : pooled_values;
    const std::vector<float> bias = biases();

    // without windows queries are cut as if the map were one
    const Size cut = window.height ? window : grid;
    const int64_t columns = ceil_div(grid.width, cut.width), windows = ceil_div(grid.height, cut.height) * columns;
    const int64_t parts = ceil_div(cut.height * cut.width, kTaskQueries);
    share_out(batch * heads * windows * parts, 1, [&, cell_floats = cell_floats](int64_t begin, int64_t end) {
      static thread_local AlignedFloats memory;
      const bool widens = !std::is_same_v<T, float> && window.height;
      float* scratch = memory.at_least(scratch_floats(width) + (widens ? 2 * cut.height * cut.width * width : 0));
      std::vector<Segment> segments;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, place = task / parts % windows, head = task / parts / windows;
        const int64_t b = head / heads, h = head % heads;
        const int64_t top = place / columns * cut.height, left = place % columns * cut.width;
        const Size size{std::min(cut.height, grid.height - top), std::min(cut.width, grid.width - left)};
        const int64_t count = size.height * size.width;
        if (part * kTaskQueries >= count) continue;

        segments.clear();
        if (window.height) add_window(b, h, top, left, size, scratch + scratch_floats(width), &segments);
        const int64_t regional = int64_t(segments.size());
        if (cell_floats) {
          Inside inside{0, 0, 0, 0};
          if (mask_own_window) {
            cells_inside(grid.height, pool.height, top, top + size.height, &inside.top, &inside.bottom);
            cells_inside(grid.width, pool.width, left, left + size.width, &inside.left, &inside.right);
          }
          add_cells(pooled_keys + head * cell_floats, all_values + head * cell_floats, bias.data(), inside, &segments);
        }
        const Segments own{segments.data(), regional};
        const Segments of_cells{segments.data() + regional, int64_t(segments.size()) - regional};
        const int64_t first = part * kTaskQueries, last = std::min(count, first + kTaskQueries);
        const T* from[kTaskQueries];
        T* to[kTaskQueries];
        for (int64_t i = first; i < last; ++i) {
          const int64_t token = (top + i / size.width) * grid.width + left + i % size.width;
          from[i - first] = q.at(b, h, token);
          to[i - first] = out.at(b, h, token);
        }
        kernels.attend({from, to, last - first}, own, of_cells, share ? share + h : nullptr, width, scale, scratch);
      }
      memory.release_above(kKeptFloats);
    });
  }
};

// q, k, v and out [batch, heads, tokens, d], innermost stride 1, none of them empty; sizes of 0 for no window and no
// pool, windows no larger than the map; share [heads] and v_cells [batch, heads, cells, d] dense in float32.
// cpu_impl.py sees to it.
void gri_attention(Tensor q, Tensor k, Tensor v, int64_t grid_height, int64_t grid_width, int64_t window_height,
                   int64_t window_width, int64_t pool_height, int64_t pool_width, bool mask_own_window,
                   std::optional<Tensor> share, std::optional<Tensor> v_cells, double scale, int64_t isa, Tensor out) {
  if (grid_height * grid_width != q.size(2) || q.numel() == 0)
    throw std::invalid_argument("q: expected the tokens of a map, at least one");
  with_element(q, [&](auto element) {
    using T = decltype(element);
    Attention<T>{
        tokens_of<const T>(q, q.const_data_ptr()),
        tokens_of<const T>(k, k.const_data_ptr()),
        tokens_of<const T>(v, v.const_data_ptr()),
        tokens_of<T>(out, out.mutable_data_ptr()),
        q.size(0),
        q.size(1),
        q.size(3),
        {grid_height, grid_width},
        {window_height, window_width},
        {pool_height, pool_width},
        mask_own_window,
        share ? static_cast<const float*>(share->const_data_ptr()) : nullptr,
        v_cells ? static_cast<const float*>(v_cells->const_data_ptr()) : nullptr,
        float(scale),
        attention_kernels_for<T>(checked_isa(isa)),
    }
        .run();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsd_cpu, m) {
  m.def(
      "gri_attention(Tensor q, Tensor k, Tensor v, int grid_height, int grid_width, int window_height, "
      "int window_width, int pool_height, int pool_width, bool mask_own_window, Tensor? share, Tensor? v_cells, "
      "float scale, int isa, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, m) {
  m.impl("gri_attention", TORCH_BOX(&gri_attention));
}

}  // namespace fastsd
