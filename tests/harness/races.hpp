// Watches what the threads of a launch read and write: races, and accesses outside the memory that they were given.
//
// Kernels are compiled with -fsanitize=thread, whose calls for each access end in races.cpp and not in
// ThreadSanitizer's own runtime. Two accesses to a byte, one of them a write, must be ordered:
//   - __syncthreads orders the threads of a block, __syncwarp the lanes of its mask;
//   - shuffles, votes, mma and ldmatrix make lanes meet, but order no memory;
//   - blocks of one launch are not ordered at all;
//   - from its start until its thread waits for it, an asynchronous copy may write its target and read its source at
//   any
//     time; then it counts as the thread's own access;
//   - ldmatrix reads a row as the lane that gives the row's address.
// It does not depend on the schedule: whether two accesses are ordered is the same in each.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace fastsd::host {

// What a kernel may touch; the shared memory of a block is another one's in each block.
struct Memory {
  const char* first;
  size_t bytes;
  std::string name;
  bool shared;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;         // else `from` is not read, and zeros are written
  const void* place;  // in the library, from where it was started
};

// library: any address in the library of kernels, whose constants may be read.
void watch_launch(std::vector<Memory> memory, const void* library);
void watch_block(size_t block);
// From here on the thread runs; a pointer to its own stack is not watched.
void watch_thread(unsigned thread, const char* stack, size_t bytes);

void watch_syncthreads();
void watch_syncwarp(unsigned warp, unsigned mask);

// By the thread that runs. What starts has to end, be it when the thread does.
void watch_copy_start(const Copy& copy);
void watch_copy_end(const Copy& copy);
// Forgets the copies that a launch has left under way.
void watch_abandoned();

// ---- given by who runs the threads

// Ends the launch with an error. `describe` is called outside the thread.
[[noreturn]] void stop(std::function<std::string()> describe);

// A copy that has started to, or from, some of these bytes and has not ended, and its thread.
std::pair<const Copy*, unsigned> copy_under_way(size_t address, size_t bytes, bool to);

}  // namespace fastsd::host
