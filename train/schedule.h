// Learning-rate schedules: a table of pure functions of the step, so that resuming needs no state.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kompakt {

struct Schedule {
  std::string_view name, summary;
  // `t` in [0, 1): progress of the part after the warm-up; `total` in [0, 1): progress of all steps.
  double (*shape)(double t, double total);  // 1 = peak, 0 = final_ratio
};

std::span<const Schedule> schedules();
std::vector<std::string> schedule_names();
const Schedule& find_schedule(std::string_view name);  // Error with the nearest match for an unknown name

// Factor on the peak learning rate at `step` (from 0) of `steps`. The warm-up is round(warmup * steps) steps long and rises
// linearly so that its last step has the peak; the last of all steps is still above final_ratio.
double schedule_factor(const Schedule& schedule, std::int64_t step, std::int64_t steps, double warmup, double final_ratio);

}  // namespace kompakt
