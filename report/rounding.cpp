#include "report/rounding.h"

#include <algorithm>
#include <map>

#include "core/text.h"
#include "report/metrics.h"
#include "report/verdict.h"

namespace kompakt {
namespace {

struct RoundingGroup {
  std::vector<double> scales;
  double error = 0;
  void add(const Json& row, const char* scale, const char* error_key) {
    if (const auto value = number_at(row, scale)) scales.push_back(*value);
    error = std::max(error, number_at(row, error_key).value_or(0));
  }
};

// "model.layers.3.mlp.down_proj" -> "mlp.down_proj": what stands behind the number of the layer.
std::string rounding_part(const std::string& name) {
  for (std::size_t i = 0; i + 1 < name.size(); ++i) {
    if (name[i] != '.' || name[i + 1] < '0' || name[i + 1] > '9') continue;
    const std::size_t end = name.find('.', i + 1);
    if (end != std::string::npos) return name.substr(end + 1);
  }
  return name;
}

std::string rounding_text(const Json& object) {
  const Json* calibration = find_json(object, {"calibration"});
  const auto tokens = calibration && calibration->is_object() ? number_at(*calibration, "tokens") : std::nullopt;
  return tokens ? str(" Calibrated on ", show_number(Unit::count, *tokens), " tokens (clip ", object.value("clip", "–"), ").") : std::string();
}

}  // namespace

std::vector<RoundingView> rounding_views(const Json& report) {
  std::vector<RoundingView> views;
  for (const Json& stage : report.at("stages")) {
    RoundingView view;
    view.stage = stage.value("name", "");
    std::vector<std::pair<std::string, RoundingGroup>> groups;
    const auto group = [&](const std::string& name) -> RoundingGroup& {
      for (auto& [known, value] : groups)
        if (known == name) return value;
      return groups.emplace_back(name, RoundingGroup()).second;
    };
    if (const Json* row = find_json(stage, {"details", "activations"}); row && row->is_object()) {
      const auto kept = number_at(*row, "kept_in_float").value_or(0);
      view.lines.push_back(str("Inputs of ", show_number(Unit::count, number_at(*row, "linears").value_or(0)), " linears: ", row->value("format", "–"), ", ", row->value("mode", "–") == "dynamic" ? "a scale per token" : "one static scale each",
                               row->value("symmetric", true) ? "" : ", with a zero point", kept > 0 ? str("; ", show_number(Unit::count, kept), " stay as they are") : std::string(), ".", rounding_text(*row)));
      if (const Json* inputs = find_json(*row, {"inputs"}); inputs && inputs->is_array())
        for (const Json& input : *inputs)
          if (input.is_object()) group("input of " + rounding_part(input.value("input", "–"))).add(input, "scale", "error");
    }
    if (const Json* row = find_json(stage, {"details", "kv_cache"}); row && row->is_object()) {
      view.lines.push_back(str("Keys and values: ", row->value("format", "–"), ", one scale each per layer.", rounding_text(*row)));
      if (const Json* layers = find_json(*row, {"layers"}); layers && layers->is_array())
        for (const Json& layer : *layers)
          if (layer.is_object()) group("keys").add(layer, "key_scale", "key_error"), group("values").add(layer, "value_scale", "value_error");
    }
    if (view.lines.empty()) continue;
    view.lines.push_back("All figures of this stage and of the artifact are measured with this rounding.");
    for (auto& [name, values] : groups) {
      if (values.scales.empty()) continue;
      std::sort(values.scales.begin(), values.scales.end());
      const auto text = [](double value) { return show_number(Unit::small_number, value); };
      view.rows.push_back({name, text(values.scales.front()), text(values.scales[values.scales.size() / 2]), text(values.scales.back()), text(values.error)});
    }
    views.push_back(std::move(view));
  }
  return views;
}

}  // namespace kompakt
