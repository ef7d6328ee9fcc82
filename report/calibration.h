// What a quantization looked at: the calibration set, and how much its tokens counted.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

// One sentence for every stage with a calibration set; empty without one.
std::vector<std::string> calibration_lines(const Json& report);

}  // namespace kompakt
