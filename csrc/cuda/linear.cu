// linear: y = act(norm(x) Wᵀ + b) + residual, without the normalised rows in memory.
//
// linear_moments takes the moments of each row, where there is a norm. A block of linear_project computes TILE_ROWS ×
// TILE_FEATURES of y. It goes through the rows' elements STEP at a time: the next ones, and those of the weight, are on
// their way to shared memory while the warps multiply what is there. Each thread normalises the elements of x that it
// has brought itself.
//
// With gates, a weight has the rows of the values and then those of the gates. A warp multiplies both of the same
// features, which lie behind each other in its part of shared memory.
//
// Nothing depends on the order of blocks, and there are no atomics: two runs are equal to the bit.
//
// Defined by the host: DTYPE, the element of x, weight, residual and y; PARAMETER_DTYPE, that of norm weight, norm bias
// and bias; VECTOR, elements of one access to x and weight, which divides their width and the distances between their
// rows, with 8 they are copied asynchronously; OUT_VECTOR, the same for residual and y; GATED, 1 for a weight that has
// gates; TILE_ROWS; TILE_FEATURES; WARP_FEATURES, those of a warp; STEP; STAGES, steps that have room in shared memory.
#include "product.cuh"

using namespace fastsd;

namespace {

using P = PARAMETER_DTYPE;

constexpr int kParts = GATED ? 2 : 1;  // of the weight
constexpr int kWarpRows = 32;
constexpr int kWarpWeights = kParts * WARP_FEATURES;  // rows of the weight
constexpr int kTileWeights = kParts * TILE_FEATURES;
constexpr int kWarpsOfFeatures = TILE_FEATURES / WARP_FEATURES;
constexpr int kWarps = TILE_ROWS / kWarpRows * kWarpsOfFeatures;
constexpr int kThreads = kWarps * kWarp;
constexpr int kResidentThreads = 512;  // on one multiprocessor: bounds registers to 128
constexpr int kPieces = STEP / VECTOR;
constexpr int kScratchRow = kWarpWeights + 8;  // floats; the 8 keep rows out of each other's banks

constexpr int kMomentsThreads = 256;
constexpr int kGelu = 1;  // of `activate`; 2 is quick_gelu

static_assert(TILE_ROWS % kWarpRows == 0 && TILE_FEATURES % WARP_FEATURES == 0 && kWarpWeights % 16 == 0,
              "a warp computes whole fragments");
static_assert(kThreads % kPieces == 0, "a thread has the same elements of every few rows");
static_assert(WARP_FEATURES % OUT_VECTOR == 0 && kColumn % VECTOR == 0, "whole accesses");

// As torch's exact gelu: of infinities it makes what 0 · inf is there too.
__device__ float gelu(float z) {
  constexpr float kSqrtHalf = 0.707106781f;
  return 0.5f * z * (1.0f + erff(z * kSqrtHalf));
}

// z σ(1.702 z)
__device__ float quick_gelu(float z) {
  return __fdividef(z, 1.0f + expf(-1.702f * z));
}

// Starts to bring STEP elements from `first` on of kRows rows to shared memory: zeros behind the last, and for rows
// that are null.
template <int kRows, class Row>
__device__ void fetch(Row row_of_tile, int first, int width, T* shared) {
  const int element_of_step = threadIdx.x % kPieces * VECTOR, k = first + element_of_step;
#pragma unroll 1
  for (int row = threadIdx.x / kPieces; row < kRows; row += kThreads / kPieces) {
    const T* from = row_of_tile(row);
    const bool valid = from != nullptr && k < width;
    T* to = shared + element(row, element_of_step / kColumn) + element_of_step % kColumn;
    if constexpr (VECTOR == kColumn) {
      cp_async_16(to, valid ? from + k : row_of_tile(0), valid);
    } else {
      float elements[VECTOR] = {};
      if (valid) load(from + k, elements);
      store(to, elements);
    }
  }
}

// Norm weight and bias of the elements that a thread brings.
struct Affine {
  float scale[VECTOR], offset[VECTOR];

  __device__ Affine(const P* weight, const P* bias, int first, int width) {
    const int k = first + static_cast<int>(threadIdx.x) % kPieces * VECTOR;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      scale[v] = 1.0f;
      offset[v] = 0.0f;
    }
    if (weight != nullptr && k < width) load_pieces<VECTOR>(weight + k, scale);
    if (bias != nullptr && k < width) load_pieces<VECTOR>(bias + k, offset);
  }

  // Turns what fetch() has brought, and what was waited for, into u.
  __device__ void apply(const float* moments, int first, int width, T* shared) const {
    const int element_of_step = threadIdx.x % kPieces * VECTOR;
    if (first + element_of_step >= width) return;
#pragma unroll 1
    for (int row = threadIdx.x / kPieces; row < TILE_ROWS; row += kThreads / kPieces) {
      T* to = shared + element(row, element_of_step / kColumn) + element_of_step % kColumn;
      float of_row[2], u[VECTOR];
      load(moments + 2 * row, of_row);
      load(to, u);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) u[v] = (u[v] - of_row[0]) * of_row[1] * scale[v] + offset[v];
      store(to, u);
    }
  }
};

}  // namespace

// moments [rows, 2]: mean of each row of x, and one over its deviation. One warp for a row.
extern "C" __global__ void __launch_bounds__(kMomentsThreads)
    linear_moments(const T* x, float* moments, i64 rows, i64 width, i64 x_stride, float eps) {
  const int lane = threadIdx.x % kWarp;
  const i64 row = static_cast<i64>(blockIdx.x) * (kMomentsThreads / kWarp) + threadIdx.x / kWarp;
  // the same in the whole warp
  if (row >= rows) return;
  const T* of_row = x + row * x_stride;
  const float count = static_cast<float>(width);
  float mean = 0.0f, variance = 0.0f;
  // the deviations are about the mean, which has to be known: their squares about 0 would cancel
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    float sum = 0.0f;
#pragma unroll 2
    for (i64 k = lane * VECTOR; k < width; k += kWarp * VECTOR) {
      float elements[VECTOR];
      load(of_row + k, elements);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        const float deviation = elements[v] - mean;
        sum += pass == 0 ? deviation : deviation * deviation;
      }
    }
    (pass == 0 ? mean : variance) = warp_sum(sum) / count;
  }
  const float of_warp[2] = {mean, rsqrtf(variance + eps)};
  if (lane == 0) store(moments + 2 * row, of_warp);
}

// y [rows, features] from x [rows, width] and weight [features, width], or [2 · features, width] with gates; moments as
// linear_moments leaves them, or null for no norm. The rows of x, of the weight and of the residual are their strides
// apart, those of y are dense.
// Grid: tiles of rows × tiles of features. Shared: the rows' moments, the features' biases, then STAGES of x and
// weight, later the warps' scratch.
extern "C" __global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    linear_project(const T* x, const T* weight, const float* moments, const P* norm_weight, const P* norm_bias,
                   const P* bias, const T* residual, T* y, i64 rows, i64 width, i64 features, i64 x_stride,
                   i64 weight_stride, i64 residual_stride, i64 activate) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int warp_row = warp / kWarpsOfFeatures * kWarpRows, warp_of_features = warp % kWarpsOfFeatures;
  const int columns = static_cast<int>(width), features_of_y = static_cast<int>(features);
  // blocks that share rows follow each other
  const u32 feature_tiles = static_cast<u32>((features_of_y + TILE_FEATURES - 1) / TILE_FEATURES);
  const int first_feature = static_cast<int>(blockIdx.x % feature_tiles) * TILE_FEATURES;
  const i64 first_row = static_cast<i64>(blockIdx.x / feature_tiles) * TILE_ROWS;
  const int rows_left = static_cast<int>(rows - first_row < TILE_ROWS ? rows - first_row : TILE_ROWS);

  float* own_moments = reinterpret_cast<float*>(shared_memory());
  float* biases = own_moments + 2 * TILE_ROWS;
  T* of_x = reinterpret_cast<T*>(biases + kTileWeights);
  T* of_weight = of_x + STAGES * TILE_ROWS * STEP;

  // the weight's row that a row of shared memory holds; none behind the last feature
  const auto weight_row = [&](int row) {
    const int of_warp = row % kWarpWeights, part = of_warp / WARP_FEATURES;
    const int feature = first_feature + row / kWarpWeights * WARP_FEATURES + of_warp % WARP_FEATURES;
    return feature < features_of_y ? part * features_of_y + feature : -1;
  };
  const auto fetch_step = [&](int step) {
    const int stage = step % STAGES, first = step * STEP;
    if (first < columns) {
      fetch<TILE_ROWS>([&](int row) { return row < rows_left ? x + (first_row + row) * x_stride : nullptr; }, first,
                       columns, of_x + stage * TILE_ROWS * STEP);
      fetch<kTileWeights>(
          [&](int row) {
            const int own = weight_row(row);
            return own >= 0 ? weight + own * weight_stride : nullptr;
          },
          first, columns, of_weight + stage * kTileWeights * STEP);
    }
    // one group for each step, also where there is none: so the youngest are counted
    cp_async_commit();
  };

#pragma unroll 1
  for (int step = 0; step < STAGES - 1; ++step) fetch_step(step);
  if (moments != nullptr) {
    for (int i = thread; i < 2 * TILE_ROWS; i += kThreads) {
      own_moments[i] = i < 2 * rows_left ? moments[2 * first_row + i] : 0.0f;
    }
  }
  for (int i = thread; i < kTileWeights; i += kThreads) {
    const int own = weight_row(i);
    biases[i] = bias != nullptr && own >= 0 ? to_float(bias[own]) : 0.0f;
  }
  __syncthreads();

  float sum[kWarpRows / 16][kWarpWeights / 8][4] = {};
  // rows of shared memory that this lane addresses in ldmatrix
  int row_of_x[kWarpRows / 16];
#pragma unroll
  for (int i = 0; i < kWarpRows / 16; ++i) row_of_x[i] = warp_row + i * 16 + lane % 16;
  const int row_of_weight = warp_of_features * kWarpWeights + lane / 16 * 8 + lane % 8;
  const int steps = (columns + STEP - 1) / STEP;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    T* u = of_x + step % STAGES * TILE_ROWS * STEP;
    if (moments != nullptr) {
      const Affine affine(norm_weight, norm_bias, step * STEP, columns);
      cp_async_wait<STAGES - 2>();
      affine.apply(own_moments, step * STEP, columns, u);
    } else {
      cp_async_wait<STAGES - 2>();
    }
    // now all see this step, and nobody reads the one before
    __syncthreads();
    fetch_step(step + STAGES - 1);
    multiply_step(u, row_of_x, of_weight + step % STAGES * kTileWeights * STEP, row_of_weight, sum);
  }

  // From fragments to rows: 16 of them at a time through the warp's own scratch.
  __syncthreads();
  float* scratch = reinterpret_cast<float*>(of_x) + warp * 16 * kScratchRow;
  const float* own_biases = biases + warp_of_features * kWarpWeights;
#pragma unroll
  for (int i = 0; i < kWarpRows / 16; ++i) {
    __syncwarp();
    store_rows<kScratchRow>(scratch, sum[i]);
    __syncwarp();
    constexpr int kVectors = WARP_FEATURES / OUT_VECTOR;
#pragma unroll 1
    for (int item = lane; item < 16 * kVectors; item += kWarp) {
      const int row = warp_row + i * 16 + item / kVectors, of_warp = item % kVectors * OUT_VECTOR;
      const int feature = first_feature + warp_of_features * WARP_FEATURES + of_warp;
      if (row >= rows_left || feature >= features_of_y) continue;
      const float* of_row = scratch + item / kVectors * kScratchRow + of_warp;
      float z[OUT_VECTOR], more[OUT_VECTOR] = {};
      load_pieces<OUT_VECTOR>(of_row, z);
#pragma unroll
      for (int v = 0; v < OUT_VECTOR; ++v) z[v] += own_biases[of_warp + v];
      if constexpr (GATED) {
        float gate[OUT_VECTOR];
        load_pieces<OUT_VECTOR>(of_row + WARP_FEATURES, gate);
#pragma unroll
        for (int v = 0; v < OUT_VECTOR; ++v) z[v] *= gelu(gate[v] + own_biases[WARP_FEATURES + of_warp + v]);
      } else if (activate) {
#pragma unroll
        for (int v = 0; v < OUT_VECTOR; ++v) z[v] = activate == kGelu ? gelu(z[v]) : quick_gelu(z[v]);
      }
      const i64 index = first_row + row;
      if (residual != nullptr) load(residual + index * residual_stride + feature, more);
#pragma unroll
      for (int v = 0; v < OUT_VECTOR; ++v) z[v] += more[v];
      store(y + index * features + feature, z);
    }
  }
}
