#include "pipeline/device.h"

#include <ATen/Context.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdlib>

#include "core/error.h"
#include "core/launch.h"
#include "core/system.h"
#include "core/text.h"
#include "model/parallel.h"

namespace kompakt {

bool cuda_available() { return at::hasCUDA(); }

std::string torch_version() { return TORCH_VERSION; }

std::string default_device() {
  const char* chosen = std::getenv("KOMPAKT_DEVICE");
  return chosen && *chosen ? chosen : "cpu";
}

c10::Device parse_device(const std::string& text) {
  if (text == "cpu") return c10::Device(c10::kCPU);
  const bool any = text == "cuda";
  const std::int64_t index = any ? 0 : starts_with(text, "cuda:") ? parse_int(text.substr(5)).value_or(-1) : -1;
  if (index < 0 || index > 127) throw Error("unknown device").at("--device").given(text).allowed("cpu, cuda, cuda:N");
  if (!cuda_available()) throw Error("there is no CUDA device for this build of kompakt").at("--device").given(text).hint("run on the CPU, or see `kompakt doctor`");
  const Launch& launch = this_launch();
  if (!launch.alone() && !any) throw Error("several ranks cannot share one GPU").at("--device").given(text).allowed("cuda: each rank takes the GPU with its number on the machine");
  const std::int64_t number = launch.alone() ? index : launch.local_rank, gpus = static_cast<std::int64_t>(at::getNumGPUs());
  if (number >= gpus) throw Error(str("there is no GPU with number ", number, ": this process sees ", gpus)).at("--device").given(text).hint(launch.alone() ? "numbers start at 0" : "start at most as many ranks on a machine as it has GPUs");
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(number));
}

void set_threads() {
  if (!std::getenv("OMP_NUM_THREADS")) at::set_num_threads(std::max(1, core_count() / this_launch().local_world));
}

}  // namespace kompakt
