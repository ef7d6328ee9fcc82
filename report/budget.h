// What a byte budget chose, as text: for report.md and report.html. Private to report/.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/json.h"

namespace kompakt {

struct BudgetView {
  std::string stage;
  std::vector<std::string> lines;                 // sentences: budget, predicted and measured
  std::vector<std::string> curve_header = {"at most", "file", "predicted divergence", "formats"};
  std::vector<std::vector<std::string>> curve;
  std::vector<std::pair<double, double>> points;  // bytes, predicted divergence
  std::vector<std::string> format_header = {"tensor", "format", "bytes", "predicted divergence"};
  std::vector<std::vector<std::string>> formats;
};

// One for every quantize stage that worked under a budget.
std::vector<BudgetView> budget_views(const Json& report);

}  // namespace kompakt
