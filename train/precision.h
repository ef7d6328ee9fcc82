// Precision of the forward pass: float32, or bfloat16 autocast over float32 master weights.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>
#include <vector>

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

// Autocast off while it lives, inside a passage that runs under it: losses that need float32 sums and products.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace kompakt
