// Straight-through rounding to a grid, and the constraint that applies it in every forward pass.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/rounding.h"
#include "quantize/stage.h"

namespace kompakt {

// How far quantization has faded in: a table of pure functions, so that resuming needs no state.
struct GradualSchedule {
  std::string_view name, summary;
  double (*strength)(double t);  // t in (0, 1], progress of the fade -> (0, 1], 1 at its end
};
std::span<const GradualSchedule> gradual_schedules();
const GradualSchedule* find_gradual_schedule(std::string_view name);
std::vector<std::string> gradual_schedule_names();
// Strength at `step` (from 0) of `steps`: the fade is share * steps steps long, and its last step lies on the grid already.
double gradual_strength(const GradualSchedule& schedule, double share, std::int64_t step, std::int64_t steps);
// (1 - strength) weight + strength rounded, exactly `rounded` at 1. Without gradient: what straight_through takes as its value.
at::Tensor gradual_weight(const at::Tensor& weight, const at::Tensor& rounded, double strength);

// Fake quantization during training: exact scales from the master weight at every step, straight-through gradient. What is
// evaluated between steps is the model on the grid, whatever the strength of the steps.
struct GradualOptions {
  double share = 0;                 // of all steps; 0 = on the grid from the start
  std::string schedule = "linear";  // row of the table
};
std::shared_ptr<Constraint> fake_quantization(const QuantizationPlan& plan, const GradualOptions& gradual = {});

}  // namespace kompakt
