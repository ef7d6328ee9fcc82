// Next-token targets on the host, and the copy of a batch to tensors.
#include "train/targets.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "train/teacher.h"

namespace kompakt {

std::vector<std::int64_t> next_tokens(const TokenBatch& batch) {
  std::vector<std::int64_t> targets(batch.ids.size(), no_target);
  for (std::int64_t r = 0; r < batch.rows; ++r) {
    const std::int64_t length = batch.lengths.empty() ? batch.columns : batch.lengths[r];
    for (std::int64_t t = 0; t + 1 < length; ++t) {
      if (!batch.prompts.empty() && t + 1 < batch.prompts[static_cast<std::size_t>(r)]) continue;
      const std::size_t at = static_cast<std::size_t>(r * batch.columns + t);
      if (!batch.documents.empty() && batch.documents[at] != batch.documents[at + 1]) continue;
      targets[at] = batch.ids[at + 1];
    }
  }
  return targets;
}

std::int64_t count_targets(const TokenBatch& batch) {
  if (!batch.labels.empty()) return batch.rows;
  const std::vector<std::int64_t> targets = next_tokens(batch);
  return static_cast<std::int64_t>(targets.size()) - std::count(targets.begin(), targets.end(), no_target);
}

ModelInput to_input(const TokenBatch& batch, c10::Device device) {
  const auto matrix = [&](const std::vector<std::int64_t>& values) {
    return at::tensor(at::ArrayRef<std::int64_t>(values), at::kLong).view({batch.rows, batch.columns}).to(device);
  };
  ModelInput input;
  input.ids = matrix(batch.ids);
  // Without padding no mask is needed, which is the fast path of attention.
  const bool padded = std::any_of(batch.lengths.begin(), batch.lengths.end(), [&](std::int64_t length) { return length != batch.columns; });
  if (padded) input.lengths = at::tensor(at::ArrayRef<std::int64_t>(batch.lengths), at::kLong).to(device);
  // Rows of one document each need neither numbers nor positions, and causal attention alone skips half of the scores.
  const bool parted = std::any_of(batch.documents.begin(), batch.documents.end(), [](std::int64_t document) { return document != 0; });
  if (parted) input.documents = matrix(batch.documents);
  if (parted && !batch.positions.empty()) input.positions = matrix(batch.positions);
  return input;
}

}  // namespace kompakt
