// Pieces of report.html. Private to report/. Every text from outside passes html_escape; every chart is inline SVG.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"

namespace kompakt {

// Safe between tags and inside quoted attributes; control characters become U+FFFD.
std::string html_escape(std::string_view text);
const char* html_style();

// html_charts.cpp
struct ScatterPoint {
  std::string label;
  double x = 0, y = 0;                // x > 0: the axis is logarithmic
  std::optional<double> low, high;    // of y
  const char* kind = "stage";         // CSS class: teacher, stage, artifact
};
// Size on a logarithmic axis against a score; points are joined in the order given. `cloud`: others, small and neither joined
// nor labelled.
std::string svg_scatter(const std::vector<ScatterPoint>& points, const std::string& x_title, const std::string& y_title, bool share, const std::vector<ScatterPoint>& cloud = {});
struct Series {
  std::string label;
  std::vector<std::pair<double, double>> points;
};
// Curves over steps; at most 400 points of each are drawn, as means of neighbours.
std::string svg_lines(const std::vector<Series>& series, const std::string& x_title, const std::string& y_title);

// html_details.cpp: sections, "" where the report has nothing to show.
std::string html_curves(const Json& report);
std::string html_layers(const Json& report);
std::string html_before_after(const Json& report);
std::string html_budget(const Json& report);
std::string html_tuning(const Json& report);
std::string html_rounding(const Json& report);
std::string html_removed(const Json& report);
// html_heat.cpp: a column for every layer of the model before the stage; which layers, neurons, heads and single weights are gone,
// the others in the depth of their importance. `details` of a stage; "" where nothing was removed.
std::string svg_removed(const Json& details);
std::string html_search(const Json& report);
std::string html_classes(const Json& report);
std::string html_predictions(const Json& report);
std::string html_lineage(const Json& report);

}  // namespace kompakt
