// Signs that this process gets on with its work, for others that wait for it: a thread that only answers says nothing about that.
#pragma once

#include <cstdint>

namespace kompakt {

// Called wherever long work passes a point: progress bars, checks for a signal, events. Any thread; costs an addition.
void mark_activity() noexcept;
std::uint64_t activity_count() noexcept;

}  // namespace kompakt
