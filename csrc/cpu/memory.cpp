#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <iterator>
#include <mutex>
#include <vector>

#include "host.h"

namespace fastsd {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> unused;  // what was given back last at the end
  size_t bytes = 0;           // of these

  // A thread that is in the middle of something does not exist in a process that is forked off.
  Pool() {
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
  }

  // Lives as long as the process: tensors may die after everything else.
  static Pool& pool() {
    static Pool* const pool = new Pool;
    return *pool;
  }
};

void unmap(const std::vector<Block>& blocks) {
  for (const Block& block : blocks) munmap(block.data, block.bytes);
}

}  // namespace

void* take_block(size_t bytes) {
  Pool& pool = Pool::pool();
  {
    const std::lock_guard lock(pool.mutex);
    for (auto block = pool.unused.rbegin(); block != pool.unused.rend(); ++block)
      if (block->bytes == bytes) {
        void* data = block->data;
        pool.unused.erase(std::next(block).base());
        pool.bytes -= bytes;
        return data;
      }
  }
  for (bool again : {true, false}) {
    // private: a process that is forked off must not write into its parent's results
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data != MAP_FAILED) {
      ask_for_huge_pages(data, int64_t(bytes));
      return data;
    }
    if (again) release_blocks();
  }
  return nullptr;
}

void give_block_back(void* data, size_t bytes) {
  Pool& pool = Pool::pool();
  std::vector<Block> surplus;
  if (bytes > kMostKept) {
    surplus.push_back({data, bytes});
  } else {
    const std::lock_guard lock(pool.mutex);
    pool.unused.push_back({data, bytes});
    pool.bytes += bytes;
    size_t count = 0;
    for (; pool.bytes > kMostKept; ++count) pool.bytes -= pool.unused[count].bytes;
    surplus.assign(pool.unused.begin(), pool.unused.begin() + count);
    pool.unused.erase(pool.unused.begin(), pool.unused.begin() + count);
  }
  unmap(surplus);
}

size_t kept_bytes() {
  Pool& pool = Pool::pool();
  const std::lock_guard lock(pool.mutex);
  return pool.bytes;
}

void release_blocks() {
  Pool& pool = Pool::pool();
  std::vector<Block> all;
  {
    const std::lock_guard lock(pool.mutex);
    all.swap(pool.unused);
    pool.bytes = 0;
  }
  unmap(all);
}

}  // namespace fastsd
