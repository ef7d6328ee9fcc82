// Table of the figures a report holds for each model: name, title, unit, which direction is better.
//
// One row serves report.json's nulls, the closing table, report.md, report.html and the names in gates. Reads JSON only.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"

namespace kompakt {

enum class Better { higher, lower, neither };
enum class Unit { share, number, small_number, bytes, count, milliseconds, seconds, rate, joules };

struct Metric {
  const char* name;   // key of report.json
  const char* title;  // heading of a column
  Unit unit;
  Better better;
  // What must have been evaluated for the figure to exist: a task, a text, vectors of texts, those that the model did before the run, or
  // nothing ("any").
  enum class Needs { any, task, language, embeddings, earlier_task, earlier_text } needs;
  const char* summary;
};

std::span<const Metric> metrics();
const Metric* find_metric(std::string_view name);
std::vector<std::string> metric_names();

// A number as it stands, or `value` / `mean` of an object ({"value":..,"low":..,"high":..}; {"mean":..,"p99":..}).
// Nothing for null and absent; Error when it is of another type. `place` names it in that message.
std::optional<double> number_of(const Json& value, const std::string& place);
// object[key] as a number; nothing when object is null or the key is absent.
std::optional<double> number_at(const Json& object, const std::string& key);
// Member by path; nullptr when any step is absent or null.
const Json* find_json(const Json& root, std::initializer_list<const char*> path);

std::string show_number(Unit unit, double value);  // "93.8%", "2.87 MB", "1 min 15 s"
// The figure with its interval where it has one ("93.8% ±0.9"), "–" where it was not measured.
std::string show_metric(const Metric& metric, const Json& entry);
// Percentage points with sign: 0.003 -> "+0.3".
std::string show_points(double share);
std::string show_times(double ratio);  // 43.2 -> "43×", 2.94 -> "2.9×"
// Number of code points, for alignment.
std::size_t text_width(std::string_view text);

}  // namespace kompakt
