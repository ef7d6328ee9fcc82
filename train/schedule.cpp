// The rows of the table of learning-rate schedules.
#include "train/schedule.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

constexpr double wsd_decay_share = 0.2;  // of all steps

double schedule_constant(double, double) { return 1; }
double schedule_linear(double t, double) { return 1 - t; }
double schedule_cosine(double t, double) { return 0.5 * (1 + std::cos(3.14159265358979323846 * t)); }
// Warm-up, stable, decay with the 1 - sqrt shape (Hägele et al. 2024, "Scaling laws and compute-optimal training beyond
// fixed training durations").
double schedule_wsd(double, double total) {
  const double start = 1 - wsd_decay_share;
  return total <= start ? 1.0 : 1 - std::sqrt((total - start) / wsd_decay_share);
}

constexpr std::array schedule_rows = {
    Schedule{"constant", "the peak to the end", schedule_constant},
    Schedule{"linear", "falls in a straight line", schedule_linear},
    Schedule{"cosine", "falls along half a cosine", schedule_cosine},
    Schedule{"wsd", "the peak for 80% of the steps, then falls as 1 - sqrt", schedule_wsd},
};

}  // namespace

std::span<const Schedule> schedules() { return schedule_rows; }

std::vector<std::string> schedule_names() {
  std::vector<std::string> names;
  for (const Schedule& row : schedule_rows) names.emplace_back(row.name);
  return names;
}

const Schedule& find_schedule(std::string_view name) {
  for (const Schedule& row : schedule_rows) {
    if (row.name == name) return row;
  }
  const std::vector<std::string> names = schedule_names();
  throw Error(str("unknown schedule \"", name, "\"", did_you_mean(name, names))).at("schedule").given(std::string(name)).allowed(join(names, ", "));
}

double schedule_factor(const Schedule& schedule, std::int64_t step, std::int64_t steps, double warmup, double final_ratio) {
  const auto warm = static_cast<std::int64_t>(std::llround(warmup * static_cast<double>(steps)));
  if (step < warm) return static_cast<double>(step + 1) / static_cast<double>(warm);
  const double t = static_cast<double>(step - warm) / static_cast<double>(std::max<std::int64_t>(1, steps - warm));
  const double total = static_cast<double>(step) / static_cast<double>(std::max<std::int64_t>(1, steps));
  return final_ratio + (1 - final_ratio) * schedule.shape(t, total);
}

}  // namespace kompakt
