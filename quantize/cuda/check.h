// Runs every kernel of kernels.h on a CUDA device and holds the result against its CPU twin (quantize/kernels.h).
#pragma once

#include <vector>

#include "core/kernel_check.h"

namespace kompakt::cuda {

// Devices that the CUDA runtime sees; 0 without a driver. Never throws.
int device_count();
// One entry per kernel and layout on device `index`. A kernel that cannot be launched is a failed check with CUDA's message.
std::vector<KernelCheck> check_kernels(int index);

}  // namespace kompakt::cuda
