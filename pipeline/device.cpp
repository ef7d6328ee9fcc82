#include "pipeline/device.h"

#include <ATen/Context.h>
#include <torch/version.h>

#include <cstdlib>

#include "core/error.h"
#include "core/system.h"
#include "core/text.h"
#include "model/parallel.h"

namespace kompakt {

bool cuda_available() { return at::hasCUDA(); }

std::string torch_version() { return TORCH_VERSION; }

c10::Device parse_device(const std::string& text) {
  if (text == "cpu") return c10::Device(c10::kCPU);
  const bool any = text == "cuda";
  const auto index = starts_with(text, "cuda:") ? parse_int(text.substr(5)) : std::nullopt;
  if (!any && (!index || *index < 0 || *index > 127)) throw Error("unknown device").at("--device").given(text).allowed("cpu, cuda, cuda:N");
  if (!cuda_available()) throw Error("there is no CUDA device for this build of kompakt").at("--device").given(text).hint("run on the CPU, or see `kompakt doctor`");
  return c10::Device(c10::kCUDA, index ? static_cast<c10::DeviceIndex>(*index) : c10::DeviceIndex{0});
}

void set_threads() {
  if (!std::getenv("OMP_NUM_THREADS")) at::set_num_threads(core_count());
}

}  // namespace kompakt
