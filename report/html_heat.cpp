// The heat map of what pruning removed: one column for every layer that there was.
#include <algorithm>
#include <cmath>
#include <map>
#include <optional>

#include "core/text.h"
#include "report/html.h"
#include "report/metrics.h"
#include "report/verdict.h"

namespace kompakt {
namespace {

constexpr double heat_left = 112, heat_width = 1040, heat_gap = 3;

struct HeatUnits {
  std::vector<double> depth;  // 0 to 1: relative importance; or the share that is gone
  std::vector<bool> gone;
  std::string title;
};
struct HeatRow {
  std::string label;
  double height = 0;
  std::map<std::int64_t, HeatUnits> cells;  // by layer before the stage
};

std::vector<double> heat_numbers(const Json* list) {
  std::vector<double> out;
  if (list && list->is_array())
    for (const Json& value : *list)
      if (value.is_number() && std::isfinite(value.get<double>())) out.push_back(value.get<double>());
  return out;
}

const Json* heat_at(const Json* list, std::size_t i) { return list && list->is_array() && i < list->size() ? &(*list)[i] : nullptr; }

// Importance spans orders of magnitude: square roots of the share of the largest.
std::vector<double> heat_depth(std::vector<double> values) {
  const double most = values.empty() ? 0 : *std::max_element(values.begin(), values.end());
  for (double& value : values) value = most > 0 ? 0.12 + 0.88 * std::sqrt(std::max(0.0, value) / most) : 0.5;
  return values;
}

// Numbers that layers had before the stage, of those that stay; `gone` out of `before`.
std::vector<std::int64_t> heat_left_layers(std::int64_t before, const std::vector<double>& gone) {
  std::vector<std::int64_t> out;
  for (std::int64_t layer = 0; layer < before; ++layer)
    if (std::none_of(gone.begin(), gone.end(), [&](double g) { return static_cast<std::int64_t>(g) == layer; })) out.push_back(layer);
  return out;
}

// [[layer, before, after], ...] of the layers that stay.
void heat_structured(const Json& details, const std::vector<std::int64_t>& left, std::vector<HeatRow>& rows) {
  struct Kind {
    const char *key, *label, *unit, *share;
    double height;
  };
  for (const Kind& kind : {Kind{"ffn", "feed-forward", "neurons", "ffn_share_kept", 64}, Kind{"heads", "heads", "heads", "heads_share_kept", 64}}) {
    const Json* list = find_json(details, {"removed", kind.key});
    if (!list || !list->is_array()) continue;
    HeatRow row{kind.label, kind.height, {}};
    for (std::size_t i = 0; i < list->size() && i < left.size(); ++i) {
      const std::vector<double> numbers = heat_numbers(&(*list)[i]);
      if (numbers.size() != 3 || numbers[1] <= 0) continue;
      HeatUnits units;
      const std::vector<double> scores = heat_numbers(heat_at(find_json(details, {"importance", kind.key}), i)), shares = heat_numbers(find_json(details, {"importance", kind.share}));
      const bool heads = std::string_view(kind.key) == "heads";
      const std::size_t parts = !scores.empty() ? scores.size() : heads && numbers[1] <= 64 ? static_cast<std::size_t>(numbers[1]) : 16;
      units.depth = scores.empty() ? std::vector<double>(parts, 0.55) : heat_depth(scores);
      units.gone.assign(parts, false);
      const Json* kept = heads ? heat_at(find_json(details, {"importance", "kept_heads"}), i) : nullptr;
      if (kept) {
        units.gone.assign(parts, true);
        for (const double head : heat_numbers(kept))
          if (head >= 0 && head < static_cast<double>(parts)) units.gone[static_cast<std::size_t>(head)] = false;
      } else {  // sorted by importance: the last ones went
        const auto stay = static_cast<std::size_t>(std::llround(static_cast<double>(parts) * std::clamp(numbers[2] / numbers[1], 0.0, 1.0)));
        for (std::size_t p = stay; p < parts; ++p) units.gone[p] = true;
      }
      units.title = str(fixed(numbers[1] - numbers[2], 0), " of ", fixed(numbers[1], 0), " ", kind.unit, " gone", i < shares.size() ? str(", ", fixed(100 * shares[i], 1), "% of the importance stays") : std::string());
      row.cells[left[i]] = std::move(units);
    }
    if (!row.cells.empty()) rows.push_back(std::move(row));
  }
}

// Share of zeros of every matrix: "model.layers.3.mlp.up_proj" is row up_proj, column 3.
void heat_sparse(const Json& details, std::vector<HeatRow>& rows, std::int64_t& layers) {
  const Json* list = find_json(details, {"sparsity", "layers"});
  if (!list || !list->is_array()) return;
  const std::size_t first = rows.size();
  for (const Json& entry : *list) {
    const auto share = number_at(entry, "sparsity");
    const std::string name = entry.value("layer", "");
    std::optional<std::int64_t> layer;
    std::string kind;  // what stands behind the number
    for (const std::string& part : split(name, '.')) {
      if (layer) kind += str(kind.empty() ? "" : ".", part);
      else layer = parse_int(part);
    }
    if (!share || !layer || *layer < 0 || *layer > 4096) continue;
    kind = kind.substr(kind.rfind('.', kind.size() > 6 && ends_with(kind, ".dense") ? kind.size() - 7 : std::string::npos) + 1);
    auto row = std::find_if(rows.begin() + static_cast<std::ptrdiff_t>(first), rows.end(), [&](const HeatRow& r) { return r.label == kind; });
    if (row == rows.end()) row = rows.insert(rows.end(), HeatRow{kind, 15, {}});
    layers = std::max(layers, *layer + 1);
    const auto error = number_at(entry, "output_error");
    row->cells[*layer] = {{std::clamp(*share, 0.0, 1.0)}, {true}, str(fixed(100 * *share, 1), "% of the weights are zero", error ? str(", error of the outputs ", show_number(Unit::small_number, *error)) : std::string())};
  }
}

}  // namespace

std::string svg_removed(const Json& details) {
  const std::vector<double> gone = heat_numbers(find_json(details, {"removed", "layers"})), depth = heat_numbers(find_json(details, {"removed", "depth"}));
  std::int64_t layers = depth.size() == 2 ? static_cast<std::int64_t>(depth[0]) : 0;
  for (const char* key : {"ffn", "heads"})
    if (const Json* list = find_json(details, {"removed", key}); layers == 0 && list && list->is_array()) layers = static_cast<std::int64_t>(list->size());
  if (layers < 0 || layers > 4096) return {};
  std::vector<HeatRow> rows;
  const std::vector<std::int64_t> left = heat_left_layers(layers, depth.size() == 2 ? gone : std::vector<double>());
  if (depth.size() == 2 && !gone.empty()) {
    HeatRow row{"layer", 18, {}};
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      const bool stays = std::find(left.begin(), left.end(), layer) != left.end();
      row.cells[layer] = {{stays ? 0.35 : 1.0}, {!stays}, stays ? "stays" : "the whole layer is gone"};
    }
    rows.push_back(std::move(row));
  }
  heat_structured(details, left, rows);
  heat_sparse(details, rows, layers);
  if (rows.empty() || layers == 0) return {};
  const double step = std::min(40.0, (heat_width - heat_left - 8) / static_cast<double>(layers)), cell = std::max(1.0, step - heat_gap);
  double height = 22;
  for (const HeatRow& row : rows) height += row.height + 8;
  std::string svg = str("<svg class=\"chart\" viewBox=\"0 0 ", fixed(heat_width, 0), " ", fixed(height, 0), "\" role=\"img\" aria-label=\"what was removed from which layer\">\n");
  double y = 2;
  for (const HeatRow& row : rows) {
    svg += str("<text x=\"", fixed(heat_left - 8, 1), "\" y=\"", fixed(y + row.height / 2 + 4, 1), "\" class=\"tick end\">", html_escape(row.label), "</text>\n");
    for (const auto& [layer, units] : row.cells) {
      const double x = heat_left + step * static_cast<double>(layer), part = row.height / static_cast<double>(units.depth.size());
      svg += str("<g><title>", html_escape(str("layer ", layer, ": ", units.title)), "</title><rect x=\"", fixed(x, 1), "\" y=\"", fixed(y, 1), "\" width=\"", fixed(cell, 1), "\" height=\"", fixed(row.height, 1), "\" class=\"slot\"/>");
      for (std::size_t p = 0; p < units.depth.size(); ++p)
        svg += str("<rect x=\"", fixed(x, 1), "\" y=\"", fixed(y + part * static_cast<double>(p), 2), "\" width=\"", fixed(cell, 1), "\" height=\"", fixed(std::max(0.5, part - (units.depth.size() <= 24 && units.depth.size() > 1 ? 1 : 0)), 2), "\" class=\"",
                   units.gone[p] ? "gone" : "stays", "\" fill-opacity=\"", fixed(units.gone[p] && units.depth.size() > 1 ? std::max(0.4, units.depth[p]) : units.depth[p], 2), "\"/>");
      svg += "</g>\n";
    }
    y += row.height + 8;
  }
  const std::int64_t every = step >= 20 ? 1 : step >= 10 ? 2 : 5;
  for (std::int64_t layer = 0; layer < layers; layer += every) svg += str("<text x=\"", fixed(heat_left + step * static_cast<double>(layer) + cell / 2, 1), "\" y=\"", fixed(y + 10, 1), "\" class=\"tick middle\">", layer, "</text>\n");
  svg += str("<text x=\"", fixed(heat_left - 8, 1), "\" y=\"", fixed(y + 10, 1), "\" class=\"tick end\">layer</text>\n");
  return svg + "</svg>\n<p class=\"legend\"><span class=\"key gone\">gone</span><span class=\"key stays\">stays; the deeper, the more important (in its layer)</span></p>\n";
}

std::string html_search(const Json& report) {
  std::string body;
  for (const Json& stage : report.at("stages")) {
    const Json* search = find_json(stage, {"details", "search"});
    if (!search || !search->is_object()) continue;
    const auto label = [](const Json& point) {
      const auto number = [&](const char* key) { return number_at(point, key).value_or(0); };
      return str(fixed(number("layers"), 0), " layers, ffn ", fixed(number("ffn"), 0), ", ", fixed(number("heads"), 0), " heads", point.value("vocabulary", "all") == "used" ? ", used vocabulary" : "");
    };
    const auto points = [&](const char* key, bool labels) {
      std::vector<ScatterPoint> out;
      const Json* list = find_json(*search, {key});
      if (!list || !list->is_array()) return out;
      for (const Json& point : *list) {
        const auto bytes = number_at(point, "bytes"), y = number_at(point, "predicted_kl");
        if (bytes && y && *bytes > 0) out.push_back({labels ? label(point) : std::string(), *bytes, *y, {}, {}, "stage"});
      }
      return out;
    };
    std::vector<ScatterPoint> cloud = points("candidates", true);
    std::vector<ScatterPoint> line = points("frontier", false);
    const std::string chart = line.size() > 1 ? svg_scatter(line, "bytes of the file", "predicted divergence", false, cloud) : std::string();
    body += str("<h3>", html_escape(stage.value("name", "")), "</h3>");
    if (!chart.empty()) body += str("<figure><figcaption>joined: no other choice is both smaller and closer; grey: the best formats of every shape under the budget</figcaption>", chart, "</figure>\n");
    std::string rows;
    const Json* list = find_json(*search, {"candidates"});
    const Json* chosen = find_json(*search, {"chosen"});
    std::size_t shown = 0;
    if (list && list->is_array())
      for (const Json& point : *list) {
        if (++shown > 24) break;
        const auto cell = [&](const char* key, Unit unit) {
          const auto value = number_at(point, key);
          return str("<td class=\"num\">", value ? show_number(unit, *value) : "–", "</td>");
        };
        rows += str("<tr", chosen && *chosen == point ? " class=\"artifact\"" : "", "><td>", html_escape(label(point)), "</td>", cell("bytes", Unit::bytes), cell("structure_kl", Unit::small_number), cell("formats_kl", Unit::small_number), cell("predicted_kl", Unit::small_number), cell("measured_kl", Unit::small_number), "</tr>\n");
      }
    if (!rows.empty()) body += str("<div class=\"scroll\"><table><thead><tr><th>shape</th><th class=\"num\">file</th><th class=\"num\">of structure</th><th class=\"num\">of formats</th><th class=\"num\">predicted</th><th class=\"num\">measured</th></tr></thead><tbody>", rows, "</tbody></table></div>");
  }
  if (body.empty()) return {};
  return str("<section id=\"search\"><h2>Search under a budget</h2>\n<p class=\"lead\">Divergence from the model before the stage, in nats a prediction, on its calibration tokens: predicted by adding up, measured for the best few.</p>\n", body, "</section>\n");
}

}  // namespace kompakt
