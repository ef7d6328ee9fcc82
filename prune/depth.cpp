#include "prune/depth.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>

#include "core/error.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "model/depth.h"
#include "prune/criteria.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

using at::Tensor;

constexpr std::int64_t depth_tokens = 1024;   // of a removal's divergence: the log-probabilities of all of them are kept
constexpr std::int64_t stream_tokens = 8192;  // of means over the stream: its pass is repeated for every layer that goes

// Takes out the layers [first, first + count) and notes their original numbers; `left` are those still there.
void depth_remove(Transformer& model, std::int64_t first, std::int64_t count, std::vector<std::int64_t>& left, std::vector<std::int64_t>& removed) {
  std::vector<std::int64_t> keep;
  for (std::int64_t layer = 0; layer < model.config().layers; ++layer)
    if (layer < first || layer >= first + count) keep.push_back(layer);
  keep_blocks(model, keep);
  removed.insert(removed.end(), left.begin() + first, left.begin() + first + count);
  left.erase(left.begin() + first, left.begin() + first + count);
}

std::vector<std::int64_t> depth_numbers(const Transformer& model) {
  std::vector<std::int64_t> out(static_cast<std::size_t>(model.config().layers));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

// One at a time, always the layer of the lowest score, measured anew after each.
template <class Score>
std::vector<std::int64_t> depth_greedy(Transformer& model, std::int64_t count, const Score& score) {
  std::vector<std::int64_t> left = depth_numbers(model), removed;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::vector<double> scores = score();
    depth_remove(model, std::min_element(scores.begin(), scores.end()) - scores.begin(), 1, left, removed);
  }
  return removed;
}

std::vector<std::int64_t> depth_influence(Transformer& model, std::int64_t count, const std::vector<TokenBatch>& batches) {
  return depth_greedy(model, count, [&] { return block_influence(model, batches); });
}

std::vector<std::int64_t> depth_removal(Transformer& model, std::int64_t count, const std::vector<TokenBatch>& batches) {
  return depth_greedy(model, count, [&] { return removal_divergence(model, batches); });
}

Tensor depth_valid(const ModelInput& input) {
  if (!input.lengths.defined()) return at::ones_like(input.ids, at::kBool);
  return at::arange(input.ids.size(1), input.lengths.options()).unsqueeze(0) < input.lengths.unsqueeze(1);
}

// Gromov et al. 2024: neighbouring layers, where the angle between the stream in front of and behind them is smallest.
std::vector<std::int64_t> depth_span(Transformer& model, std::int64_t count, const std::vector<TokenBatch>& batches) {
  const at::NoGradGuard no_grad;
  const std::int64_t layers = model.config().layers;
  std::vector<double> angles(static_cast<std::size_t>(layers - count + 1), 0);
  for (const TokenBatch& batch : batches) {
    const ModelInput input = to_input(batch, model.device());
    TapMap taps;
    for (std::int64_t i = 0; i < layers; ++i) taps.request(str("layer.", i, ".input"));
    taps.request(str("layer.", layers - 1, ".output"));
    model.hidden(input, &taps);
    const Tensor valid = depth_valid(input);
    const auto stream = [&](std::int64_t i) { return (i < layers ? taps.at(str("layer.", i, ".input")) : taps.at(str("layer.", layers - 1, ".output"))).to(at::kFloat); };
    for (std::size_t i = 0; i < angles.size(); ++i) {
      const auto first = static_cast<std::int64_t>(i);
      const Tensor cosine = at::cosine_similarity(stream(first), stream(first + count), -1, 1e-8).clamp(-1, 1);
      angles[i] += (cosine.acos().to(at::kDouble) * valid).sum().item<double>();
    }
  }
  std::vector<std::int64_t> left = depth_numbers(model), removed;
  depth_remove(model, std::min_element(angles.begin(), angles.end()) - angles.begin(), count, left, removed);
  return removed;
}

constexpr std::array<DepthCriterion, 3> depth_table{{
    {"block_influence", "1 - cosine between a layer's input and output (ShortGPT), measured anew after each removal", depth_influence},
    {"removal_kl", "divergence of the predictions when the layer is left out, measured anew after each removal", depth_removal},
    {"span", "neighbouring layers with the smallest angle between the stream before and behind them", depth_span},
}};

Tensor depth_log_probabilities(const Transformer& model, const Tensor& x, const ModelInput& input) {
  if (model.config().is_classifier()) return at::log_softmax(model.head(model.pooled(x, input)).to(at::kFloat), -1);
  const Tensor rows = x.reshape({-1, x.size(-1)}).index_select(0, depth_valid(input).flatten().nonzero().squeeze(-1));
  return at::log_softmax(model.head(model.final_norm.forward(rows)).to(at::kFloat), -1);
}

// The first depth_tokens, in batches of as many rows as fit.
std::vector<TokenBatch> depth_first_rows(const std::vector<TokenBatch>& batches) {
  std::vector<TokenBatch> out;
  std::int64_t tokens = 0;
  for (const TokenBatch& whole : batches) {
    for (std::int64_t first = 0; first < whole.rows && tokens < depth_tokens;) {
      TokenBatch batch;
      batch.rows = std::clamp<std::int64_t>((depth_tokens - tokens) / std::max<std::int64_t>(1, whole.columns), 1, whole.rows - first), batch.columns = whole.columns;
      batch.ids.assign(whole.ids.begin() + first * whole.columns, whole.ids.begin() + (first + batch.rows) * whole.columns);
      batch.lengths.assign(whole.lengths.begin() + first, whole.lengths.begin() + first + batch.rows);
      first += batch.rows, tokens += batch.rows * batch.columns;
      out.push_back(std::move(batch));
    }
  }
  return out;
}

}  // namespace

std::vector<double> removal_divergence(const Transformer& model, const std::vector<TokenBatch>& batches) {
  const at::NoGradGuard no_grad;
  if (!model.config().is_classifier() && !model.final_norm.weight.defined()) throw Error("layer removal is judged by predictions, and this encoder has no classifier").at("structured.depth").allowed("block_influence or span").hint("put a finetune stage before it");
  const std::int64_t layers = model.config().layers;
  std::vector<double> sums(static_cast<std::size_t>(layers), 0);
  double count = 0;
  const std::vector<TokenBatch> few = depth_first_rows(batches);
  if (few.empty()) throw Error("layer removal needs data to measure on, and there is none").hint("give training or calibration data");
  Progress progress("divergence without each layer", static_cast<std::int64_t>(few.size()) * layers, "layer");
  std::int64_t done = 0;
  for (const TokenBatch& batch : few) {
    const ModelInput input = to_input(batch, model.device());
    std::vector<Tensor> x = {model.embed(input)};
    for (std::int64_t layer = 0; layer < layers; ++layer) x.push_back(model.block_forward(layer, x.back(), input));
    const Tensor reference = depth_log_probabilities(model, x.back(), input), probabilities = reference.exp();
    count += static_cast<double>(reference.size(0));
    for (std::int64_t gone = 0; gone < layers; ++gone) {
      check_interrupted();
      Tensor h = x[static_cast<std::size_t>(gone)];
      for (std::int64_t layer = gone + 1; layer < layers; ++layer) h = model.block_forward(layer, h, input);
      sums[static_cast<std::size_t>(gone)] += (probabilities * (reference - depth_log_probabilities(model, h, input))).sum(at::kDouble).item<double>();
      progress.update(++done);
    }
  }
  progress.finish();
  for (double& sum : sums) sum /= count;
  return sums;
}

std::vector<std::int64_t> remove_layers(Transformer& model, std::int64_t count, const std::vector<TokenBatch>& batches, std::string_view criterion) {
  if (count >= model.config().layers) throw Error(str("removing ", count, " of ", model.config().layers, " layers leaves nothing")).at("structured.layers").given(str(count)).allowed(str("0 to ", model.config().layers - 1));
  if (count < 1) return {};
  if (batches.empty()) throw Error("the choice of layers needs data to measure on, and there is none").at("structured.layers").hint("give training or calibration data");
  std::vector<TokenBatch> first;
  for (std::int64_t tokens = 0; first.size() < batches.size() && tokens < stream_tokens; tokens += first.back().tokens()) first.push_back(batches[first.size()]);
  return find_depth_criterion(criterion)->remove(model, count, first);
}

std::span<const DepthCriterion> depth_criteria() { return depth_table; }

const DepthCriterion* find_depth_criterion(std::string_view name) {
  for (const DepthCriterion& row : depth_table)
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> depth_criterion_names() {
  std::vector<std::string> names;
  for (const DepthCriterion& row : depth_table) names.emplace_back(row.name);
  return names;
}

}  // namespace kompakt
