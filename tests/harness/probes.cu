// Small kernels that try the harness itself: what it must compute, and planted errors that it must catch.
#include "device.cuh"

using namespace fastsd;

// values[i] = 10000 · block + 100 · threadIdx.y + threadIdx.x
extern "C" __global__ void indices(float* values) {
  const i64 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const i64 thread = threadIdx.y * blockDim.x + threadIdx.x;
  values[block * blockDim.x * blockDim.y + thread] = 10000.0f * block + 100.0f * threadIdx.y + threadIdx.x;
}

extern "C" __global__ void scale(const float* from, float* to, i64 count, float factor) {
  const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = from == nullptr ? factor : from[i] * factor;
}

// ---- memory errors; what is read or written is one element of 8

extern "C" __global__ void access_global(float* from, float* to, i64 index, i64 write) {
  if (write) from[index] = 1.0f;  // global.write
  to[0] = from[index];            // global.read
}

extern "C" __global__ void access_dynamic_shared(float* to, i64 index, i64 write) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  if (write) shared[index] = 1.0f;  // dynamic.write
  to[0] = shared[index];            // dynamic.read
}

extern "C" __global__ void access_static_shared(float* to, i64 index, i64 write) {
  __shared__ float shared[8];
  float* at = shared;           // the bounds of an array are UBSan's matter, those of its memory AddressSanitizer's
  if (write) at[index] = 1.0f;  // static.write
  to[0] = at[index];            // static.read
}

constexpr float kTable[4] = {1.0f, 2.0f, 4.0f, 8.0f};

extern "C" __global__ void read_constants(float* to, i64 first) {
  const float* table = kTable;
  to[threadIdx.x] = table[(first + threadIdx.x) % 4];
}

// Two of `to` for each block become what dynamic and static shared memory hold when a block begins; then both are
// written.
extern "C" __global__ void read_unwritten_shared(float* to) {
  __shared__ float fixed;
  float* dynamic = reinterpret_cast<float*>(shared_memory());
  to[2 * blockIdx.x] = *dynamic;
  to[2 * blockIdx.x + 1] = fixed;
  *dynamic = fixed = 1.0f;
}

extern "C" __global__ void load_misaligned(const float* from, float* to, i64 offset) {
  float values[4];
  load(from + offset, values);
  store(to, values);
}

// ---- barriers

// Each thread reads its neighbour's value. Between are: 0, nothing; 1, a barrier; 2, one that comes too early; 3, one
// of the warp; 4, one of its lower and one of its upper half; 5, a shuffle.
extern "C" __global__ void neighbour(float* to, i64 between) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, threads = blockDim.x;
  if (between == 2) __syncthreads();
  shared[thread] = thread;  // neighbour.write
  if (between == 1) __syncthreads();
  if (between == 3) __syncwarp();
  if (between == 4) __syncwarp(thread % kWarp < 16 ? 0x0000ffffu : 0xffff0000u);
  if (between == 5) __shfl_sync(kAllLanes, 1.0f, 0);
  to[thread] = shared[(thread + 1) % threads];  // neighbour.read
}

// All threads read the first thread's value and that overwrites it, with a barrier before, if `barrier`.
extern "C" __global__ void overwrite(float* to, i64 barrier) {
  __shared__ float value;
  const int thread = threadIdx.x;
  if (thread == 0) value = 1.0f;
  __syncthreads();
  to[thread] = value;  // overwrite.read
  if (barrier) __syncthreads();
  if (thread == 0) value = 2.0f;  // overwrite.write
}

// Each thread writes kWidth elements in one access and reads one of its neighbour's last.
template <int kWidth>
__device__ void exchange(__half* to, i64 barrier) {
  __half* shared = reinterpret_cast<__half*>(shared_memory());
  const int thread = threadIdx.x, threads = blockDim.x;
  float values[kWidth];
  for (int i = 0; i < kWidth; ++i) values[i] = thread;
  store(shared + kWidth * thread, values);  // exchange.write
  if (barrier) __syncthreads();
  to[thread] = shared[kWidth * ((thread + 1) % threads) + kWidth - 1];  // exchange.read
}

extern "C" __global__ void exchange_vectors(__half* to, i64 width, i64 barrier) {
  if (width == 1) exchange<1>(to, barrier);
  if (width == 2) exchange<2>(to, barrier);
  if (width == 4) exchange<4>(to, barrier);
  if (width == 8) exchange<8>(to, barrier);
}

// The same by memcpy, which is not inlined.
extern "C" __global__ void exchange_block(float* to, i64 barrier) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, threads = blockDim.x;
  const float values[8] = {};
  memcpy(shared + 8 * thread, values, sizeof(values));  // block.write
  if (barrier) __syncthreads();
  to[thread] = shared[8 * ((thread + 1) % threads)];  // block.read
}

// Block b writes a byte of its own; or the first one too; or it reads that of the block before.
extern "C" __global__ void blocks_meet(unsigned char* to, i64 how) {
  const u32 block = blockIdx.x;
  to[how == 1 ? 0 : block] = static_cast<unsigned char>(block);               // blocks.write
  if (how == 2 && to[(block + gridDim.x - 1) % gridDim.x] == 255) to[0] = 0;  // blocks.read
}

extern "C" __global__ void barrier_for_some(i64 threads) {
  if (threadIdx.x < threads) __syncthreads();
}

extern "C" __global__ void different_barriers(i64 threads) {
  if (threadIdx.x < threads) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

extern "C" __global__ void shuffle_for_some(float* to, i64 lanes) {
  if (threadIdx.x < lanes) to[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
}

extern "C" __global__ void shuffle_from_outside(float* to) {
  if (threadIdx.x < 16) to[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

// ---- warp operations: each row of `to` [operations, threads] is one

extern "C" __global__ void shuffles(const float* from, float* to) {
  const int thread = threadIdx.x, threads = blockDim.x;
  const float value = from[thread];
  to[thread] = __shfl_sync(kAllLanes, value, 5);
  to[threads + thread] = __shfl_xor_sync(kAllLanes, value, 3);
  to[2 * threads + thread] = __shfl_down_sync(kAllLanes, value, 4);
  to[3 * threads + thread] = __shfl_up_sync(kAllLanes, value, 4);
  to[4 * threads + thread] = __shfl_sync(kAllLanes, value, 2, 8);
  // two halves of a warp, each on its own
  const u32 half = thread % kWarp < 16 ? 0x0000ffffu : 0xffff0000u;
  to[5 * threads + thread] = __shfl_xor_sync(half, value, 8);
  to[6 * threads + thread] = static_cast<float>(__ballot_sync(kAllLanes, value > 0.0f) >> thread % kWarp & 1);
  to[7 * threads + thread] = static_cast<float>(__ballot_sync(kAllLanes, thread % kWarp < 3));
}

extern "C" __global__ void reductions(const float* from, float* to) {
  const int thread = threadIdx.x, threads = blockDim.x;
  to[thread] = warp_sum(from[thread]);
  to[threads + thread] = block_sum(from[thread], reinterpret_cast<float*>(shared_memory()));
}

extern "C" __global__ void activations(const float* from, float* to) {
  to[threadIdx.x] = silu(from[threadIdx.x]);
}

// ---- asynchronous copies

// to [2, 4 · threads]: two groups of copies. An odd thread's second copy is not valid and gives zeros. `mistake`: 1, no
// wait for the second group; 2, a wait behind the barrier; 3, a thread reads what it copies before it waits; 4, it
// writes what is being copied; 5, all wait behind the barrier, before any reads.
extern "C" __global__ void copies(float* from, float* to, i64 mistake) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, half = 4 * blockDim.x;
  cp_async_16(shared + 4 * thread, from + 4 * thread);
  cp_async_commit();
  cp_async_16(shared + half + 4 * thread, from + half + 4 * thread, thread % 2 == 0);  // copies.copy
  cp_async_commit();
  if (mistake == 3) to[thread] = shared[half + 4 * thread];                 // copies.early_read
  if (mistake == 4 && thread % 2 == 0) from[half + 4 * thread + 3] = 1.0f;  // copies.write
  cp_async_wait<1>();
  if (mistake != 1 && mistake != 2 && mistake != 5) cp_async_wait<0>();
  __syncthreads();
  if (mistake == 2 || mistake == 5) cp_async_wait<0>();
  if (mistake == 5) __shfl_sync(kAllLanes, 1.0f, 0);
  for (int i = thread; i < 2 * half; i += blockDim.x) to[i] = shared[i];  // copies.read
}

// to [3, 4 · threads]: three tiles by way of two stages, of which one is filled while the other is read; a thread reads
// what one of the next warp copied. Without the barrier before it, a copy overwrites what other warps still read.
extern "C" __global__ void stages(const float* from, float* to, i64 with_barrier) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, threads = blockDim.x, other = (thread + kWarp) % threads;
  const auto fetch = [&](int tile) {
    float* at = shared + 4 * (tile % 2 * threads + thread);
    if (tile < 3) cp_async_16(at, from + 4 * (tile * threads + thread));  // stages.copy
    cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < 3; ++tile) {
    cp_async_wait<0>();
    if (!with_barrier) fetch(tile + 1);
    __syncthreads();
    if (with_barrier) fetch(tile + 1);
    const float* at = shared + 4 * (tile % 2 * threads + other);
    for (int i = 0; i < 4; ++i) to[4 * (tile * threads + thread) + i] = at[i];  // stages.read
  }
}

// A copy's target is read by the lane beside, once __syncwarp, if there, has followed the wait.
extern "C" __global__ void copy_for_the_warp(const float* from, float* to, i64 ordered) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x;
  cp_async_16(shared + 4 * lane, from + 4 * lane);  // warp.copy
  cp_async_commit();
  cp_async_wait<0>();
  if (ordered) __syncwarp();
  to[lane] = shared[4 * (lane ^ 1)];  // warp.read
}

// ---- tensor cores

// product [16, 8] = a [16, 16] · b [16, 8] + product, row-major; one warp
template <class Element>
__device__ void multiply(const Element* a, const Element* b, float* product) {
  Element* shared = reinterpret_cast<Element*>(shared_memory());
  Element* shared_b = shared + 16 * 16;
  const int lane = threadIdx.x;
  cp_async_16(shared + 8 * lane, a + 8 * lane);
  if (lane < 16) cp_async_16(shared_b + 8 * lane, b + 8 * lane);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  u32 of_a[4], of_b[4];
  // matrices 0 to 3 of a: top left, bottom left, top right, bottom right
  ldmatrix_x4(of_a, shared + (lane % 16) * 16 + lane / 16 * 8);
  // b's rows are k, the fragment wants k innermost; lanes from 16 on repeat its two matrices
  ldmatrix_x4<true>(of_b, shared_b + (lane % 16) * 8);
  const u32 pair[2] = {of_b[0], of_b[1]};

  const int row = lane / 4, column = lane % 4 * 2;
  float* places[4] = {product + row * 8 + column, product + row * 8 + column + 1, product + (row + 8) * 8 + column,
                      product + (row + 8) * 8 + column + 1};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = *places[i];
  mma_m16n8k16<Element>(sum, of_a, pair);
  for (int i = 0; i < 4; ++i) *places[i] = sum[i];
}

extern "C" __global__ void multiply_float16(const __half* a, const __half* b, float* product) {
  multiply(a, b, product);
}

extern "C" __global__ void multiply_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* product) {
  multiply(a, b, product);
}
