#include "core/activity.h"

#include <atomic>

namespace kompakt {
namespace {
std::atomic<std::uint64_t> activity_marks{0};
}

void mark_activity() noexcept { activity_marks.fetch_add(1, std::memory_order_relaxed); }
std::uint64_t activity_count() noexcept { return activity_marks.load(std::memory_order_relaxed); }

}  // namespace kompakt
