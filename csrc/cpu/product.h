// What products of matrices are cut into.

#pragma once

#include <cstdint>

namespace fastsd {

// Columns of the packed weights that lie side by side: whole vectors of every instruction set.
constexpr int64_t kPanel = 32;

// So much of a panel's depth is multiplied with at a time: what stays in a core's own cache.
constexpr int64_t kPanelDepth = 2560;

}  // namespace fastsd
