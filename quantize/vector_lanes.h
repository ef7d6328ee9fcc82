// Two operations on rows in the lanes of core/lanes.h.
#pragma once

#include <cstdint>

#include "core/lanes.h"

namespace kompakt {

// a[i] += b[i] * factor
void lanes_add(float* a, const float* b, float factor, std::int64_t n);
// Sum of a[i] * b[i]: lanes in float, their sum and the tail in double.
double lanes_dot(const float* a, const float* b, std::int64_t n);

}  // namespace kompakt
