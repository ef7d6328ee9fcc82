#include "report/earlier.h"

#include <algorithm>
#include <array>

#include "core/text.h"
#include "report/metrics.h"
#include "report/verdict.h"

namespace kompakt {
namespace {

struct EarlierRow {
  const char *task, *metric, *pair;
  bool ratio;  // after / before in place of after - before
};
constexpr std::array<EarlierRow, 6> earlier_rows = {{
    {"before", "previous_accuracy", "previous_accuracy_difference", false},
    {"before", "previous_macro_f1", "previous_macro_f1_difference", false},
    {"before", "previous_perplexity", "previous_perplexity_ratio", true},
    {"new", "accuracy", "accuracy_difference", false},
    {"new", "macro_f1", "macro_f1_difference", false},
    {"new", "perplexity", "perplexity_ratio", true},
}};

std::string earlier_change(double value, bool ratio) { return ratio ? str(value >= 1 ? "+" : "−", fixed(100 * std::abs(value - 1), 1), "%") : show_points(value); }

}  // namespace

std::vector<BeforeAfter> before_after(const Json& report) {
  std::vector<BeforeAfter> out;
  const Json* start = find_json(report, {"start"});
  if (!start) return out;
  for (const EarlierRow& row : earlier_rows) {
    for (const Json* model : model_rows(report)) {
      if (model == start || same_as_teacher(report, *model)) continue;
      const Json* pair = find_json(*model, {"versus_start", row.pair});
      const auto before = number_at(*start, row.metric), after = number_at(*model, row.metric);
      if (!pair || !before || !after) continue;
      const auto value = number_of(*pair, row.pair), low = number_at(*pair, "low"), high = number_at(*pair, "high");
      if (!value || !low || !high) continue;
      const Metric& metric = *find_metric(row.metric);
      const double none = row.ratio ? 1 : 0;
      BeforeAfter line;
      line.worse = metric.better == Better::higher ? *high < none : *low > none;
      line.better = metric.better == Better::higher ? *low > none : *high < none;
      const std::string name = model->value("name", ""), figure = find_metric(starts_with(row.metric, "previous_") ? std::string_view(row.metric).substr(9) : row.metric)->title;
      const std::string change = str(earlier_change(*value, row.ratio), row.ratio ? "" : " points", " (", earlier_change(*low, row.ratio), " … ", earlier_change(*high, row.ratio), ")");
      const std::string task = std::string_view(row.task) == "before" ? "task before" : "new task";
      line.cells = {task, name, figure, show_number(metric.unit, *before), show_number(metric.unit, *after), change, line.worse ? "worse" : line.better ? "better" : "no difference shown"};
      line.sentence = str(name, ": ", figure, " of the ", task, " from ", line.cells[3], " to ", line.cells[4], ", ", change);
      out.push_back(std::move(line));
    }
  }
  std::stable_partition(out.begin(), out.end(), [](const BeforeAfter& line) { return line.worse; });
  return out;
}

}  // namespace kompakt
