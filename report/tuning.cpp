#include "report/tuning.h"

#include "core/text.h"
#include "report/metrics.h"
#include "report/verdict.h"

namespace kompakt {
namespace {

std::string tuning_text(const Json& object, const char* key, Unit unit) {
  const auto value = number_at(object, key);
  return value ? show_number(unit, *value) : "–";
}

void tuning_blocks(const Json& blocks, TuningView& view) {
  double before = 0, after = 0;
  std::size_t better = 0;
  for (const Json& block : blocks) {
    before += number_at(block, "error_before").value_or(0), after += number_at(block, "error_after").value_or(0);
    better += number_at(block, "best_iteration").value_or(0) > 0;
  }
  const double count = static_cast<double>(blocks.size());
  view.lines.push_back(str("Blocks: ", better, " of ", blocks.size(), " came closer to the float model's; mean squared error of their outputs on the calibration inputs ", show_number(Unit::small_number, before / count), " by the method, ", show_number(Unit::small_number, after / count), " tuned."));
}

void tuning_model(const Json& tuning, TuningView& view) {
  const std::string winner = tuning.value("winner", "–");
  const auto kept = number_at(tuning, "heldout_kl"), untuned = number_at(tuning, "untuned_heldout_kl");
  view.lines.push_back(str("Whole model (", tuning.value("mode", "–"), "): kept ", winner, ", divergence from the teacher on held-out text ", tuning_text(tuning, "heldout_kl", Unit::small_number),
                           winner == "untuned" ? "; no checkpoint was better" : str(", untuned ", tuning_text(tuning, "untuned_heldout_kl", Unit::small_number), kept && untuned && *untuned > 0 ? str(" (", fixed(*kept / *untuned, 2), " of it)") : std::string()), "."));
  view.lines.push_back(str(tuning_text(tuning, "steps", Unit::count), " of ", tuning_text(tuning, "planned_steps", Unit::count), " steps of ", tuning_text(tuning, "tokens_per_step", Unit::count), " tokens over ", tuning_text(tuning, "tuning_tokens", Unit::count),
                           " tokens of calibration text; held out: ", tuning_text(tuning, "heldout_tokens", Unit::count), " tokens (", tuning.value("heldout", "–"), ")."));
  const Json* candidates = find_json(tuning, {"candidates"});
  if (!candidates || !candidates->is_array()) return;
  for (const Json& row : *candidates) {
    if (!row.is_object()) continue;
    const std::string name = row.value("name", "–");
    view.candidates.push_back({name, tuning_text(row, "heldout_kl", Unit::small_number), tuning_text(row, "calibration_kl", Unit::small_number), name == winner ? "yes" : ""});
    const auto step = number_at(row, "step"), kl = number_at(row, "heldout_kl");
    if (step && kl) view.points.emplace_back(*step, *kl);
  }
}

}  // namespace

std::vector<TuningView> tuning_views(const Json& report) {
  std::vector<TuningView> views;
  for (const Json& stage : report.at("stages")) {
    TuningView view;
    view.stage = stage.value("name", "");
    if (const Json* blocks = find_json(stage, {"details", "blocks"}); blocks && blocks->is_array() && !blocks->empty()) tuning_blocks(*blocks, view);
    if (const Json* tuning = find_json(stage, {"details", "tuning"}); tuning && tuning->is_object()) tuning_model(*tuning, view);
    if (!view.lines.empty()) views.push_back(std::move(view));
  }
  return views;
}

}  // namespace kompakt
