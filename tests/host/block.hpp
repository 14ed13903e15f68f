// Runs the blocks of a launch one after the other, the threads of each as fibers.
#pragma once

#include <cstddef>

#include <cuda_fp16.h>

#include "kernel_table.hpp"

namespace fastsd::host {

struct Bytes {
  char* first;
  size_t size;
};

// static_shared: the kernel's static shared memory, poisoned before each block like the dynamic one.
// reverse: blocks and threads run in the opposite order; a kernel's result must not depend on it.
// Throws std::runtime_error when a thread fails, and when threads wait for each other in vain.
void launch(const Kernel& kernel, const Argument* arguments, dim3 grid, dim3 block, size_t shared_bytes,
            Bytes static_shared, bool reverse);

}  // namespace fastsd::host
