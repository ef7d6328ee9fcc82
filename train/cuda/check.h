// Runs the kernels of row_losses.h on a CUDA device and holds the results against their CPU twins (train/row_losses.h).
#pragma once

#include <vector>

#include "core/kernel_check.h"

namespace kompakt::cuda {

// One entry per result of every case on device `index`. A kernel that cannot be launched is a failed check with CUDA's message.
std::vector<KernelCheck> check_row_kernels(int index);

}  // namespace kompakt::cuda
