// Sparsity that grows while the model trains (Zhu and Gupta 2017): every few steps the smallest weights of each row go, a little
// more each time, and those that stay make up for them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/fields.h"
#include "train/constraint.h"
#include "train/context.h"

namespace kompakt {

struct GradualOptions {
  std::string type = "cubic";  // row of the table of sparsity schedules
  double initial = 0;          // sparsity at the beginning
  double begin = 0, end = 0.7; // shares of the training between which it grows
  std::int64_t every = 20;     // steps between two choices
};
void fields(FieldVisitor& visitor, GradualOptions& options);

struct SparsitySchedule {
  std::string_view name, summary;
  double (*grown)(double progress);  // share of the way from the initial to the final sparsity, at a share of the time; 0 -> 0, 1 -> 1
};
std::span<const SparsitySchedule> sparsity_schedules();
const SparsitySchedule* find_sparsity_schedule(std::string_view name);
std::vector<std::string> sparsity_schedule_names();

// Sparsity after `step` of `steps` (0 = before the first): initial + (final - initial) grown((step - begin) / (end - begin)).
double gradual_sparsity(const GradualOptions& options, double final_sparsity, std::int64_t step, std::int64_t steps);

// Before a step that is due, the masks of `linears` are chosen anew by magnitude inside each row; weights that are zero stay zero.
// All state is in the weights: an interrupted training goes on with the same masks. `masks` receives them when training ends.
std::shared_ptr<Constraint> gradual_masks(const GradualOptions& options, double final_sparsity, std::vector<std::string> linears, WeightMasks& masks);

}  // namespace kompakt
