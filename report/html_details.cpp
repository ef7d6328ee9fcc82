// Sections of the page that show how the models were made: curves, layers, what was removed, predictions, lineage.
#include <algorithm>
#include <cmath>
#include <map>

#include "core/text.h"
#include "report/budget.h"
#include "report/earlier.h"
#include "report/html.h"
#include "report/metrics.h"
#include "report/rounding.h"
#include "report/tuning.h"
#include "report/verdict.h"

namespace kompakt {
namespace {

std::string details_text(const Json& object, const char* key) {
  const Json* value = find_json(object, {key});
  if (!value) return "–";
  return html_escape(value->is_string() ? value->get<std::string>() : value->is_number_float() ? show_number(Unit::small_number, value->get<double>()) : value->dump());
}

std::string details_bar(double share, const std::string& text, const char* kind = "") {
  return str("<td class=\"num bar ", kind, "\" style=\"--share:", fixed(100 * std::clamp(share, 0.0, 1.0), 1), "%\"><span>", html_escape(text), "</span></td>");
}

std::string details_section(const std::string& id, const std::string& title, const std::string& lead, const std::string& body) {
  if (body.empty()) return {};
  return str("<section id=\"", id, "\"><h2>", title, "</h2>\n", lead.empty() ? "" : str("<p class=\"lead\">", lead, "</p>\n"), body, "</section>\n");
}

std::string details_table(const std::vector<std::string>& header, const std::vector<std::vector<std::string>>& rows) {
  std::string text = "<div class=\"scroll\"><table><thead><tr>";
  for (const std::string& cell : header) text += str("<th>", html_escape(cell), "</th>");
  text += "</tr></thead><tbody>\n";
  for (const auto& row : rows) {
    text += "<tr>";
    for (const std::string& cell : row) text += str("<td>", html_escape(cell), "</td>");
    text += "</tr>\n";
  }
  return text + "</tbody></table></div>";
}

// Steps, totals and parts of [[step, total, {part: value}], ...]; rows of another shape are left out.
std::vector<Series> details_series(const Json& curve) {
  std::vector<Series> series = {{"total", {}}};
  std::map<std::string, std::size_t> parts;
  if (!curve.is_array()) return series;
  for (const Json& row : curve) {
    if (!row.is_array() || row.size() < 2 || !row[0].is_number() || !row[1].is_number()) continue;
    const double step = row[0].get<double>();
    series[0].points.emplace_back(step, row[1].get<double>());
    if (row.size() < 3 || !row[2].is_object()) continue;
    for (const auto& [name, value] : row[2].items()) {
      if (!value.is_number()) continue;
      const auto [at, fresh] = parts.emplace(name, series.size());
      if (fresh) series.push_back({name, {}});
      series[at->second].points.emplace_back(step, value.get<double>());
    }
  }
  return series;
}

// One row of [layer, before, after].
struct DetailsRemoved {
  std::string layer;
  double before = 0, after = 0;
};

std::vector<DetailsRemoved> details_removed(const Json& list) {
  std::vector<DetailsRemoved> rows;
  if (!list.is_array()) return rows;
  for (const Json& row : list) {
    if (!row.is_array() || row.size() != 3 || !row[1].is_number() || !row[2].is_number()) continue;
    rows.push_back({row[0].is_string() ? row[0].get<std::string>() : row[0].dump(), row[1].get<double>(), row[2].get<double>()});
  }
  return rows;
}

}  // namespace

std::string html_curves(const Json& report) {
  std::string body;
  for (const Json& stage : report.at("stages")) {
    const Json* curve = find_json(stage, {"details", "loss_curve"});
    if (!curve) continue;
    const std::string chart = svg_lines(details_series(*curve), "step", "loss");
    if (!chart.empty()) body += str("<figure><figcaption>", html_escape(stage.value("name", "")), "</figcaption>", chart, "</figure>\n");
  }
  return details_section("training", "Training", "", body.empty() ? body : str("<div class=\"charts\">", body, "</div>"));
}

std::string html_layers(const Json& report) {
  std::string body;
  for (const Json* row : model_rows(report)) {
    const Json* layers = find_json(*row, {"details", "layers"});
    if (!layers || !layers->is_array() || layers->empty()) continue;
    double worst = 0;
    for (const Json& layer : *layers) worst = std::max(worst, number_at(layer, "error").value_or(0));
    std::string table = "<table><thead><tr><th>layer</th><th>format</th><th class=\"num\">relative error</th><th class=\"num\">of outputs</th><th class=\"num\">by rounding</th><th class=\"num\">halves differ</th><th class=\"num\">bits/weight</th><th class=\"num\">damping</th><th class=\"num\">time</th></tr></thead><tbody>\n";
    const auto small_cell = [](const Json& layer, const char* key) {
      const auto value = number_at(layer, key);
      return str("<td class=\"num\">", value ? show_number(Unit::small_number, *value) : "–", "</td>");
    };
    for (const Json& layer : *layers) {
      const auto error = number_at(layer, "error"), bits = number_at(layer, "bits"), seconds = number_at(layer, "seconds"), damping = number_at(layer, "damping");
      table += str("<tr><td class=\"mono\">", details_text(layer, "layer"), "</td><td>", details_text(layer, "format"), "</td>", details_bar(worst > 0 && error ? *error / worst : 0, error ? show_number(Unit::small_number, *error) : "–", "bad"), small_cell(layer, "output_error"), small_cell(layer, "rounding_error"), small_cell(layer, "halves"), "<td class=\"num\">", bits ? fixed(*bits, 2) : "–", "</td><td class=\"num\">", damping ? str(*damping) : "–", "</td><td class=\"num\">", seconds ? show_number(Unit::seconds, *seconds) : "–", "</td></tr>\n");
    }
    body += str("<details", layers->size() <= 24 ? " open" : "", "><summary>", html_escape(row->value("name", "")), " <small>", layers->size(), " layers</small></summary><div class=\"scroll\">", table, "</tbody></table></div></details>\n");
  }
  return details_section("layers", "Layers", "Each quantized tensor: how far it is from its float values, how far its outputs are on the calibration inputs (and would be by rounding alone), by how much that error differs between the two halves of the calibration set, and what it costs.", body);
}

std::string html_budget(const Json& report) {
  std::string body;
  for (const BudgetView& view : budget_views(report)) {
    body += str("<h3>", html_escape(view.stage), "</h3>");
    for (const std::string& line : view.lines) body += str("<p>", html_escape(line), "</p>\n");
    std::vector<ScatterPoint> points;
    for (const auto& [bytes, divergence] : view.points)
      if (bytes > 0) points.push_back({"", bytes, divergence, {}, {}, "stage"});
    const std::string chart = points.size() > 1 ? svg_scatter(points, "bytes of the file", "predicted divergence", false) : std::string();
    if (!chart.empty()) body += str("<figure><figcaption>predicted divergence against size</figcaption>", chart, "</figure>\n");
    body += details_table(view.curve_header, view.curve);
    body += str("<details><summary>formats <small>", view.formats.size(), " tensors</small></summary>", details_table(view.format_header, view.formats), "</details>\n");
  }
  return details_section("budget", "Byte budget", "Formats that were chosen for a size of the whole file, and what other sizes would give.", body);
}

std::string html_rounding(const Json& report) {
  std::string body;
  for (const RoundingView& view : rounding_views(report)) {
    body += str("<h3>", html_escape(view.stage), "</h3>");
    for (const std::string& line : view.lines) body += str("<p>", html_escape(line), "</p>\n");
    if (!view.rows.empty()) body += details_table(view.header, view.rows);
  }
  return details_section("rounding", "Activations, keys and values", "What is rounded beside weights; error is the squared error over the sum of squares on the calibration set.", body);
}

std::string html_before_after(const Json& report) {
  std::vector<std::vector<std::string>> rows;
  for (const BeforeAfter& row : before_after(report)) rows.push_back(row.cells);
  return rows.empty() ? std::string() : details_section("before-after", "Before and after", "Before: the model that the run begins with. Differences are paired, on the same examples; what got worse stands first.", details_table(before_after_header, rows));
}

std::string html_tuning(const Json& report) {
  std::string body;
  for (const TuningView& view : tuning_views(report)) {
    body += str("<h3>", html_escape(view.stage), "</h3>");
    for (const std::string& line : view.lines) body += str("<p>", html_escape(line), "</p>\n");
    const std::string chart = view.points.size() > 1 ? svg_lines({{"held out", view.points}}, "step", "KL to the teacher") : std::string();
    if (!chart.empty()) body += str("<figure><figcaption>divergence on held-out text; step 0 is the untuned model</figcaption>", chart, "</figure>\n");
    if (!view.candidates.empty()) body += details_table(view.header, view.candidates);
  }
  return details_section("tuning", "Tuning on the grid", "Which candidate was kept, by text that nothing else has seen.", body);
}

std::string html_removed(const Json& report) {
  std::string body;
  for (const Json& stage : report.at("stages")) {
    const Json* found = find_json(stage, {"details", "removed"});
    const Json nothing = Json::object();
    const Json* removed = found && found->is_object() ? found : find_json(stage, {"details", "sparsity", "layers"}) ? &nothing : nullptr;
    if (!removed) continue;
    std::string rows, whole;
    std::vector<std::string> layers;  // columns, in order of appearance
    std::vector<std::pair<std::string, std::vector<DetailsRemoved>>> kinds;
    for (const auto& [kind, list] : removed->items()) {
      // Of the whole model, not of a layer.
      const bool channels = kind == "hidden";
      if ((channels || kind == "vocabulary") && list.is_array() && list.size() == 2 && list[0].is_number() && list[1].is_number()) {
        const double before = list[0].get<double>(), after = list[1].get<double>();
        const auto stays = channels ? number_at(stage.at("details").value("hidden", Json::object()), "share_kept") : std::nullopt;
        whole += str("<p>", channels ? "Hidden size" : "Vocabulary", ": <b>", fixed(before, 0), "</b> → <b>", fixed(after, 0), "</b> ", channels ? "channels" : "pieces", stays ? str(", ", fixed(100 * *stays, 1), "% of their importance stays") : std::string(), before > 0 ? str(" (", fixed(100 * (1 - after / before), 0), "% removed)") : std::string(), ".</p>");
        continue;
      }
      kinds.emplace_back(kind, details_removed(list));
      for (const DetailsRemoved& row : kinds.back().second) {
        if (std::find(layers.begin(), layers.end(), row.layer) == layers.end()) layers.push_back(row.layer);
      }
    }
    for (const auto& [kind, list] : kinds) {
      if (list.empty()) continue;
      rows += str("<tr><th>", html_escape(kind), "</th>");
      for (const std::string& layer : layers) {
        const auto row = std::find_if(list.begin(), list.end(), [&](const DetailsRemoved& r) { return r.layer == layer; });
        if (row == list.end()) {
          rows += "<td></td>";
          continue;
        }
        const double gone = row->before > 0 ? std::clamp(1 - row->after / row->before, 0.0, 1.0) : 0;
        rows += str("<td style=\"--heat:", fixed(100 * gone, 0), "%\" title=\"", html_escape(str("layer ", layer, ": ", fixed(row->before, 0), " → ", fixed(row->after, 0))), "\"><b>", fixed(100 * gone, 0), "%</b><small>", fixed(row->after, 0), " of ", fixed(row->before, 0), "</small></td>");
      }
      rows += "</tr>\n";
    }
    if (!rows.empty()) {
      std::string head = "<tr><th>layer</th>";
      for (const std::string& layer : layers) head += str("<th>", html_escape(layer), "</th>");
      rows = str("<div class=\"scroll\"><table class=\"heat\"><thead>", head, "</tr></thead><tbody>", rows, "</tbody></table></div>");
    }
    const std::string map = svg_removed(*find_json(stage, {"details"}));
    if (!rows.empty() || !whole.empty() || !map.empty()) body += str("<h3>", html_escape(stage.value("name", "")), "</h3>", map, rows, whole, "\n");
  }
  return details_section("removed", "What was removed", "Share of each layer's units that is gone; the deeper the colour, the more.", body);
}

std::string html_classes(const Json& report) {
  const Json* model = final_model(report);
  const Json* tasks = model ? find_json(*model, {"tasks"}) : nullptr;
  if (!tasks) return {};
  std::string body;
  for (const auto& [name, task] : tasks->items()) {
    const Json* classes = find_json(task, {"worst_classes"});
    if (!classes || !classes->is_array() || classes->empty()) continue;
    std::string rows;
    for (const Json& row : *classes) {
      const auto f1 = number_at(row, "f1"), teacher = number_at(row, "f1_teacher"), n = number_at(row, "n");
      rows += str("<tr><td>", details_text(row, "label"), "</td>", details_bar(f1.value_or(0), f1 ? show_number(Unit::share, *f1) : "–"), details_bar(teacher.value_or(0), teacher ? show_number(Unit::share, *teacher) : "–", "dim"), "<td class=\"num\">", f1 && teacher ? show_points(*f1 - *teacher) : "–", "</td><td class=\"num\">", n ? fixed(*n, 0) : "–", "</td></tr>\n");
    }
    body += str("<h3>", html_escape(name), "</h3><div class=\"scroll\"><table><thead><tr><th>class</th><th class=\"num\">F1</th><th class=\"num\">F1 of the teacher</th><th class=\"num\">points</th><th class=\"num\">examples</th></tr></thead><tbody>", rows, "</tbody></table></div>");
  }
  return details_section("classes", "Weakest classes", str("Of ", html_escape(model->value("name", "")), ", beside the teacher."), body);
}

std::string html_predictions(const Json& report) {
  double longest = 0, largest = 0;
  bool device = false;  // a run on the CPU has no column for a GPU
  for (const Json& stage : report.at("stages")) {
    device = device || number_at(stage, "peak_device_memory_bytes");
    longest = std::max(longest, number_at(stage, "seconds").value_or(0));
    largest = std::max(largest, number_at(stage, "peak_memory_bytes").value_or(0));
  }
  if (longest <= 0 && largest <= 0) return {};
  std::string rows;
  const auto predicted = [](const Json& stage, const char* key, Unit unit) {
    const Json* row = find_json(stage, {"predicted", key});
    if (!row) return std::string("<td class=\"num\">–</td>");
    const auto expected = number_at(*row, "predicted"), ratio = number_at(*row, "ratio");
    const bool far = ratio && (*ratio > 1.5 || *ratio < 0.667);
    return str("<td class=\"num\">", expected ? show_number(unit, *expected) : "–", ratio ? str(" <small class=\"", far ? "off" : "near", "\">", show_times(*ratio), "</small>") : std::string(), "</td>");
  };
  const auto gpu = [&](const Json& stage) {
    if (!device) return std::string();
    const auto bytes = number_at(stage, "peak_device_memory_bytes"), joules = number_at(stage, "energy_joules");
    return str("<td class=\"num\">", bytes ? show_number(Unit::bytes, *bytes) : "–", "</td><td class=\"num\">", joules ? show_number(Unit::joules, *joules) : "–", "</td>");
  };
  for (const Json& stage : report.at("stages")) {
    const auto seconds = number_at(stage, "seconds"), cpu = number_at(stage, "cpu_seconds"), memory = number_at(stage, "peak_memory_bytes");
    rows += str("<tr><td>", html_escape(stage.value("name", "")), stage.value("reused", false) ? " <span class=\"tag\">reused</span>" : "", "</td>", details_bar(longest > 0 ? seconds.value_or(0) / longest : 0, seconds ? show_number(Unit::seconds, *seconds) : "–"), predicted(stage, "seconds", Unit::seconds), "<td class=\"num\">", cpu ? show_number(Unit::seconds, *cpu) : "–", "</td>", details_bar(largest > 0 ? memory.value_or(0) / largest : 0, memory ? show_number(Unit::bytes, *memory) : "–"), predicted(stage, "peak_memory_bytes", Unit::bytes), gpu(stage), predicted(stage, "bytes", Unit::bytes), "</tr>\n");
  }
  const Json& totals = report.at("totals");
  rows += str("<tr class=\"total\"><td>total</td><td class=\"num\">", show_number(Unit::seconds, number_at(totals, "seconds").value_or(0)), "</td><td></td><td class=\"num\">", number_at(totals, "cpu_seconds").value_or(0) > 0 ? show_number(Unit::seconds, *number_at(totals, "cpu_seconds")) : "–", "</td><td class=\"num\">", largest > 0 ? show_number(Unit::bytes, largest) : "–", "</td><td></td>", device ? "<td></td><td></td>" : "", "<td></td></tr>\n");
  return details_section("cost", "Time and memory", str("Measured, beside what <code>plan</code> predicted (× is measured over predicted). A reused stage shows the cost of its first run.", device ? " Energy is that of the GPU alone, other programs on it included." : ""), str("<div class=\"scroll\"><table><thead><tr><th>stage</th><th class=\"num\">time</th><th class=\"num\">predicted</th><th class=\"num\">CPU time</th><th class=\"num\">peak memory</th><th class=\"num\">predicted</th>", device ? "<th class=\"num\">GPU memory</th><th class=\"num\">GPU energy</th>" : "", "<th class=\"num\">size predicted</th></tr></thead><tbody>", rows, "</tbody></table></div>"));
}

std::string html_lineage(const Json& report) {
  std::string rows;
  const auto row = [&](const std::string& what, const std::string& name, const std::string& hash) {
    rows += str("<tr><td>", html_escape(what), "</td><td>", html_escape(name), "</td><td class=\"mono hash\">", html_escape(hash), "</td></tr>\n");
  };
  const auto text = [](const Json& value) { return value.is_string() ? value.get<std::string>() : value.dump(); };
  if (const Json* sha = find_json(report, {"recipe_sha256"})) row("recipe", "recipe.yaml", text(*sha));
  if (const Json* data = find_json(report, {"data"}); data && data->is_object()) {
    for (const auto& [split, entry] : data->items()) {
      const auto examples = number_at(entry, "examples"), truncated = number_at(entry, "truncated");
      const Json* hash = find_json(entry, {"hash"});
      row("data", str(split, examples ? str(", ", fixed(*examples, 0), " examples") : std::string(), truncated && *truncated > 0 ? str(", ", fixed(*truncated, 0), " truncated") : std::string()), hash ? text(*hash) : "–");
    }
  }
  for (const Json& stage : report.at("stages")) {
    if (const Json* key = find_json(stage, {"key"})) row(stage.value("name", ""), "key: inputs, options, seed, code", text(*key));
    if (const Json* outputs = find_json(stage, {"outputs"}); outputs && outputs->is_object()) {
      for (const auto& [file, hash] : outputs->items()) row(stage.value("name", ""), file, text(hash));
    }
  }
  if (rows.empty()) return {};
  return details_section("lineage", "Lineage", "SHA-256 of what went in and what came out.", str("<details><summary>hashes</summary><div class=\"scroll\"><table><thead><tr><th>of</th><th>what</th><th>hash</th></tr></thead><tbody>", rows, "</tbody></table></div></details>"));
}

}  // namespace kompakt
