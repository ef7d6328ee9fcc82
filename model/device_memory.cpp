#include "model/device_memory.h"

#include <ATen/DeviceAccelerator.h>
#include <c10/core/CachingDeviceAllocator.h>

namespace kompakt {
namespace {

// The device's allocator, or null: on the CPU, the meta device, and before anything was put on the device.
c10::DeviceAllocator* device_allocator(c10::Device device) {
  if (device.is_cpu() || device.is_meta()) return nullptr;
  auto* allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
  return allocator && allocator->initialized() ? allocator : nullptr;
}

constexpr auto all_pools = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);

c10::DeviceIndex device_index(c10::Device device) { return device.has_index() ? device.index() : c10::DeviceIndex{0}; }

}  // namespace

std::optional<std::int64_t> device_peak_memory_bytes(c10::Device device) {
  c10::DeviceAllocator* allocator = device_allocator(device);
  if (!allocator) return std::nullopt;
  return allocator->getDeviceStats(device_index(device)).reserved_bytes[all_pools].peak;
}

std::optional<std::int64_t> device_memory_bytes(c10::Device device) {
  c10::DeviceAllocator* allocator = device_allocator(device);
  if (!allocator) return std::nullopt;
  return allocator->getDeviceStats(device_index(device)).allocated_bytes[all_pools].current;
}

void reset_device_peak_memory(c10::Device device) {
  if (c10::DeviceAllocator* allocator = device_allocator(device)) {
    allocator->emptyCache();
    allocator->resetPeakStats(device_index(device));
  }
}

void wait_for_device(c10::Device device) {
  if (!device.is_cpu() && !device.is_meta()) at::accelerator::synchronizeDevice(device_index(device));
}

}  // namespace kompakt
