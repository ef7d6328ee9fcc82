// report.html: the verdict first, then the evidence, then how it was made.
#include <algorithm>
#include <cmath>

#include "core/text.h"
#include "report/calibration.h"
#include "report/gates.h"
#include "report/html.h"
#include "report/masked_size.h"
#include "report/metrics.h"
#include "report/report.h"
#include "report/table.h"
#include "report/verdict.h"

namespace kompakt {

std::string html_escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      case '\t': case '\n': case '\r': out += c; break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) out += "\xEF\xBF\xBD";
        else out += c;
    }
  }
  return out;
}

namespace {

std::string page_text(const Json& value) { return html_escape(value.is_string() ? value.get<std::string>() : value.dump()); }

std::string page_list(const char* id, const char* style, const char* title, const std::vector<std::string>& lines) {
  if (lines.empty()) return {};
  std::string items;
  for (const std::string& line : lines) items += str("<li>", html_escape(line), "</li>\n");
  return str("<section id=\"", id, "\" class=\"", style, "\"><h2>", title, "</h2><ul>\n", items, "</ul></section>\n");
}

std::vector<std::string> page_lines(const Json& list) {
  std::vector<std::string> lines;
  for (const Json& line : list) lines.push_back(line.is_string() ? line.get<std::string>() : line.dump());
  return lines;
}

std::string page_header(const Json& report) {
  std::string meta;
  const auto add = [&](const std::string& text) { meta += str("<span>", html_escape(text), "</span>"); };
  if (const Json* version = find_json(report, {"kompakt_version"})) add(str("kompakt ", version->is_string() ? version->get<std::string>() : version->dump()));
  if (const Json* seed = find_json(report, {"seed"})) add(str("seed ", seed->dump()));
  if (const Json* started = find_json(report, {"started"})) add(started->is_string() ? started->get<std::string>() : started->dump());
  if (const Json* processor = find_json(report, {"environment", "processor"})) add(processor->is_string() ? processor->get<std::string>() : processor->dump());
  if (const auto seconds = number_at(report.at("totals"), "seconds"); seconds && *seconds > 0) add(str(human_seconds(*seconds), " in ", report.at("stages").size(), " stages"));
  return str("<header class=\"top\"><p class=\"name\">", page_text(report.at("name")), "</p>\n<h1>", page_text(report.at("verdict")), "</h1>\n<p class=\"meta\">", meta, "</p></header>\n");
}

std::string page_tiles(const Json& report) {
  const Json* model = final_model(report);
  if (!model) return {};
  const Json* teacher = find_json(report, {"teacher"});
  std::string tiles;
  for (const char* key : {"bytes", "accuracy", "macro_f1", "perplexity", "kl", "top1_agreement", "bits_per_weight", "latency_ms", "tokens_per_second", "peak_memory_bytes"}) {
    const Metric& metric = *find_metric(key);
    const auto value = number_at(*model, key), theirs = teacher ? number_at(*teacher, key) : std::nullopt;
    if (!value) continue;
    const auto low = number_at((*model)[key], "low"), high = number_at((*model)[key], "high");
    const std::string range = low && high ? str("95%: ", show_number(metric.unit, *low), " – ", show_number(metric.unit, *high)) : std::string();
    tiles += str("<div class=\"tile", tiles.empty() ? " main" : "", "\"><span>", metric.title, "</span><b>", show_number(metric.unit, *value), "</b><small>", theirs ? str("teacher ", show_number(metric.unit, *theirs)) : range, "</small></div>\n");
  }
  return tiles.empty() ? tiles : str("<div class=\"tiles\">", tiles, "</div>\n");
}

std::string page_gates(const Json& report) {
  const auto gates = gates_from_json(report.at("gates"));
  if (gates.empty()) return {};
  const auto met = std::count_if(gates.begin(), gates.end(), [](const GateResult& g) { return g.met; });
  std::string items;
  for (const bool wanted : {false, true}) {
    for (const GateResult& gate : gates) {
      if (gate.met != wanted) continue;
      std::string note = gate_figures(gate);
      if (!gate.note.empty()) note += str(note.empty() ? "" : " · ", gate.note);
      items += str("<li><span class=\"pill ", gate.met ? "yes\">met" : "no\">not met", "</span><code>", html_escape(gate.text), "</code><span class=\"note\">", html_escape(note), "</span></li>\n");
    }
  }
  return str("<section id=\"gates\"", met == static_cast<std::ptrdiff_t>(gates.size()) ? "" : " class=\"worse\"", "><h2>Gates <small>", met, " of ", gates.size(), " met</small></h2><ul class=\"plain\">\n", items, "</ul></section>\n");
}

std::string page_models(const Json& report) {
  const ModelTable table = model_table(report, false);
  const auto rows = table_rows(report, false);
  if (rows.empty()) return {};
  std::vector<double> largest(table.metrics.size(), 0);  // bars start at zero: a longer one is that much more
  for (std::size_t c = 0; c < table.metrics.size(); ++c) {
    for (const Json* row : rows) {
      largest[c] = std::max(largest[c], number_at(*row, table.metrics[c]).value_or(0));
    }
  }
  std::string head, body;
  for (std::size_t c = 0; c < table.header.size(); ++c) {
    const Metric* metric = c ? find_metric(table.metrics[c - 1]) : nullptr;
    head += str("<th", c ? " class=\"num\"" : "", metric ? str(" title=\"", html_escape(metric->summary), "\"") : std::string(), ">", html_escape(table.header[c]), "</th>");
  }
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const std::string name = rows[r]->value("name", "");
    const bool teacher = rows[r] == find_json(report, {"teacher"}), artifact = rows[r] == find_json(report, {"artifact"});
    body += str("<tr class=\"", teacher ? "teacher" : artifact ? "artifact" : "stage", "\"><td>", html_escape(name), rows[r]->value("reused", false) ? " <span class=\"tag\">reused</span>" : "", "</td>");
    for (std::size_t c = 0; c < table.metrics.size(); ++c) {
      const std::string& cell = table.rows[r][c + 1];
      const Metric* metric = find_metric(table.metrics[c]);
      const auto value = number_at(*rows[r], table.metrics[c]);
      const std::size_t plus = cell.find(" ±");
      const std::string shown = plus == std::string::npos ? html_escape(cell) : str(html_escape(cell.substr(0, plus)), " <small>", html_escape(cell.substr(plus + 1)), "</small>");
      const std::string title = metric && cell == "–" ? str(" title=\"", html_escape([&] { const Json* reason = find_json(*rows[r], {"nulls", metric->name}); return reason && reason->is_string() ? reason->get<std::string>() : std::string("not measured"); }()), "\"") : std::string();
      if (metric && value && largest[c] > 0) {
        body += str("<td class=\"num bar\" style=\"--share:", fixed(100 * std::max(*value, 0.0) / largest[c], 1), "%\"><span>", shown, "</span></td>");
      } else {
        body += str("<td class=\"num\"", title, ">", shown, "</td>");
      }
    }
    body += "</tr>\n";
  }
  std::string protocol;
  if (const Json* model = final_model(report)) {
    std::vector<std::string> parts;
    if (const Json* task = find_json(*model, {"task"})) {
      const auto n = number_at(*model, "n");
      parts.push_back(str("scores on ", task->is_string() ? task->get<std::string>() : task->dump(), n ? str(", ", fixed(*n, 0), " examples") : std::string()));
    }
    if (const Json* text = find_json(*model, {"text"}); text && text->is_string()) {
      const Json* how = find_json(*model, {"language", text->get<std::string>().c_str(), "protocol"});
      parts.push_back(str("perplexity on ", text->get<std::string>(), how && how->is_string() ? str(" (", how->get<std::string>(), ")") : std::string()));
    }
    if (const Json* how = find_json(*model, {"embeddings", "test", "protocol"}); how && how->is_string()) parts.push_back(how->get<std::string>());
    if (const Json* latency = find_json(*model, {"latency_protocol"}); latency && latency->is_string()) parts.push_back(str("latency: ", latency->get<std::string>()));
    parts.emplace_back("± is half of the 95% interval; size and bits/weight count whole files");
    protocol = join(parts, "; ");
  }
  std::string versus;
  if (const Json* model = final_model(report)) {
    if (const Json* pair = find_json(*model, {"versus_teacher"})) {
      const auto p = number_at(*pair, "mcnemar_p"), same = number_at(*pair, "agreement");
      if (p || same) versus = str("<p class=\"lead\">", html_escape(model->value("name", "")), " against teacher", same ? str(": the same label in ", show_number(Unit::share, *same)) : std::string(), p ? str(same ? ", " : ": ", "McNemar p = ", *p < 0.001 ? std::string("&lt; 0.001") : fixed(*p, 3)) : std::string(), ".</p>");
    }
  }
  return str("<section id=\"models\"><h2>Models</h2>\n<p class=\"lead\">", html_escape(protocol), ".</p>\n<div class=\"scroll\"><table><thead><tr>", head, "</tr></thead><tbody>\n", body, "</tbody></table></div>", versus, "</section>\n");
}

std::string page_size_chart(const Json& report) {
  std::string charts;
  for (const char* key : {"accuracy", "perplexity"}) {
    const Metric& metric = *find_metric(key);
    std::vector<ScatterPoint> points;
    for (const Json* row : model_rows(report)) {
      const auto bytes = number_at(*row, "bytes"), score = number_at(*row, key);
      if (!bytes || !score || *bytes <= 0 || same_as_teacher(report, *row)) continue;
      ScatterPoint point;
      point.label = row->value("name", "");
      point.x = *bytes;
      point.y = *score;
      point.low = number_at((*row)[key], "low");
      point.high = number_at((*row)[key], "high");
      point.kind = row == find_json(report, {"teacher"}) ? "teacher" : row == find_json(report, {"artifact"}) ? "artifact" : "stage";
      points.push_back(point);
    }
    if (points.size() > 1) charts += str("<figure>", svg_scatter(points, "bytes of whole files (logarithmic)", metric.title, metric.unit == Unit::share), "</figure>\n");
  }
  if (charts.empty()) return {};
  return str("<section id=\"size\"><h2>Size and quality</h2><p class=\"lead\">The path from teacher to artifact; whiskers are 95% intervals.</p>", charts, "</section>\n");
}

std::string page_environment(const Json& report) {
  const Json* environment = find_json(report, {"environment"});
  if (!environment || !environment->is_object() || environment->empty()) return {};
  std::string items;
  for (const auto& [key, value] : environment->items()) items += str("<dt>", html_escape(replace_all(key, "_", " ")), "</dt><dd>", page_text(value), "</dd>\n");
  return str("<section id=\"environment\"><h2>Environment</h2><dl>", items, "</dl></section>\n");
}

}  // namespace

std::string report_html(const Json& report) {
  return str("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
             "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n<title>",
             page_text(report.at("name")), " – kompakt report</title>\n<style>", html_style(), "</style></head>\n<body><main>\n", page_header(report), page_tiles(report), page_list("worse", "worse", "What got worse", page_lines(report.at("regressions"))), page_gates(report), page_models(report), html_before_after(report), page_size_chart(report),
             html_classes(report), html_predictions(report), html_curves(report), html_removed(report), html_search(report), html_budget(report), html_tuning(report), html_rounding(report), html_layers(report), page_list("calibration", "", "Calibration", calibration_lines(report)), page_list("masked", "", "Masked weights", masked_size_lines(report)), page_list("not-measured", "", "Not measured", not_measured(report)), page_list("warnings", "warn", "Warnings", page_lines(report.at("warnings"))), page_environment(report), html_lineage(report),
             "<footer>Made by kompakt from the files of the run folder; nothing on this page is loaded from elsewhere.</footer>\n</main></body></html>\n");
}

}  // namespace kompakt
