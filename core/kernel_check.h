// What the self test of one CUDA kernel found (`kompakt doctor`).
#pragma once

#include <string>

namespace kompakt::cuda {

struct KernelCheck {
  std::string kernel;
  bool passed = false;
  std::string note;  // device, or what differed
};

}  // namespace kompakt::cuda
