// What the functions of several stages share.
#pragma once

#include <cstdint>
#include <string>

#include "core/error.h"
#include "core/fields.h"
#include "model/config.h"
#include "pipeline/stages.h"
#include "train/options.h"

namespace kompakt {

// The option struct of a stage, from options that the check of the recipe has resolved.
template <class Options>
Options read_stage(const Node& node) {
  Options options;
  Problems problems;
  read_fields(node, "the stage", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("the stage's options are not valid");
  return options;
}

inline std::int64_t float_bytes(const ModelConfig& config) { return count_parameters(config).total * 4; }

// Time, memory and floats of a training. `objective`: null for one without teacher. A classifier's outputs on the training set are
// cached: logits, and in bfloat16 what the objectives ask for.
void add_training(const PlanInput& input, const TrainOptions& train, const Node* objective, PlannedModel& model);

// Losses against the teacher go token by token: an Error where a cut of the vocabulary, or another student, has given the model other ids.
[[noreturn]] void refuse_other_tokens(const std::string& stage);
void plan_teacher_tokens(const PlanInput& input, const Node& objective, const PlannedModel& model, const std::string& stage);

void plan_distill(const Node& options, const PlanInput& input, PlannedModel& model);
void run_distill(const Node& options, StageRun& run);

}  // namespace kompakt
