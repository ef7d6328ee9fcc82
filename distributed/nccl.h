// The transport between GPUs, where it was compiled in.
#pragma once

#include <c10/core/Device.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

#include "core/launch.h"

namespace kompakt {

// Error when kompakt was built without it.
c10::intrusive_ptr<c10d::Backend> nccl_group(const c10::intrusive_ptr<c10d::Store>& store, const Launch& launch, c10::Device device, std::chrono::milliseconds timeout);

}  // namespace kompakt
