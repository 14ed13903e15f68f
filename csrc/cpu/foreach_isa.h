// Compiles the file named by FASTSD_KERNEL once per instruction set; see isa.h. No include guard, on purpose.
// FASTSD_LANES is then the number of floats in a vector, FASTSD_VECTORS that of vector registers.

#define FASTSD_LANES 4
#define FASTSD_VECTORS 16
namespace fastsd::baseline {
#include FASTSD_KERNEL
}
#undef FASTSD_LANES
#undef FASTSD_VECTORS

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FASTSD_LANES 8
#define FASTSD_VECTORS 16
namespace fastsd::avx2 {
#include FASTSD_KERNEL
}
#undef FASTSD_LANES
#undef FASTSD_VECTORS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define FASTSD_LANES 16
#define FASTSD_VECTORS 32
namespace fastsd::avx512 {
#include FASTSD_KERNEL
}
#undef FASTSD_LANES
#undef FASTSD_VECTORS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace fastsd {
namespace avx2 = baseline;
namespace avx512 = baseline;
}  // namespace fastsd

#endif

#undef FASTSD_KERNEL
