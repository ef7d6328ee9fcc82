// Which precision a device is trained in, and the guard that switches autocast on.
#include "train/precision.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <fstream>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

// The kernel's own list: the same on every version of the library.
bool precision_cpu_has_bf16() {
  static const bool found = [] {
    std::ifstream in("/proc/cpuinfo");
    for (std::string line; std::getline(in, line);) {
      if (!starts_with(line, "flags") && !starts_with(line, "Features")) continue;
      for (const std::string& flag : split(line, ' ')) {
        if (flag == "avx512_bf16" || flag == "amx_bf16" || flag == "bf16") return true;
      }
      return false;
    }
    return false;
  }();
  return found;
}

}  // namespace

std::vector<std::string> precision_names() { return {"auto", "float32", "bf16"}; }

bool use_bf16(const std::string& precision, c10::Device device) {
  if (precision == "float32") return false;
  if (precision == "bf16") return true;
  if (precision == "auto") return device.is_cuda() || (device.is_cpu() && precision_cpu_has_bf16());
  throw Error(str("unknown precision \"", precision, "\"")).at("precision").given(precision).allowed(join(precision_names(), ", "));
}

AutocastGuard::AutocastGuard(c10::Device device, bool bf16) : type_(device.type()), active_(bf16) {
  if (!active_) return;
  before_ = at::autocast::is_autocast_enabled(type_);
  at::autocast::set_autocast_dtype(type_, at::kBFloat16);
  at::autocast::set_autocast_enabled(type_, true);
  at::autocast::increment_nesting();
}

AutocastGuard::~AutocastGuard() {
  if (!active_) return;
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(type_, before_);
}

RoundedWeights::RoundedWeights(const std::vector<Linear*>& linears) {
  for (Linear* linear : linears)
    if (!linear->transform) held_.emplace_back(linear, linear->weight.detach().to(at::kBFloat16));
  for (auto& [linear, weight] : held_) std::swap(linear->weight, weight);  // when nothing can fail any more
}

RoundedWeights::~RoundedWeights() {
  for (auto& [linear, weight] : held_) std::swap(linear->weight, weight);
}

}  // namespace kompakt
