// Which layers go: a table of criteria, each removes layers from a model.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/batches.h"
#include "model/transformer.h"

namespace kompakt {

struct DepthCriterion {
  std::string_view name, summary;
  // Removes `count` < layers layers; their original numbers, in the order of removal.
  std::vector<std::int64_t> (*remove)(Transformer& model, std::int64_t count, const std::vector<TokenBatch>& batches);
};
std::span<const DepthCriterion> depth_criteria();
const DepthCriterion* find_depth_criterion(std::string_view name);
std::vector<std::string> depth_criterion_names();

// Runs a row on the first batches, about 8,192 tokens. Error when nothing would stay or there is no data.
std::vector<std::int64_t> remove_layers(Transformer& model, std::int64_t count, const std::vector<TokenBatch>& batches, std::string_view criterion = "block_influence");

// KL(model || model without layer i), mean over tokens (or texts, for a classifier) of the first batches, about 1,024 tokens:
// of every layer i. Runs only the layers behind i. Error for an encoder without a classifier.
std::vector<double> removal_divergence(const Transformer& model, const std::vector<TokenBatch>& batches);

}  // namespace kompakt
