#include "report/budget.h"

#include "core/text.h"
#include "report/metrics.h"
#include "report/verdict.h"

namespace kompakt {
namespace {

std::string budget_text(const Json& object, const char* key, Unit unit) {
  const auto value = number_at(object, key);
  return value ? show_number(unit, *value) : "–";
}

std::string budget_counts(const Json& row) {
  const Json* tensors = find_json(row, {"tensors"});
  if (!tensors || !tensors->is_object()) return "–";
  std::vector<std::string> parts;
  for (const auto& [name, count] : tensors->items()) parts.push_back(str(count.dump(), " ", name));
  return join(parts, ", ");
}

}  // namespace

std::vector<BudgetView> budget_views(const Json& report) {
  std::vector<BudgetView> views;
  for (const Json& stage : report.at("stages")) {
    const Json* found = find_json(stage, {"details", "budget"});
    if (!found || !found->is_object()) continue;
    const Json& budget = *found;
    BudgetView view;
    view.stage = stage.value("name", "");
    view.lines.push_back(str("Budget ", budget_text(budget, "limit", Unit::bytes), ", possible ", budget_text(budget, "smallest_bytes", Unit::bytes), " to ", budget_text(budget, "largest_bytes", Unit::bytes), "; chosen: ", budget_counts(budget), "."));
    const Json* artifact = find_json(report, {"artifact"});
    view.lines.push_back(str("File: predicted ", budget_text(budget, "predicted_bytes", Unit::bytes), artifact && artifact->is_object() ? str(", artifact folder ", budget_text(*artifact, "bytes", Unit::bytes)) : std::string(), "."));
    view.lines.push_back(str("Divergence from the float model: predicted ", budget_text(budget, "predicted_kl", Unit::small_number), ", measured ", budget_text(budget, "measured_kl_calibration", Unit::small_number), " on the ", budget_text(budget, "tokens", Unit::number),
                             " calibration tokens of the prediction. The prediction is made from ", budget.value("errors", "rounding") == "method" ? "errors of the method" : "errors of plain rounding; the method makes smaller ones", "."));
    if (const Json* curve = find_json(budget, {"curve"}); curve && curve->is_array())
      for (const Json& point : *curve) {
        const auto bytes = number_at(point, "bytes"), divergence = number_at(point, "predicted_kl");
        if (!bytes || !divergence) continue;
        view.curve.push_back({budget_text(point, "limit", Unit::bytes), budget_text(point, "bytes", Unit::bytes), budget_text(point, "predicted_kl", Unit::small_number), budget_counts(point)});
        view.points.emplace_back(*bytes, *divergence);
      }
    if (const Json* rows = find_json(budget, {"formats"}); rows && rows->is_array())
      for (const Json& row : *rows) view.formats.push_back({row.value("tensor", ""), row.value("format", ""), budget_text(row, "bytes", Unit::bytes), budget_text(row, "predicted_kl", Unit::small_number)});
    views.push_back(std::move(view));
  }
  return views;
}

}  // namespace kompakt
