// What the weights must obey while they train: masks, fake quantization. Two hooks, no more.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/transformer.h"

namespace kompakt {

class Constraint {
 public:
  virtual ~Constraint() = default;
  virtual std::string name() const = 0;
  virtual void attach(Transformer& model) = 0;                   // installs weight transforms; a classifier's token embedding is compacted to the used rows then
  virtual void detach(Transformer& model) = 0;                   // removes them; masters keep their values
  virtual void before_forward(Transformer& model, std::int64_t step, std::int64_t steps) { (void)model, (void)step, (void)steps; }
  virtual void after_step(Transformer& model) { (void)model; }   // e.g. set pruned weights to zero again
  // Extra trainable tensors (learned scales): trained at learning_rate x parameter_rate() without decay, saved with the state.
  virtual std::vector<std::pair<std::string, at::Tensor>> parameters() { return {}; }
  virtual double parameter_rate() const { return 1; }
};

}  // namespace kompakt
