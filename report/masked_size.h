// How many weights are masked, and what they take in an artifact: every format stores zeros like any weight, a compressed download does not.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

// One sentence for every stage that has chosen zeros and every format that a run with masks has written; empty without masks.
std::vector<std::string> masked_size_lines(const Json& report);

}  // namespace kompakt
