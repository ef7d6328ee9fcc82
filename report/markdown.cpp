// report.md: for pull requests and mails. Text from outside is escaped for Markdown and for the HTML inside it.
#include "core/text.h"
#include "report/budget.h"
#include "report/calibration.h"
#include "report/earlier.h"
#include "report/gates.h"
#include "report/masked_size.h"
#include "report/metrics.h"
#include "report/report.h"
#include "report/rounding.h"
#include "report/table.h"
#include "report/tuning.h"
#include "report/verdict.h"

namespace kompakt {
namespace {

std::string markdown_escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '&') out += "&amp;";
    else if (c == '\n' || c == '\r') out += ' ';
    else if (std::string_view("\\`*_[]|#!~$").find(c) != std::string_view::npos) out += str('\\', c);
    else out += c;
  }
  return out;
}

std::string markdown_row(const std::vector<std::string>& cells) {
  std::string line = "|";
  for (const std::string& cell : cells) line += str(" ", markdown_escape(cell), " |");
  return line + "\n";
}

std::string markdown_rule(std::size_t columns) {
  std::string line = "|---|";
  for (std::size_t c = 1; c < columns; ++c) line += "--:|";
  return line + "\n";
}

std::string markdown_list(const std::string& title, const std::vector<std::string>& lines) {
  if (lines.empty()) return {};
  std::string text = str("\n## ", title, "\n\n");
  for (const std::string& line : lines) text += str("- ", markdown_escape(line), "\n");
  return text;
}

std::vector<std::string> markdown_texts(const Json& list) {
  std::vector<std::string> lines;
  for (const Json& line : list) lines.push_back(line.is_string() ? line.get<std::string>() : line.dump());
  return lines;
}

}  // namespace

std::string report_markdown(const Json& report) {
  std::string text = str("# ", markdown_escape(report.at("name").get<std::string>()), "\n\n**", markdown_escape(report.at("verdict").get<std::string>()), "**\n");
  text += markdown_list("Worse", markdown_texts(report.at("regressions")));
  const ModelTable table = model_table(report);
  if (!table.rows.empty()) {
    text += str("\n## Models\n\n", markdown_row(table.header), markdown_rule(table.header.size()));
    for (const auto& row : table.rows) text += markdown_row(row);
    text += "\n± is half the width of the 95% interval. Size is that of whole files; bits/weight counts all of their bytes.\n";
  }
  if (const auto rows = before_after(report); !rows.empty()) {
    text += str("\n## Before and after\n\n", markdown_row(before_after_header), "|---|---|---|--:|--:|--:|---|\n");
    for (const BeforeAfter& row : rows) text += markdown_row(row.cells);
    text += "\nBefore: the model that the run begins with. Differences are paired, on the same examples.\n";
  }
  if (!report.at("gates").empty()) {
    text += str("\n## Gates\n\n", markdown_row({"gate", "met", "figures", "note"}), "|---|---|---|---|\n");
    for (const GateResult& gate : gates_from_json(report.at("gates"))) {
      text += markdown_row({gate.text, gate.met ? "yes" : "NO", gate_figures(gate), gate.note});
    }
  }
  std::string predictions;
  for (const Json& stage : report.at("stages")) {
    for (const auto& [key, row] : stage.at("predicted").items()) {
      const Metric* metric = find_metric(key);
      const auto measured = number_at(row, "measured"), ratio = number_at(row, "ratio");
      const Unit unit = metric ? metric->unit : Unit::number;
      predictions += markdown_row({stage.value("name", ""), metric ? metric->title : key, show_number(unit, *number_at(row, "predicted")), measured ? show_number(unit, *measured) : "–", ratio ? show_times(*ratio) : "–"});
    }
  }
  if (!predictions.empty()) text += str("\n## Predicted and measured\n\n", markdown_row({"stage", "figure", "predicted", "measured", "measured/predicted"}), "|---|---|--:|--:|--:|\n", predictions);
  for (const BudgetView& view : budget_views(report)) {
    text += markdown_list(str("Byte budget of ", view.stage), view.lines);
    text += str("\n", markdown_row(view.curve_header), "|--:|--:|--:|---|\n");
    for (const auto& row : view.curve) text += markdown_row(row);
  }
  for (const TuningView& view : tuning_views(report)) {
    text += markdown_list(str("Tuning of ", view.stage), view.lines);
    if (view.candidates.empty()) continue;
    text += str("\n", markdown_row(view.header), "|---|--:|--:|---|\n");
    for (const auto& row : view.candidates) text += markdown_row(row);
  }
  for (const RoundingView& view : rounding_views(report)) {
    text += markdown_list(str("Activations, keys and values of ", view.stage), view.lines);
    if (view.rows.empty()) continue;
    text += str("\n", markdown_row(view.header), markdown_rule(view.header.size()));
    for (const auto& row : view.rows) text += markdown_row(row);
  }
  text += markdown_list("Calibration", calibration_lines(report));
  text += markdown_list("Masked weights", masked_size_lines(report));
  text += markdown_list("Not measured", not_measured(report));
  text += markdown_list("Warnings", markdown_texts(report.at("warnings")));
  std::vector<std::string> lineage;
  if (const Json* sha = find_json(report, {"recipe_sha256"})) lineage.push_back(str("recipe: ", sha->get<std::string>()));
  if (const Json* version = find_json(report, {"kompakt_version"})) lineage.push_back(str("kompakt ", version->get<std::string>()));
  for (const Json& stage : report.at("stages")) {
    if (const Json* key = find_json(stage, {"key"})) lineage.push_back(str(stage.value("name", ""), ": ", key->get<std::string>()));
  }
  return text + markdown_list("Lineage", lineage);
}

}  // namespace kompakt
