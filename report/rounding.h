// What a quantize stage rounds beside weights, as text: for report.md and report.html. Private to report/.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

struct RoundingView {
  std::string stage;
  std::vector<std::string> lines;  // sentences: which values, how, on which text
  std::vector<std::string> header = {"part of a block", "scale, least", "median", "largest", "largest error"};
  std::vector<std::vector<std::string>> rows;  // empty without static scales
};

// One for every quantize stage that rounds activations, keys or values.
std::vector<RoundingView> rounding_views(const Json& report);

}  // namespace kompakt
