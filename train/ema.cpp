#include "train/ema.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace kompakt {

EmaWeights::EmaWeights(NamedTensors weights, double decay) : weights_(std::move(weights)), decay_(decay) {
  if (!active()) weights_.clear();
  for (const auto& [name, value] : weights_) means_.emplace_back("ema." + name, value.detach().clone());
}

void EmaWeights::update(std::int64_t step) {
  const at::NoGradGuard no_grad;
  const double t = static_cast<double>(step), decay = std::min(decay_, (1 + t) / (10 + t));
  for (std::size_t i = 0; i < means_.size(); ++i) means_[i].second.lerp_(weights_[i].second, 1 - decay);
}

void EmaWeights::swap() {
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < means_.size(); ++i) {
    const at::Tensor weight = weights_[i].second.detach().clone();
    weights_[i].second.copy_(means_[i].second);
    means_[i].second.copy_(weight);
  }
}

NamedTensors EmaWeights::state() const { return means_; }

}  // namespace kompakt
