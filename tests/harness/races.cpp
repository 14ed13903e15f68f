#include "races.hpp"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

#include "image.hpp"

namespace fastsd::host {
namespace {

constexpr unsigned kWarpLanes = 32, kMaxWarps = 32;
constexpr size_t kGranule = 16;

// An access. Intervals are numbered through all launches of the process: a new one starts with each block and at each
// barrier. The clock is that of the thread's warp: it advances at each __syncwarp, for the lanes that take part.
struct Stamp {
  uint32_t interval;  // 0: there is none
  uint32_t place;     // in the library
  uint32_t thread : 10, clock : 22;

  unsigned warp() const { return thread / kWarpLanes; }
  unsigned lane() const { return thread % kWarpLanes; }
};

// What is known of a few neighbouring bytes, which are always accessed together. Of reads, only what a later write
// needs to be compared with: one by an earlier block; or, of the present interval, the first one, with all lanes of its
// warp that have read at the same time, and one by another thread, of another warp if there is any.
struct Cell {
  Stamp write;
  Stamp read, other_read;
  uint32_t lanes;
  uint16_t copies_to, copies_from;  // under way
};

struct Span {
  Memory memory;
  size_t base;     // the first address, rounded down to a granule
  uint8_t* units;  // of each granule: the log2 of the bytes of its cells
  Cell* cells;     // one for each byte, used at the first byte of each unit
};

// What a lane knows of its warp: the clocks up to which it is ordered behind the others.
struct Warp {
  uint32_t interval;  // in which the rest was set
  uint32_t clock;     // of the latest __syncwarp
  uint32_t own[kWarpLanes];
  uint32_t seen[kWarpLanes][kWarpLanes];
  uint32_t seen_of_all[kWarpLanes];  // the least of a row
};

enum class Kind { read, write };

// Cells are never cleared: the intervals of earlier launches are too old to matter. They are zero at first, and cost
// memory only where they are used.
class Cells {
 public:
  Cell* of_launch(size_t count) {
    if (count > count_) {
      clear();
      count_ = std::max(count, size_t{1} << 24);
      void* memory = mmap(nullptr, count_ * sizeof(Cell), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        count_ = 0;
        throw std::bad_alloc();
      }
      cells_ = static_cast<Cell*>(memory);
    }
    return cells_;
  }
  void clear() {
    if (count_) munmap(cells_, count_ * sizeof(Cell));
    count_ = 0;
  }

 private:
  Cell* cells_ = nullptr;
  size_t count_ = 0;
};

// ---- the state of a launch

const char* stack;  // of the thread that runs
size_t stack_bytes;
unsigned thread, warp, lane;

uint32_t interval, first_of_launch, first_of_block;
std::vector<std::pair<uint32_t, size_t>> blocks;  // the first interval of each, and its number
Warp warps[kMaxWarps];

std::vector<Span> spans;
unsigned char hints[256];  // the span that an instruction touched last, by its place
const char* library;
std::string library_path;
Cells cells;
std::vector<uint8_t> units;

uint32_t own_clock() {
  return warps[warp].interval == interval ? warps[warp].own[lane] : 1;
}

Stamp now(uint32_t place) {
  return {interval, place, thread, own_clock()};
}

uint32_t place_of(const void* address) {
  // within the call, and not behind it, where another line may start
  return static_cast<uint32_t>(static_cast<const char*>(address) - library - 1);
}

// Whether the present thread is ordered behind another lane's access in the same interval.
bool is_seen(unsigned other_lane, uint32_t clock) {
  const Warp& own = warps[warp];
  return own.interval == interval && (clock <= own.seen_of_all[lane] || clock <= own.seen[lane][other_lane]);
}

// ---- reports

std::string line(uint32_t place) {
  return line_of(library_path, place);
}

std::string name_of(unsigned other, uint32_t at) {
  std::string name = "thread " + std::to_string(other);
  if (at >= first_of_block) return name;
  const auto next = std::upper_bound(blocks.begin(), blocks.end(), std::make_pair(at, ~size_t{0}));
  return name + " of block " + std::to_string(std::prev(next)->second);
}

[[noreturn]] void report_race(const Span& span, size_t address, size_t bytes, Kind kind, uint32_t place,
                              const Stamp& before, Kind kind_before, bool under_way) {
  stop([=, &span, self = thread] {
    const size_t first = address - reinterpret_cast<size_t>(span.memory.first);
    std::string message = "race on bytes " + std::to_string(first) + " to " + std::to_string(first + bytes - 1) +
                          " of " + span.memory.name + ": thread " + std::to_string(self) +
                          (kind == Kind::write ? " writes" : " reads") + " in " + line(place) + "; ";
    if (under_way) {
      const auto [copy, owner] = copy_under_way(address, bytes, kind_before == Kind::write);
      return message + "the asynchronous copy " + (kind_before == Kind::write ? "to" : "from") + " there that thread " +
             std::to_string(owner) + " started in " + line(place_of(copy->place)) + " is under way";
    }
    message += name_of(before.thread, before.interval) + (kind_before == Kind::write ? " wrote" : " read") + " in " +
               line(before.place);
    if (before.interval < first_of_block) return message + "; blocks are not ordered";
    return message + ", and " +
           (before.thread / kWarpLanes == self / kWarpLanes ? "no __syncwarp or __syncthreads" : "no __syncthreads") +
           " is between";
  });
}

[[noreturn]] void report_outside(const void* address, size_t bytes, Kind kind, uint32_t place) {
  stop([=, self = thread] {
    std::string message = "thread " + std::to_string(self) + (kind == Kind::write ? " writes " : " reads ") +
                          std::to_string(bytes) + " bytes outside every tensor and shared memory in " + line(place);
    // the nearest memory before or behind says what the index was meant for
    const Span* nearest = nullptr;
    size_t least = 4096;
    for (const Span& span : spans) {
      const size_t first = reinterpret_cast<size_t>(span.memory.first), at = reinterpret_cast<size_t>(address);
      const size_t distance = at < first ? first - at : at - std::min(at, first + span.memory.bytes);
      if (distance < least) {
        least = distance;
        nearest = &span;
      }
    }
    if (!nearest) return message;
    const auto offset = static_cast<const char*>(address) - nearest->memory.first;
    return message + ": byte " + std::to_string(offset) + " of " + nearest->memory.name + ", which has " +
           std::to_string(nearest->memory.bytes);
  });
}

// ---- the check

bool holds(const Span& span, size_t address, size_t bytes) {
  const size_t offset = address - reinterpret_cast<size_t>(span.memory.first);
  return offset < span.memory.bytes && bytes <= span.memory.bytes - offset;
}

// Null for what is read of the library's own constants.
const Span* find(const void* at, size_t bytes, Kind kind, uint32_t place) {
  const size_t address = reinterpret_cast<size_t>(at);
  unsigned char& hint = hints[place / 4 % 256];
  if (hint < spans.size() && holds(spans[hint], address, bytes)) return &spans[hint];
  for (size_t i = 0; i < spans.size(); ++i) {
    if (!holds(spans[i], address, bytes)) continue;
    hint = static_cast<unsigned char>(i);
    return &spans[i];
  }
  if (kind == Kind::read && is_constant(library, address)) return nullptr;
  report_outside(at, bytes, kind, place);
}

struct Access {
  const Span& span;
  size_t address, bytes;  // the whole of it
  Kind kind;
  Stamp stamp;

  [[noreturn]] void races_with(const Stamp& before, Kind kind_before, bool under_way = false) const {
    report_race(span, address, bytes, kind, stamp.place, before, kind_before, under_way);
  }
};

void check_write_before(const Access& access, const Cell& cell, uint32_t since) {
  if (cell.copies_to) access.races_with(cell.write, Kind::write, true);
  const Stamp& before = cell.write;
  if (before.interval < since) return;
  if (before.interval < first_of_block) access.races_with(before, Kind::write);
  if (before.interval < interval || before.thread == thread) return;
  if (before.warp() != warp || !is_seen(before.lane(), before.clock)) access.races_with(before, Kind::write);
}

void check_reads_before(const Access& access, const Cell& cell, uint32_t since) {
  if (cell.copies_from) access.races_with(cell.read, Kind::read, true);
  if (cell.read.interval < since) return;
  if (cell.read.interval < first_of_block) access.races_with(cell.read, Kind::read);
  if (cell.read.interval < interval) return;
  if (cell.read.warp() != warp) access.races_with(cell.read, Kind::read);
  const bool has_other = cell.other_read.interval == interval;
  if (has_other && cell.other_read.warp() != warp) access.races_with(cell.other_read, Kind::read);
  for (const Stamp* before : {&cell.read, &cell.other_read}) {
    if (before == &cell.other_read && !has_other) break;
    if (before->thread != thread && !is_seen(before->lane(), before->clock)) access.races_with(*before, Kind::read);
  }
  uint32_t others = cell.lanes & ~(1u << lane);
  for (; others; others &= others - 1) {
    Stamp before = has_other ? cell.other_read : cell.read;
    before.thread = warp * kWarpLanes + static_cast<unsigned>(__builtin_ctz(others));
    if (!is_seen(before.lane(), before.clock)) access.races_with(before, Kind::read);
  }
}

void note_read(Cell& cell, const Stamp& stamp, uint32_t since) {
  Stamp& read = cell.read;
  // who writes now races with this one already
  if (read.interval >= since && read.interval < first_of_block) return;
  const auto start_anew = [&] {
    read = stamp;
    cell.other_read.interval = 0;
    cell.lanes = 1u << lane;
  };
  if (read.interval != interval || read.interval < since) return start_anew();
  const bool has_other = cell.other_read.interval == interval;
  if (has_other && cell.other_read.warp() != read.warp()) return;
  if (read.warp() != warp) {
    cell.other_read = stamp;
    return;
  }
  // all that have read are ordered before this one: who is ordered behind it is so behind them
  if (cell.lanes == 1u << lane) return start_anew();
  const uint32_t latest = has_other ? std::max<uint32_t>(read.clock, cell.other_read.clock) : read.clock;
  if (warps[warp].interval == interval && latest <= warps[warp].seen_of_all[lane]) return start_anew();
  if (read.thread != thread) {
    cell.other_read = stamp;
    cell.other_read.clock = std::max<uint32_t>(stamp.clock, latest);
  }
  cell.lanes |= 1u << lane;
}

// Cells of `unit` bytes, a log2, in place of larger ones.
void refine(const Span& span, size_t granule, unsigned unit) {
  Cell* cells = span.cells + granule * kGranule;
  const size_t before = size_t{1} << span.units[granule], after = size_t{1} << unit;
  for (size_t first = 0; first < kGranule; first += before) {
    for (size_t i = after; i < before; i += after) cells[first + i] = cells[first];
  }
  span.units[granule] = static_cast<uint8_t>(unit);
}

template <class Function>
void for_each_cell(const Span& span, size_t address, size_t bytes, Function function) {
  const size_t first = address - span.base, end = first + bytes;
  for (size_t at = first; at < end;) {
    const size_t granule = at / kGranule, stop = std::min(end, (granule + 1) * kGranule);
    const unsigned fits = static_cast<unsigned>(__builtin_ctzll(at | stop | kGranule));
    if (fits < span.units[granule]) refine(span, granule, fits);
    const size_t unit = size_t{1} << span.units[granule];
    for (; at < stop; at += unit) function(span.cells[at]);
  }
}

uint32_t since(const Span& span) {
  return span.memory.shared ? first_of_block : first_of_launch;
}

void check(const void* address, size_t bytes, Kind kind, uint32_t place) {
  const Span* span = find(address, bytes, kind, place);
  if (!span) return;
  const Access access{*span, reinterpret_cast<size_t>(address), bytes, kind, now(place)};
  const uint32_t oldest = since(*span);
  for_each_cell(*span, access.address, bytes, [&](Cell& cell) {
    check_write_before(access, cell, oldest);
    if (kind == Kind::write) {
      check_reads_before(access, cell, oldest);
      cell.write = access.stamp;
      cell.read.interval = 0;
    } else {
      note_read(cell, access.stamp, oldest);
    }
  });
}

inline void watch(const void* address, size_t bytes, Kind kind, const void* called_from) {
  if (static_cast<size_t>(static_cast<const char*>(address) - stack) < stack_bytes || !bytes) return;
  check(address, bytes, kind, place_of(called_from));
}

}  // namespace

void watch_launch(std::vector<Memory> memory, const void* in_library) {
#ifdef __SANITIZE_ADDRESS__
  return;  // which watches instead
#endif
  Dl_info image;
  if (!dladdr(in_library, &image)) throw std::runtime_error("the library of kernels is not found in memory");
  library = static_cast<const char*>(image.dli_fbase);
  library_path = image.dli_fname;
  std::memset(hints, 0, sizeof(hints));
  blocks.clear();
  first_of_launch = interval + 1;

  // tensors may share a storage, or storages their memory
  std::sort(memory.begin(), memory.end(), [](const Memory& a, const Memory& b) { return a.first < b.first; });
  spans.clear();
  for (Memory& next : memory) {
    if (!next.bytes) continue;
    if (!spans.empty() && !next.shared) {
      Memory& last = spans.back().memory;
      if (!last.shared && next.first < last.first + last.bytes) {
        last.bytes = std::max(last.bytes, static_cast<size_t>(next.first - last.first) + next.bytes);
        continue;
      }
    }
    spans.push_back({std::move(next), 0, nullptr, nullptr});
  }
  size_t granules = 0;
  for (Span& span : spans) {
    span.base = reinterpret_cast<size_t>(span.memory.first) / kGranule * kGranule;
    granules += span.memory.bytes / kGranule + 2;
  }
  units.assign(granules, __builtin_ctz(kGranule));
  Cell* next_cell = cells.of_launch(granules * kGranule);
  uint8_t* next_unit = units.data();
  for (Span& span : spans) {
    span.cells = next_cell;
    span.units = next_unit;
    next_unit += span.memory.bytes / kGranule + 2;
    next_cell += (span.memory.bytes / kGranule + 2) * kGranule;
  }
}

void watch_block(size_t block) {
  first_of_block = ++interval;
  blocks.emplace_back(interval, block);
}

void watch_thread(unsigned running, const char* its_stack, size_t bytes) {
  thread = running;
  warp = running / kWarpLanes;
  lane = running % kWarpLanes;
  stack = its_stack;
  stack_bytes = bytes;
}

void watch_syncthreads() {
  ++interval;
}

// Everything that the lanes of the mask did, or had seen, is now ordered before what any of them does.
void watch_syncwarp(unsigned of_warp, unsigned mask) {
  Warp& own = warps[of_warp];
  if (own.interval != interval) {
    own.interval = interval;
    own.clock = 1;
    std::fill(std::begin(own.own), std::end(own.own), 1);
    std::memset(own.seen, 0, sizeof(own.seen));
    std::memset(own.seen_of_all, 0, sizeof(own.seen_of_all));
  }
  uint32_t joined[kWarpLanes] = {};
  for (unsigned member = 0; member < kWarpLanes; ++member) {
    if (!(mask >> member & 1)) continue;
    for (unsigned i = 0; i < kWarpLanes; ++i) joined[i] = std::max(joined[i], own.seen[member][i]);
  }
  for (unsigned member = 0; member < kWarpLanes; ++member) {
    if (mask >> member & 1) joined[member] = own.clock;
  }
  const uint32_t least = *std::min_element(std::begin(joined), std::end(joined));
  ++own.clock;
  for (unsigned member = 0; member < kWarpLanes; ++member) {
    if (!(mask >> member & 1)) continue;
    own.own[member] = own.clock;
    own.seen_of_all[member] = least;
    std::memcpy(own.seen[member], joined, sizeof(joined));
  }
}

void watch_copy_start(const Copy& copy) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  const uint32_t place = place_of(copy.place);
  if (copy.valid) {
    check(copy.from, copy.bytes, Kind::read, place);
    if (const Span* span = find(copy.from, copy.bytes, Kind::read, place)) {
      for_each_cell(*span, reinterpret_cast<size_t>(copy.from), copy.bytes, [](Cell& cell) { ++cell.copies_from; });
    }
  }
  check(copy.to, copy.bytes, Kind::write, place);
  const Span* span = find(copy.to, copy.bytes, Kind::write, place);
  for_each_cell(*span, reinterpret_cast<size_t>(copy.to), copy.bytes, [](Cell& cell) { ++cell.copies_to; });
}

void watch_copy_end(const Copy& copy) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  const uint32_t place = place_of(copy.place);
  const Span* span = find(copy.to, copy.bytes, Kind::write, place);
  for_each_cell(*span, reinterpret_cast<size_t>(copy.to), copy.bytes, [&](Cell& cell) {
    --cell.copies_to;
    cell.write = now(place);
  });
  if (!copy.valid) return;
  span = find(copy.from, copy.bytes, Kind::read, place);
  if (!span) return;
  for_each_cell(*span, reinterpret_cast<size_t>(copy.from), copy.bytes, [&](Cell& cell) {
    --cell.copies_from;
    note_read(cell, now(place), since(*span));
  });
}

void watch_abandoned() {
  cells.clear();
}

}  // namespace fastsd::host

// ---- what -fsanitize=thread calls

using fastsd::host::Kind;

#define FASTSD_WATCH(name, kind, bytes)                                           \
  extern "C" void name(void* address) {                                           \
    fastsd::host::watch(address, bytes, Kind::kind, __builtin_return_address(0)); \
  }
#define FASTSD_WATCH_RANGE(name, kind)                                            \
  extern "C" void name(void* address, size_t bytes) {                             \
    fastsd::host::watch(address, bytes, Kind::kind, __builtin_return_address(0)); \
  }
#define FASTSD_WATCH_BLOCK(name, function)                          \
  extern "C" void* name(void* to, const void* from, size_t bytes) { \
    const void* caller = __builtin_return_address(0);               \
    fastsd::host::watch(from, bytes, Kind::read, caller);           \
    fastsd::host::watch(to, bytes, Kind::write, caller);            \
    return function(to, from, bytes);                               \
  }

FASTSD_WATCH(__tsan_read1, read, 1)
FASTSD_WATCH(__tsan_read2, read, 2)
FASTSD_WATCH(__tsan_read4, read, 4)
FASTSD_WATCH(__tsan_read8, read, 8)
FASTSD_WATCH(__tsan_read16, read, 16)
FASTSD_WATCH(__tsan_write1, write, 1)
FASTSD_WATCH(__tsan_write2, write, 2)
FASTSD_WATCH(__tsan_write4, write, 4)
FASTSD_WATCH(__tsan_write8, write, 8)
FASTSD_WATCH(__tsan_write16, write, 16)
FASTSD_WATCH(__tsan_unaligned_read2, read, 2)
FASTSD_WATCH(__tsan_unaligned_read4, read, 4)
FASTSD_WATCH(__tsan_unaligned_read8, read, 8)
FASTSD_WATCH(__tsan_unaligned_read16, read, 16)
FASTSD_WATCH(__tsan_unaligned_write2, write, 2)
FASTSD_WATCH(__tsan_unaligned_write4, write, 4)
FASTSD_WATCH(__tsan_unaligned_write8, write, 8)
FASTSD_WATCH(__tsan_unaligned_write16, write, 16)
FASTSD_WATCH_RANGE(__tsan_read_range, read)
FASTSD_WATCH_RANGE(__tsan_write_range, write)
extern "C" void __tsan_init() {}

// ---- what the linker puts in place of these functions, whose accesses are not in the kernel's code

FASTSD_WATCH_BLOCK(__wrap_memcpy, std::memcpy)
FASTSD_WATCH_BLOCK(__wrap_memmove, std::memmove)
extern "C" void* __wrap_memset(void* to, int value, size_t bytes) {
  fastsd::host::watch(to, bytes, Kind::write, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}
