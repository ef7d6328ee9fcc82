// Version of the code that decides a stage's bytes: part of every key, so that a new release never reuses stale outputs.
#pragma once

namespace kompakt {

inline constexpr const char* kompakt_version = "0.1.0";
// Raised by hand when a stage computes other bytes from the same inputs.
inline constexpr const char* stage_revision = "14";

}  // namespace kompakt
