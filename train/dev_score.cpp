// Scoring on held-out data during training.
#include "train/dev_score.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <limits>

#include "train/chunked_loss.h"
#include "train/step_batches.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

constexpr std::int64_t dev_batch_size = 64;

}  // namespace

double accuracy(const Transformer& model, const TokenizedExamples& examples, std::int64_t pad) {
  at::NoGradGuard no_grad;
  std::int64_t right = 0;
  const ClassificationBatches batches(examples, dev_batch_size, 0, 0, pad);
  for (const TokenBatch& batch : batches.evaluation(dev_batch_size)) {
    const at::Tensor best = model.forward(to_input(batch, model.device())).to(at::kFloat).argmax(1).to(at::kCPU);
    const std::int64_t* guesses = best.const_data_ptr<std::int64_t>();
    for (std::int64_t r = 0; r < batch.rows; ++r) right += guesses[r] == examples.labels.at(static_cast<std::size_t>(batch.examples[r]));
  }
  return static_cast<double>(right) / static_cast<double>(examples.ids.size());
}

double mean_loss(const Transformer& model, const std::vector<std::vector<std::int64_t>>& windows, std::int64_t batch_size) {
  at::NoGradGuard no_grad;
  const HeadWeights head = head_weights(model);
  double total = 0;
  std::int64_t tokens = 0;
  for (std::size_t start = 0; start < windows.size();) {
    const std::int64_t length = static_cast<std::int64_t>(windows[start].size());
    TokenBatch batch;
    batch.columns = length;
    while (start < windows.size() && static_cast<std::int64_t>(windows[start].size()) == length && batch.rows < batch_size) {
      batch.ids.insert(batch.ids.end(), windows[start].begin(), windows[start].end());
      ++batch.rows;
      ++start;
    }
    if (length < 2) continue;
    const ModelInput input = to_input(batch, model.device());
    at::Tensor hidden = model.hidden(input).narrow(1, 0, length - 1);
    if (model.lm_head.input_transform) hidden = model.lm_head.input_transform(hidden);
    const at::Tensor targets = input.ids.narrow(1, 1, length - 1).flatten();
    total += chunked_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, targets).item<double>() * static_cast<double>(targets.numel());
    tokens += targets.numel();
  }
  return tokens ? total / static_cast<double>(tokens) : std::numeric_limits<double>::quiet_NaN();
}

double dev_score(const Transformer& model, const TaskData& data) {
  if (data.kind == TaskData::Kind::text) return data.heldout.empty() ? std::numeric_limits<double>::quiet_NaN() : -mean_loss(model, data.heldout);
  return data.dev.ids.empty() ? std::numeric_limits<double>::quiet_NaN() : accuracy(model, data.dev, padding_id(data));
}

std::vector<TokenBatch> held_out_batches(const std::vector<std::vector<std::int64_t>>& windows, const TeacherSource& teacher, std::int64_t length) {
  std::vector<TokenBatch> out;
  std::int64_t number = 0;
  const auto add = [&](std::vector<std::int64_t> ids, std::int64_t columns) {
    const auto size = static_cast<std::int64_t>(ids.size());
    --number;
    if (size < 2) return;
    ids.resize(static_cast<std::size_t>(columns), ids.back());
    out.push_back({.ids = std::move(ids), .lengths = {size}, .examples = {number}, .rows = 1, .columns = columns});
  };
  for (const std::vector<std::int64_t>& window : windows) {
    const auto size = static_cast<std::int64_t>(window.size());
    if (teacher.takes(size)) add(window, size);
    else if (size < length) add(window, length);
    else
      for (std::int64_t at = 0; at + length <= size; at += length) add({window.begin() + at, window.begin() + at + length}, length);
  }
  return out;
}

}  // namespace kompakt
