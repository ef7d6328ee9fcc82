// The divergence of a model from what it was before, on a few calibration tokens. Keeps final hidden states and the head, not a
// second model.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "train/calibration.h"

namespace kompakt {

class BudgetProbe {
 public:
  // Remembers the predictions of `model` as it is. `set` must outlive the probe.
  BudgetProbe(const Transformer& model, const CalibrationSet& set);
  // Mean KL(before || now) in nats per prediction. `rows`: ids of the vocabulary that will stay (rising), undefined = all: what
  // is compared then are the distributions over those, and what the smaller vocabulary itself costs, -log of the probability
  // that the kept ids had, is added.
  double divergence(const Transformer& model, const at::Tensor& rows = {}) const;

 private:
  std::vector<at::Tensor> features(const Transformer& model) const;  // per batch [n, d]: what the head reads
  const CalibrationSet& set_;
  std::vector<at::Tensor> before_;
  at::Tensor weight_, bias_;
};

}  // namespace kompakt
