// Ends every library of kernels: where its static shared memory lies.
#pragma once

#include <cstddef>

#include "kernel_table.hpp"

// set by the linker; null in a library that has no such section
extern "C" char __start_fastsd_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_fastsd_shared[] __attribute__((weak, visibility("hidden")));

extern "C" fastsd::host::Bytes fastsd_static_shared() {
  return {__start_fastsd_shared, static_cast<size_t>(__stop_fastsd_shared - __start_fastsd_shared)};
}
