// Runs the blocks of a launch one after the other, the threads of each as fibers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <cuda_fp16.h>

#include "kernel_table.hpp"
#include "races.hpp"

namespace fastsd::host {

struct Launch {
  const Kernel& kernel;
  std::vector<Argument> arguments;
  dim3 grid, block;
  size_t shared_bytes;
  Bytes static_shared;         // poisoned before each block, like the dynamic one
  std::vector<Memory> memory;  // that the kernel may touch, besides dynamic shared memory
  // Selects one of the schedules that a device may follow, on which no result may depend. In each a warp runs as far as
  // it can before the next one. 0: blocks, warps and lanes in order, asynchronous copies made when they start; 1: in
  // the opposite order, copies made when they are waited for; from 2 on: a pseudo-random order of blocks, of warps and
  // of lanes, the latter two another one each time, and each copy made early or late.
  uint64_t seed;
};

// Throws std::runtime_error when a thread does what a device does not, when threads wait for each other in vain, and
// for what races.hpp finds.
void run(const Launch& launch);

}  // namespace fastsd::host
