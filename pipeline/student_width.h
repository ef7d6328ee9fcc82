// A student narrower than its teacher: the sizes of `distill: {student: {width: ...}}`, cut by what the stage prune cuts with.
#pragma once

#include <cstdint>
#include <string>

#include "distill/stage.h"
#include "prune/stage.h"

namespace kompakt {

struct PlanInput;
struct PlannedModel;

// Sizes that the student has; 0 = the teacher's. Which units stay is chosen by their importance in the whole teacher, before layers are left out.
struct StudentWidth {
  std::int64_t hidden = 0;  // channels of the residual stream (decoders)
  std::int64_t ffn = 0;     // feed-forward neurons
  std::int64_t heads = 0;   // attention heads
  PruneOptions how;         // of these criterion, samples, compensate, structured.hidden_by and structured.untie are read from a recipe
};

// The stage distill as a recipe writes it: distill/ itself may not know of prune/.
struct DistillRecipe : DistillOptions {
  bool has_width = false;
  StudentWidth width;
};
void fields(FieldVisitor& visitor, DistillRecipe& options);

// What the options alone tell: a width beside a student that is not made of the teacher, or one that narrows nothing.
void check_width(const DistillRecipe& options, const Place& place, Problems& problems);

// The stage prune that cuts a model of this shape to these sizes. Errors name the nearest sizes: a size above the model's, heads that do
// not divide among the key/value groups, a stream that cannot be made narrower, a criterion without channels.
PruneOptions width_cut(const StudentWidth& width, const ModelConfig& config);

// Changes model.config to the narrower shape and tells the valid sizes with their bytes. Errors besides those of width_cut(): rows that what follows in the recipe cannot
// store, and a criterion that measures on data where the recipe has none.
void plan_width_cut(const StudentWidth& width, const PlanInput& input, PlannedModel& model);

}  // namespace kompakt
