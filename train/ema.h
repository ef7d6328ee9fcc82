// Running mean of the weights over the steps (Polyak averaging with exponential weights): what a training ends with when asked to.
#pragma once

#include <cstdint>

#include "train/state.h"

namespace kompakt {

class EmaWeights {
 public:
  // `weights` share memory with the model. decay in [0, 1); 0 = off: nothing is kept.
  EmaWeights(NamedTensors weights, double decay);
  bool active() const { return decay_ > 0; }
  // mean += (1 - d) (weight - mean) with d = min(decay, (1 + step) / (10 + step)), so that the first steps do not linger; step from 1.
  void update(std::int64_t step);
  void swap();  // exchanges weights and means; twice = nothing
  NamedTensors state() const;  // "ema.<name>", sharing memory

 private:
  NamedTensors weights_, means_;
  double decay_;
};

}  // namespace kompakt
