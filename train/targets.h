// What a batch asks of the model: next tokens of text, and how many predictions count.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "data/batches.h"

namespace kompakt {

constexpr std::int64_t no_target = -100;  // PyTorch's ignore_index

// [rows*columns]: the token that position t should predict, or no_target at the end of a row, of a document, in padding and
// where that token belongs to a prompt.
std::vector<std::int64_t> next_tokens(const TokenBatch& batch);

// Examples of a classification batch, predictable positions of text: the weight of a micro batch in its step.
std::int64_t count_targets(const TokenBatch& batch);

}  // namespace kompakt
