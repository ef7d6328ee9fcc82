// What a CPU has none of: memory of its own and work that goes on behind the caller's back.
#include "model/device_memory.h"

#include <catch2/catch.hpp>

using namespace kompakt;

TEST_CASE("the CPU and the meta device have no memory of their own", "[device]") {
  for (const c10::Device device : {c10::Device(c10::kCPU), c10::Device(c10::kMeta)}) {
    CHECK_FALSE(device_peak_memory_bytes(device));
    CHECK_FALSE(device_memory_bytes(device));
    reset_device_peak_memory(device);
    wait_for_device(device);
  }
}
