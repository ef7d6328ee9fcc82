// The closing table of a run. Plain text: it goes into logs as often as onto screens.
#include <algorithm>

#include "core/text.h"
#include "report/gates.h"
#include "report/metrics.h"
#include "report/report.h"
#include "report/table.h"
#include "report/verdict.h"

namespace kompakt {

std::vector<const Json*> table_rows(const Json& report, bool costs) {
  auto rows = model_rows(report);
  if (!costs) std::erase_if(rows, [](const Json* row) { return !makes_model(*row); });
  return rows;
}

ModelTable model_table(const Json& report, bool costs) {
  struct Column {
    const char* title;
    std::string_view metric;  // "": the ratio to the teacher
  };
  static constexpr Column columns[] = {{"accuracy", "accuracy"}, {"macro-F1", "macro_f1"}, {"perplexity", "perplexity"}, {"accuracy before", "previous_accuracy"}, {"perplexity before", "previous_perplexity"}, {"KL", "kl"}, {"same top-1", "top1_agreement"}, {"rank correlation", "rank_correlation"}, {"same nearest", "same_nearest"}, {"size", "bytes"}, {"smaller", ""}, {"bits/weight", "bits_per_weight"}, {"latency", "latency_ms"}, {"tokens/s", "tokens_per_second"}, {"memory", "memory_in_use"}, {"made in", "seconds"}};
  ModelTable table;
  table.header = {"model"};
  const auto rows = table_rows(report, costs);
  for (const Json* row : rows) {
    std::string name = row->value("name", "");
    if (row->value("reused", false)) name += " (reused)";
    table.rows.push_back({name});
  }
  for (const Column& column : columns) {
    if (!costs && column.metric == "seconds") continue;
    std::vector<std::string> cells;
    for (const Json* row : rows) {
      if (column.metric == "memory_in_use") {
        // Of using the model, never of making it: a stage keeps the two apart.
        const auto memory = number_at(*row, row->contains("stage") ? "inference_peak_memory_bytes" : "peak_memory_bytes");
        cells.push_back(memory ? show_number(Unit::bytes, *memory) : "–");
        continue;
      }
      if (!column.metric.empty()) {
        cells.push_back(show_metric(*find_metric(column.metric), *row));
        continue;
      }
      const Json* ratio = find_json(*row, {"ratio_to_teacher", "bytes"});
      cells.push_back(ratio && ratio->get<double>() > 0 ? show_times(1 / ratio->get<double>()) : "–");
    }
    // A column that nothing fills says nothing.
    if (std::all_of(cells.begin(), cells.end(), [](const std::string& cell) { return cell == "–"; })) continue;
    table.header.emplace_back(column.title);
    table.metrics.emplace_back(column.metric);
    for (std::size_t i = 0; i < cells.size(); ++i) table.rows[i].push_back(cells[i]);
  }
  return table;
}

std::string aligned(const ModelTable& table) {
  std::vector<std::size_t> width(table.header.size());
  for (std::size_t c = 0; c < width.size(); ++c) {
    width[c] = text_width(table.header[c]);
    for (const auto& row : table.rows) width[c] = std::max(width[c], text_width(row[c]));
  }
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string text = cells[0] + std::string(width[0] - text_width(cells[0]), ' ');
    for (std::size_t c = 1; c < cells.size(); ++c) text += std::string(2 + width[c] - text_width(cells[c]), ' ') + cells[c];
    return text + "\n";
  };
  std::string text = line(table.header);
  std::size_t total = 2 * (width.size() - 1);
  for (const std::size_t w : width) total += w;
  for (std::size_t i = 0; i < total; ++i) text += "─";
  text += "\n";
  for (const auto& row : table.rows) text += line(row);
  return text;
}

std::string closing_table(const Json& report, const std::filesystem::path& run) {
  std::string text;
  for (const Json& line : report.at("regressions")) text += str("worse: ", line.get<std::string>(), "\n");
  if (!text.empty()) text += "\n";
  if (!model_rows(report).empty()) text += aligned(model_table(report)) + "\n";
  if (!report.at("gates").empty()) text += gate_table(gates_from_json(report.at("gates"))) + "\n";
  for (const std::string& line : not_measured(report)) text += str("not measured: ", line, "\n");
  for (const Json& warning : report.at("warnings")) text += str("warning: ", warning.is_string() ? warning.get<std::string>() : warning.dump(), "\n");
  text += str(report.at("verdict").get<std::string>(), "\n");
  if (!run.empty()) text += str("report: ", (run / "report.html").string(), "\n");
  return text;
}

}  // namespace kompakt
