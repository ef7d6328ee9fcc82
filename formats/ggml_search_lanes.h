// Codes in lanes, with ggml's rounding on any input. Internal to formats/ggml_*.cpp; for functions marked KOMPAKT_LANES.
#pragma once

#include <cstdint>

#include "core/lanes.h"

namespace kompakt::ggml_search {

// clamp(nearest_int(v), low, high), as a number.
KOMPAKT_INLINE void code_lanes(const Lanes& v, int low, int high, Lanes& code) {
  const Lanes shifted = v + 12582912.0f;
  LaneMask bits, bottom = {}, top = {};
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits & 0x007FFFFF) - 0x00400000;
  bottom += low, top += high;
  bits = bits > bottom ? bits : bottom;
  bits = bits < top ? bits : top;
  code = __builtin_convertvector(bits, Lanes);
}

}  // namespace kompakt::ggml_search
