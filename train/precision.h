// Precision of the forward pass: float32, or bfloat16 autocast over float32 master weights.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>
#include <utility>
#include <vector>

#include "model/linear.h"

namespace kompakt {

std::vector<std::string> precision_names();  // auto, float32, bf16

// True when bf16 is used: `auto` = the device multiplies bf16 faster than float32 (CPU with AVX512_BF16, AMX or the Arm bf16
// instructions; any CUDA device). An explicit "bf16" works everywhere, only not faster.
bool use_bf16(const std::string& precision, c10::Device device);

// Autocast for the lifetime of the object. The cache of cast weights dies with it, so one guard spans forward passes
// between two weight updates and never more.
class AutocastGuard {
 public:
  AutocastGuard(c10::Device device, bool bf16);
  ~AutocastGuard();
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  c10::DeviceType type_;
  bool active_, before_ = false;
};

// While it lives, the weights of these linears are bfloat16: cast once, not by every pass that runs under autocast without gradients.
// Those with a transform stay, which autocast sees to.
class RoundedWeights {
 public:
  explicit RoundedWeights(const std::vector<Linear*>& linears);
  ~RoundedWeights();
  RoundedWeights(const RoundedWeights&) = delete;
  RoundedWeights& operator=(const RoundedWeights&) = delete;

 private:
  std::vector<std::pair<Linear*, at::Tensor>> held_;
};

// Autocast off while it lives, inside a passage that runs under it: losses that need float32 sums and products.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace kompakt
