#include "report/masked_size.h"

#include "core/text.h"
#include "report/metrics.h"

namespace kompakt {

std::vector<std::string> masked_size_lines(const Json& report) {
  std::vector<std::string> lines;
  const Json* stages = find_json(report, {"stages"});
  if (!stages || !stages->is_array()) return lines;
  for (const Json& stage : *stages) {
    // Of a stage that has chosen zeros: prune, or quantize with sparse.
    if (const Json* sparsity = find_json(stage, {"details", "sparsity"}); sparsity && sparsity->is_object()) {
      const double weights = number_at(*sparsity, "weights").value_or(0), zeros = number_at(*sparsity, "zeros").value_or(0);
      const auto matrices = sparsity->contains("layers") && sparsity->at("layers").is_array() ? sparsity->at("layers").size() : 0;
      const auto text = [&](const char* key) { return json_get_or<std::string>(*sparsity, key, "details.sparsity", ""); };
      if (weights > 0) lines.push_back(str(stage.value("name", ""), ": ", fixed(100 * zeros / weights, 1), "% of the weights of ", matrices, matrices == 1 ? " matrix" : " matrices", " is zero (", text("criterion"), ", ", text("pattern"), ")"));
    }
    const Json* reopened = find_json(stage, {"details", "reopened"});
    if (!reopened || !reopened->is_object()) continue;
    for (const auto& [format, proof] : reopened->items()) {
      const auto bytes = number_at(proof, "bytes"), packed = number_at(proof, "zstd_bytes");
      const Json* masked = find_json(proof, {"masked"});
      const double weights = masked ? number_at(*masked, "weights").value_or(0) : 0, zeros = masked ? number_at(*masked, "zeros").value_or(0) : 0;
      if (!bytes || !packed || weights <= 0) continue;
      lines.push_back(str(format, ": ", human_bytes(*bytes), " on disk, ", human_bytes(*packed), " after zstd; ", fixed(100 * zeros / weights, 1), "% of the pruned matrices is zero, stored like any weight"));
    }
  }
  return lines;
}

}  // namespace kompakt
