#include "report/calibration.h"

#include <cmath>

#include "core/text.h"
#include "report/metrics.h"

namespace kompakt {

std::vector<std::string> calibration_lines(const Json& report) {
  std::vector<std::string> lines;
  const Json* stages = find_json(report, {"stages"});
  if (!stages || !stages->is_array()) return lines;
  for (const Json& stage : *stages) {
    const Json* set = find_json(stage, {"details", "calibration"});
    const auto tokens = set && set->is_object() ? number_at(*set, "tokens") : std::nullopt;
    if (!tokens) continue;
    const auto text = [](const std::optional<double>& value) { return value ? str(std::llround(*value)) : std::string("–"); };
    std::string line = str(stage.is_object() ? stage.value("name", "–") : "–", ": ", text(tokens), " tokens in ", text(number_at(*set, "sequences")), " sequences");
    if (const auto each = number_at(*set, "tokens_per_input")) line += str(", ", fixed(*each, 1), " for each input of the widest layer");
    if (const Json* sha = find_json(*set, {"sha256"}); sha && sha->is_string()) line += str(", SHA-256 ", sha->get<std::string>().substr(0, 16), "…");
    if (const Json* weights = find_json(*set, {"token_weights"}); weights && weights->is_object()) {
      const auto least = number_at(*weights, "least_effective_tokens");
      line += str("; weighted by ", weights->value("by", "–"), least ? str(", worth ", text(*least), " tokens for the layer that trusts the fewest") : std::string());
    }
    if (const auto unsteady = number_at(*set, "layers_whose_halves_disagree"); unsteady && *unsteady > 0) line += str("; two halves of it disagree in ", text(*unsteady), " layers");
    lines.push_back(line + ".");
  }
  return lines;
}

}  // namespace kompakt
