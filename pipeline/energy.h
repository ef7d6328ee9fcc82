// Energy that the GPU took, by NVML's counter.
#pragma once

#include <c10/core/Device.h>

#include <optional>
#include <string>

namespace kompakt {

struct EnergyReading {
  std::optional<double> joules;  // since the driver was loaded: the difference of two readings means something
  std::string missing;           // why there is none
};

// NVML counts the whole GPU, other programs on it included. With several GPUs in the machine it is not read, since their order may differ
// from CUDA's. The processor is left out: its counters (RAPL) begin anew every half hour or so under load, and most systems keep them from
// ordinary users.
EnergyReading read_energy(c10::Device device);

}  // namespace kompakt
