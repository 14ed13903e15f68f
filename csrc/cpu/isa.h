// Instruction sets: which there are, which this machine has, and how a kernel is compiled for each.
//
// A kernel lives in a file of plain loops that the compiler vectorises; what it includes are such files too, and its
// lambdas are always inlined (by itself a lambda does not inherit the target). `#define FASTSD_KERNEL "name_kernel.h"`
// and include "foreach_isa.h": the file is then compiled once in each of the namespaces baseline, avx2 and avx512.

#pragma once

#include <cstdint>

namespace fastsd {

enum class Isa : int64_t { baseline, avx2, avx512 };

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace fastsd
