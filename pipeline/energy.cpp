// NVML is loaded when a run is on a GPU, not linked: the library belongs to the driver, and machines without one have none.
#include "pipeline/energy.h"

#include <dlfcn.h>

#include "core/text.h"

namespace kompakt {

// Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules; Volta and newer).
EnergyReading read_energy(c10::Device device) {
  if (!device.is_cuda()) return {std::nullopt, "energy is measured on a GPU only"};
  using NvmlDevice = struct nvmlDevice_st*;
  static void* const library = ::dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return {std::nullopt, "the GPU's energy counter is read through NVML, which is not installed"};
  const auto start = reinterpret_cast<int (*)()>(::dlsym(library, "nvmlInit_v2"));
  const auto count = reinterpret_cast<int (*)(unsigned*)>(::dlsym(library, "nvmlDeviceGetCount_v2"));
  const auto handle = reinterpret_cast<int (*)(unsigned, NvmlDevice*)>(::dlsym(library, "nvmlDeviceGetHandleByIndex_v2"));
  const auto energy = reinterpret_cast<int (*)(NvmlDevice, unsigned long long*)>(::dlsym(library, "nvmlDeviceGetTotalEnergyConsumption"));
  if (!start || !count || !handle || !energy) return {std::nullopt, "this NVML has no energy counter"};
  static const bool ready = start() == 0;
  unsigned gpus = 0;
  if (!ready || count(&gpus) != 0) return {std::nullopt, "NVML could not be started"};
  if (gpus != 1) return {std::nullopt, str("the machine has ", gpus, " GPUs: NVML's order of them may not be CUDA's")};
  NvmlDevice gpu = nullptr;
  unsigned long long millijoules = 0;
  if (handle(0, &gpu) != 0 || energy(gpu, &millijoules) != 0) return {std::nullopt, "the GPU has no energy counter"};
  return {static_cast<double>(millijoules) / 1000, {}};
}

}  // namespace kompakt
