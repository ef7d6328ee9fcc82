#include "core/lasting_memory.h"

#include <cstdlib>  // which says whether this is glibc
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "core/system.h"

namespace kompakt {
namespace {

int memory_users = 0;  // ReusedMemory that live

// Sizes from which a block is a mapping of its own: what glibc adapts itself to at most, and what it starts with.
constexpr int memory_common = 32 << 20, memory_apart = 128 << 10;
constexpr int memory_kept = 1 << 30;  // free bytes at the heap's end that do not go back

void memory_sizes([[maybe_unused]] int apart_from, [[maybe_unused]] int kept) {
#ifdef __GLIBC__
  ::mallopt(M_MMAP_THRESHOLD, apart_from);
  ::mallopt(M_TRIM_THRESHOLD, kept);
#endif
}

}  // namespace

ReusedMemory::ReusedMemory() {
  ++memory_users;
  memory_sizes(memory_common, memory_kept);
}
ReusedMemory::~ReusedMemory() {
  --memory_users;
  memory_sizes(memory_common, 2 * memory_common);
  release_free_memory();
}
ReusedMemory::Lasting::Lasting() {
  if (memory_users > 0) memory_sizes(memory_apart, memory_kept);
}
ReusedMemory::Lasting::~Lasting() {
  if (memory_users > 0) memory_sizes(memory_common, memory_kept);
}

}  // namespace kompakt
