// Generated texts in place of the data's: what the loop asks before the batches of a step are used.
#pragma once

#include <cstdint>
#include <vector>

#include "core/json.h"
#include "data/batches.h"

namespace kompakt {

class Transformer;

class BatchSampler {
 public:
  virtual ~BatchSampler() = default;
  // May replace any of the micro batches of `step` (from 0) by texts that were generated for its rows. A function of the model's weights,
  // step and rows alone, so that a resumed run sees the same texts.
  virtual void sample(const Transformer& model, std::int64_t step, std::vector<TokenBatch>& batches) = 0;
  virtual Json identity() const = 0;  // what a saved state depends on
};

}  // namespace kompakt
