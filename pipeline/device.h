// Which device a run uses, and what this build of kompakt stands on.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace kompakt {

// "cpu", "cuda" or "cuda:N"; of several processes "cuda" is the GPU with the number of the rank on its machine. Error when the device is not there, with the reason.
c10::Device parse_device(const std::string& text);
// What is used where no --device is given: the environment variable KOMPAKT_DEVICE, else "cpu".
std::string default_device();
bool cuda_available();
std::string torch_version();
// Threads for CPU work: OMP_NUM_THREADS when set, else this process's part of the cores.
void set_threads();

}  // namespace kompakt
