// Old and new task before and after a run that goes on from an earlier model: for report.md, report.html and the list of what got worse.
// Private to report/.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

struct BeforeAfter {
  std::vector<std::string> cells;  // task, model, figure, before, after, difference with its 95% interval, verdict
  std::string sentence;            // "02-quantize: accuracy of the task before 91.2% -> 88.0% ..."
  bool worse = false;              // the whole paired interval is on the wrong side
  bool better = false;
};

inline const std::vector<std::string> before_after_header = {"task", "model", "figure", "before", "after", "difference (95%)", "verdict"};

// A row for every model, task and figure; what got worse first, the task before ahead of the new one. Empty without a model to begin with.
std::vector<BeforeAfter> before_after(const Json& report);

}  // namespace kompakt
