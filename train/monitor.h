// Watches a training from outside: scores what would be deployed, remembers the best, ends it early.
#pragma once

#include <cstdint>

#include "core/json.h"
#include "model/transformer.h"

namespace kompakt {

class TrainMonitor {
 public:
  virtual ~TrainMonitor() = default;
  // `step` of `steps` is done (from 1); constraints are attached, so that the model computes what would be deployed.
  virtual void after_step(Transformer& model, std::int64_t step, std::int64_t steps) = 0;
  virtual bool enough() const { return false; }  // true: no further step
  // Saved with the loop's state and given back before a resumed run goes on.
  virtual Json save() const = 0;
  virtual void restore(const Json& saved) = 0;
};

}  // namespace kompakt
