// Token batches and windows to the tensors that a forward pass takes.
#pragma once

#include "data/batches.h"
#include "model/transformer.h"

namespace kompakt {

// Lengths are left out when no row is padded: the mask costs time.
ModelInput batch_input(const TokenBatch& batch, c10::Device device);
// Windows of equal length -> [windows, length].
ModelInput window_input(const std::vector<std::vector<std::int64_t>>& windows, std::size_t first, std::size_t count, c10::Device device);

}  // namespace kompakt
