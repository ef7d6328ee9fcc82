// Memory and time of a device other than the CPU, through LibTorch's own accelerator interface: no CUDA header is needed, and a build
// without CUDA compiles it too.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <optional>

namespace kompakt {

// Most bytes that LibTorch's allocator had taken from the device since the last reset (what other libraries take there is not in it).
// Nothing on the CPU: core/system.h has the process's own memory.
std::optional<std::int64_t> device_peak_memory_bytes(c10::Device device);
// Bytes of tensors on the device now.
std::optional<std::int64_t> device_memory_bytes(c10::Device device);
// Gives what is free in the allocator's cache back to the device, then starts a new peak. Does nothing on the CPU.
void reset_device_peak_memory(c10::Device device);
// Waits until the device has done all that was asked of it: a clock read before that measures the asking alone. Does nothing on the CPU.
void wait_for_device(c10::Device device);

}  // namespace kompakt
