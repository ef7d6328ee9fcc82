#include "evaluate/inputs.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace kompakt {
namespace {

at::Tensor integers_on(const std::vector<std::int64_t>& values, at::IntArrayRef shape, c10::Device device) {
  return at::tensor(values, at::kLong).reshape(shape).to(device);
}

}  // namespace

ModelInput batch_input(const TokenBatch& batch, c10::Device device) {
  ModelInput input;
  input.ids = integers_on(batch.ids, {batch.rows, batch.columns}, device);
  if (std::any_of(batch.lengths.begin(), batch.lengths.end(), [&](std::int64_t length) { return length != batch.columns; })) input.lengths = integers_on(batch.lengths, {batch.rows}, device);
  if (!batch.documents.empty()) {
    input.documents = integers_on(batch.documents, {batch.rows, batch.columns}, device);
    input.positions = integers_on(batch.positions, {batch.rows, batch.columns}, device);
  }
  return input;
}

ModelInput window_input(const std::vector<std::vector<std::int64_t>>& windows, std::size_t first, std::size_t count, c10::Device device) {
  std::vector<std::int64_t> ids;
  for (std::size_t i = first; i < first + count; ++i) ids.insert(ids.end(), windows.at(i).begin(), windows.at(i).end());
  ModelInput input;
  input.ids = integers_on(ids, {static_cast<std::int64_t>(count), static_cast<std::int64_t>(windows.at(first).size())}, device);
  return input;
}

}  // namespace kompakt
