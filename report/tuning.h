// What tuning by gradients did to a quantized model, as text: for report.md and report.html. Private to report/.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/json.h"

namespace kompakt {

struct TuningView {
  std::string stage;
  std::vector<std::string> lines;  // sentences: what was kept, against what
  std::vector<std::string> header = {"candidate", "KL held out", "KL on calibration text", "kept"};
  std::vector<std::vector<std::string>> candidates;
  std::vector<std::pair<double, double>> points;  // step, held-out KL
};

// One for every quantize stage that tuned its blocks or the whole model.
std::vector<TuningView> tuning_views(const Json& report);

}  // namespace kompakt
