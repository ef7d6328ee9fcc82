#include "report/masked_size.h"

#include "core/text.h"
#include "report/metrics.h"

namespace kompakt {

std::vector<std::string> masked_size_lines(const Json& report) {
  std::vector<std::string> lines;
  const Json* stages = find_json(report, {"stages"});
  if (!stages || !stages->is_array()) return lines;
  for (const Json& stage : *stages) {
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
