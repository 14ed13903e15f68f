// Memory of large results, kept for the next ones. What for: kernels/fastsd_kernels/cpu_memory.py.

#pragma once

#include <cstddef>

namespace fastsd {

// Of blocks that nobody uses: bytes of all together.
constexpr size_t kMostKept = size_t(512) * 1024 * 1024;

// That many bytes on pages of their own, with whatever they hold; null where there is no memory left.
void* take_block(size_t bytes);

// From any thread, whatever it holds. What was given back longest ago leaves where too much is kept.
void give_block_back(void* data, size_t bytes);

size_t kept_bytes();

void release_blocks();

}  // namespace fastsd
