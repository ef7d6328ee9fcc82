// Options of the stages that have no folder of their own: export and evaluate.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/fields.h"
#include "pipeline/measure.h"
#include "pipeline/recipe.h"
#include "train/teacher.h"

namespace kompakt {

struct StageRun;

struct ExportOptions {
  std::vector<std::string> formats = {"kompakt"};
  double tolerance = 1e-5;       // largest logit difference between the trained model and the reopened artifact
  std::int64_t check_examples = 512;
};
void fields(FieldVisitor& visitor, ExportOptions& options);

struct EvaluateOptions {
  MeasureOptions measure;
  std::string against = "teacher";
  bool cascade = false;
  bool has_cache = false;     // of text: KL and same top-1 from a cache of the teacher's outputs on the test set
  SparseCacheOptions cache;
};
void fields(FieldVisitor& visitor, EvaluateOptions& options);

// Options of the recipe's evaluate stage, or defaults.
EvaluateOptions evaluate_options(const Recipe& recipe);

// Writes every format below `run.output`/<format> (or `run.output` itself for a single one), reopens each with its own reader,
// compares logits with the trained model, and throws Error when they differ by more than the tolerance.
void run_export(const Node& options, StageRun& run);

}  // namespace kompakt
