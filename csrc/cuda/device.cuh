// The hardware as kernels see it. A kernel uses vector memory access, shuffles, asynchronous copies and tensor cores
// only through these functions; each that is more than plain CUDA C++ has a device body and a host body, so that the
// same .cu also runs, under a sanitizer if wanted, where there is no GPU (FASTSD_HOST).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef FASTSD_HOST
#include "cuda_on_host.hpp"
#endif

namespace fastsd {

// NVRTC has no <cstdint>
using i64 = long long;
using u32 = unsigned int;

constexpr int kWarp = 32;
constexpr u32 kAllLanes = 0xffffffffu;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// ---- numbers

__device__ inline float to_float(float value) {
  return value;
}
__device__ inline float to_float(__half value) {
  return __half2float(value);
}
__device__ inline float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <class Element>
__device__ inline Element from_float(float value);
template <>
__device__ inline float from_float(float value) {
  return value;
}
template <>
__device__ inline __half from_float(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}

// x σ(x) to 5 ulp. __fdividef is 0 for denominators above 2^126: there the result is below 1e-36 in magnitude.
__device__ inline float silu(float x) {
  return __fdividef(x, 1.0f + expf(-x));
}

// 2^x to 2 ulp, and 0 where that is subnormal: one instruction instead of exp2f's four.
__device__ inline float exp2_fast(float x) {
#ifdef FASTSD_HOST
  return exp2f(x);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}

// ---- memory

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// Reads kCount neighbours in one access of up to 16 bytes; `from` must be aligned to that access.
// Where rows or pointers are not, the host function chooses a smaller kCount.
template <int kCount, class Element>
__device__ inline void load(const Element* from, float (&to)[kCount]) {
  Element elements[kCount];
#ifdef FASTSD_HOST
  host::require_aligned(from, sizeof(elements));
  memcpy(elements, from, sizeof(elements));
#else
  using Access = typename Word<sizeof(elements)>::Type;
  const Access word = *reinterpret_cast<const Access*>(from);
  memcpy(elements, &word, sizeof(word));
#endif
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = to_float(elements[i]);
}

// Writes kCount neighbours in one access; the same alignment as load().
template <int kCount, class Element>
__device__ inline void store(Element* to, const float (&from)[kCount]) {
  Element elements[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) elements[i] = from_float<Element>(from[i]);
#ifdef FASTSD_HOST
  host::require_aligned(to, sizeof(elements));
  memcpy(to, elements, sizeof(elements));
#else
  using Access = typename Word<sizeof(elements)>::Type;
  Access word;
  memcpy(&word, elements, sizeof(word));
  *reinterpret_cast<Access*>(to) = word;
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes; its size is given at the launch.
__device__ inline char* shared_memory() {
#ifdef FASTSD_HOST
  return host::dynamic_shared_memory();
#else
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<char*>(dynamic_shared_memory);
#endif
}

// ---- reductions, in an order that depends on nothing but the shape of the block

// The sum over the warp, the same bits in every lane. The whole warp takes part.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The sum over a block of whole warps, in every thread. scratch: shared, one float per warp; free again on return.
__device__ inline float block_sum(float value, float* scratch) {
  const int warps = blockDim.x / kWarp;
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < warps; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

// ---- asynchronous copies, global to shared

// Starts to copy 16 bytes, or to write 16 zero bytes where not `valid`; both addresses aligned to 16.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid = true) {
#ifdef FASTSD_HOST
  host::require_aligned(shared, 16);
  host::require_aligned(global, 16);
  host::copy_later(shared, global, 16, valid);
#else
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#endif
}

// Closes a group of the copies that this thread started.
__device__ inline void cp_async_commit() {
#ifdef FASTSD_HOST
  host::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups, the youngest, are under way. A barrier must follow before
// other threads read what was copied.
template <int kPending>
__device__ inline void cp_async_wait() {
#ifdef FASTSD_HOST
  host::wait_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- tensor cores; whole warps only

// Four 8×8 matrices of 16-bit elements. Lane 8i + r gives the address of row r of matrix i (16 bytes, aligned).
// Lane l receives in matrices[i] the elements [l/4][2(l%4)] and [l/4][2(l%4) + 1] of matrix i, or of its transpose.
template <bool kTranspose = false>
__device__ inline void ldmatrix_x4(u32 (&matrices)[4], const void* row) {
#ifdef FASTSD_HOST
  struct Row {
    unsigned short elements[8];
  };
  host::require_aligned(row, 16);
  Row own;
  memcpy(&own, row, sizeof(own));
  const auto rows = host::gather("ldmatrix", kAllLanes, own);
  const int lane = threadIdx.x % kWarp, across = lane / 4, along = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const Row* matrix = &rows[8 * i];
    const u32 low = kTranspose ? matrix[along].elements[across] : matrix[across].elements[along];
    const u32 high = kTranspose ? matrix[along + 1].elements[across] : matrix[across].elements[along + 1];
    matrices[i] = low | high << 16;
  }
#else
  const u32 from = static_cast<u32>(__cvta_generic_to_shared(row));
  u32(&m)[4] = matrices;
  if (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// sum += a · b with a [16, 16], b [16, 8], sum [16, 8]; Element is __half or __nv_bfloat16, the sum is in float32.
// With g = lane / 4 and t = 2 (lane % 4), a register holding the elements at its place and at the next column (a) or
// row (b): a = {[g][t], [g + 8][t], [g][t + 8], [g + 8][t + 8]}, b = {[t][g], [t + 8][g]},
// sum = {[g][t], [g][t + 1], [g + 8][t], [g + 8][t + 1]}.
template <class Element>
__device__ inline void mma_m16n8k16(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  static_assert(kSame<Element, __half> || kSame<Element, __nv_bfloat16>, "Element is __half or __nv_bfloat16");
#ifdef FASTSD_HOST
  struct Fragments {
    float a[4][2], b[2][2];
  };
  Element of_a[4][2], of_b[2][2];
  memcpy(of_a, a, sizeof(of_a));
  memcpy(of_b, b, sizeof(of_b));
  Fragments own;
  for (int i = 0; i < 8; ++i) own.a[i / 2][i % 2] = to_float(of_a[i / 2][i % 2]);
  for (int i = 0; i < 4; ++i) own.b[i / 2][i % 2] = to_float(of_b[i / 2][i % 2]);
  const auto all = host::gather("mma_m16n8k16", kAllLanes, own);
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Fragments& left = all[row % 8 * 4 + k % 8 / 2];
      const Fragments& right = all[column * 4 + k % 8 / 2];
      sum[i] += left.a[row / 8 + k / 8 * 2][k % 2] * right.b[k / 8][k % 2];
    }
  }
#else
  if (kSame<Element, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace fastsd
