// The tree of one side of a gate. Private to report/: made by the parser, walked by the evaluation.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace kompakt {

struct GateExpression {
  char kind = '#';                // '#' number, 'n' name, '-' with one child is the sign, else + - * /
  double number = 0;              // of '#', unit applied
  std::string unit;               // as written, "" without
  std::vector<std::string> path;  // of 'n'
  std::size_t column = 1;
  std::shared_ptr<const GateExpression> first, second;
};

// Keys of a model's entry in report.json that are not metrics but lead to figures.
const std::vector<std::string>& entry_keys();
// Top-level keys of report.json that lead to figures.
const std::vector<std::string>& report_keys();
const std::vector<std::string>& stage_kinds();

}  // namespace kompakt
