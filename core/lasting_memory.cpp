#include "core/lasting_memory.h"

#include <cstdlib>  // which says whether this is glibc
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "core/system.h"

namespace kompakt {
namespace {

// Sizes from which a block is a mapping of its own: what glibc adapts itself to at most, and what it starts with.
int memory_users = 0;  // ReusedMemory that live

[[maybe_unused]] constexpr int memory_common = 32 << 20, memory_apart = 128 << 10;

void memory_sizes([[maybe_unused]] int apart_from, [[maybe_unused]] int kept) {
#ifdef __GLIBC__
  ::mallopt(M_MMAP_THRESHOLD, apart_from);
  ::mallopt(M_TRIM_THRESHOLD, kept);
#endif
}

}  // namespace

ReusedMemory::ReusedMemory() {
  ++memory_users;
  memory_sizes(memory_common, 1 << 30);
}
ReusedMemory::~ReusedMemory() {
  --memory_users;
  memory_sizes(memory_common, 2 * memory_common);
  release_free_memory();
}
ReusedMemory::Lasting::Lasting() {
  if (memory_users > 0) memory_sizes(memory_apart, 1 << 30);
}
ReusedMemory::Lasting::~Lasting() {
  if (memory_users > 0) memory_sizes(memory_common, 1 << 30);
}

}  // namespace kompakt
