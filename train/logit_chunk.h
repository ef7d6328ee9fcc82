// How many tokens' logits exist at a time, where a loss over a large vocabulary is computed in chunks of tokens.
#pragma once

#include <c10/core/DeviceType.h>

#include <cstdint>

namespace kompakt {

// `sides`: 1 = the logits of one model (cross entropy), 2 = of student and teacher. Chunks change the order of sums and nothing else.
//
// CPU: what a chunk's logits occupy stays near the third-level cache of a server's core complex, and rows beyond a thousand gain a product
// nothing. The figures are fixed rather than asked of the machine: the last bits of a training would otherwise depend on its caches.
// CUDA: products want as many rows as they can get, and memory is the limit: a budget of bytes.
std::int64_t logit_chunk(c10::DeviceType device, std::int64_t vocabulary, int sides);

}  // namespace kompakt
