// Some layers of a transformer: the others are removed, those that stay are numbered anew.
#pragma once

#include <cstdint>
#include <vector>

#include "model/transformer.h"

namespace kompakt {

// `keep`: rising layer numbers. Blocks, per-layer lists of the config (sliding windows, rotary pattern) and parameter names
// follow, so that the result is a plain model of the family with fewer layers. std::logic_error for layers that do not exist.
void keep_blocks(Transformer& model, const std::vector<std::int64_t>& keep);

}  // namespace kompakt
