// Predictions of a classifier over a tokenized set. Forward passes only.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "data/batches.h"
#include "model/transformer.h"

namespace kompakt {

struct Predictions {
  std::vector<std::int64_t> labels;  // [N] argmax, first index wins a tie
  std::vector<float> logits;         // [N*C] in the order of the set
  std::int64_t classes = 0;
};

// Batches in order of length (no padding waste); the result is in the order of `examples`.
// `progress` (may be empty) is told the number of examples done.
Predictions predict(const Transformer& model, const TokenizedExamples& examples, std::int64_t pad, std::int64_t batch_size = 64,
                    const std::function<void(std::int64_t)>& progress = {});

// Largest absolute difference of two logit lists of equal length; infinite when one holds a NaN.
double max_difference(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace kompakt
