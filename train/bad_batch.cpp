#include "train/bad_batch.h"

#include <cmath>

#include "core/error.h"
#include "core/json.h"
#include "core/text.h"

namespace kompakt {

void stop_for_bad_batch(const std::filesystem::path& folder, const std::string& title, const std::vector<TokenBatch>& batches, const StepRecord& record, bool write) {
  Json json = {{"step", record.step}, {"loss", record.loss}, {"gradient_norm", record.gradient_norm}, {"parts", Json::object()}, {"micro_batches", Json::array()}};
  for (const auto& [name, value] : record.parts) json["parts"][name] = value;
  for (const TokenBatch& batch : batches) {
    Json rows = Json::array();
    for (std::int64_t r = 0; r < batch.rows; ++r) {
      const auto first = batch.ids.begin() + r * batch.columns;
      rows.push_back({{"example", batch.examples.empty() ? -1 : batch.examples[static_cast<std::size_t>(r)]}, {"label", batch.labels.empty() ? -1 : batch.labels[static_cast<std::size_t>(r)]},
                      {"ids", std::vector<std::int64_t>(first, first + (batch.lengths.empty() ? batch.columns : batch.lengths[static_cast<std::size_t>(r)]))}});
    }
    json["micro_batches"].push_back(std::move(rows));
  }
  const std::filesystem::path file = folder / "bad_batch.json";
  if (write) write_json(file, json);
  std::vector<std::string> parts;
  for (const auto& [name, value] : record.parts) parts.push_back(name + " " + shortest(value));
  throw Error(str("step ", record.step, ": the ", std::isfinite(record.loss) ? "gradient" : "loss", " is not finite (loss ", shortest(record.loss), ", gradient norm ", shortest(record.gradient_norm), "; ", join(parts, ", "), ")"))
      .at(title).hint((write ? "the batch lies in " + file.string() : std::string("rank 0 has written the batch")) + "; a lower learning rate, a longer warm-up or clipping helps most often");
}

}  // namespace kompakt
