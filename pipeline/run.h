// `kompakt run`: stages in order, each from the store when nothing changed, each measured, then the report.
#pragma once

#include <filesystem>
#include <string>

#include "core/error.h"
#include "core/json.h"
#include "pipeline/recipe.h"

namespace kompakt {

struct RunOptions {
  std::filesystem::path out;     // "" = runs/NAME below the working folder
  std::string device = "cpu";    // cpu | cuda | cuda:N
  bool resume = false;           // go on inside an interrupted stage
  std::string until;             // stop after this stage (name or title)
};

struct RunOutcome {
  ExitCode code = ExitCode::ok;  // ok, or gate
  std::filesystem::path folder;
  Json report;
  bool did_nothing = false;      // every stage and measurement was there already
};

RunOutcome run_recipe(const Recipe& recipe, const RunOptions& options);

}  // namespace kompakt
