// `kompakt run`: stages in order, each from the store when nothing changed, each measured, then the report.
#pragma once

#include <filesystem>
#include <string>

#include "core/error.h"
#include "core/json.h"
#include "pipeline/device.h"
#include "pipeline/recipe.h"

namespace kompakt {

struct RunOptions {
  std::filesystem::path out;     // "" = runs/NAME below the working folder
  std::string device = default_device();  // cpu | cuda | cuda:N
  bool resume = false;           // go on inside an interrupted stage
  std::string until;             // stop after this stage (name or title)
};

struct RunOutcome {
  ExitCode code = ExitCode::ok;  // ok, or gate
  std::filesystem::path folder;
  Json report;                   // null on all ranks but the first
  bool did_nothing = false;      // every stage and measurement was there already
};

// Started several times by torchrun, mpirun or scripts/slurm_run.sh (core/launch.h), the processes share the trainings of the stages; rank 0
// does everything else and writes everything while the others wait. The run folder and the store must be on a file system that all see.
RunOutcome run_recipe(const Recipe& recipe, const RunOptions& options);

}  // namespace kompakt
