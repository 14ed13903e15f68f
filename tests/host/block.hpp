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
// reverse: the other extreme of what a device leaves open, on which no result may depend. Without it blocks, warps and
// lanes run in order, and an asynchronous copy is made when it starts; with it they run in the opposite order, and a
// copy is made when it is waited for. In both a warp runs as far as it can before the next.
// Throws std::runtime_error when a thread fails, and when threads wait for each other in vain.
void launch(const Kernel& kernel, const Argument* arguments, dim3 grid, dim3 block, size_t shared_bytes,
            Bytes static_shared, bool reverse);

}  // namespace fastsd::host
