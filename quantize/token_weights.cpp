#include "quantize/token_weights.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <optional>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/log.h"
#include "core/random.h"
#include "core/text.h"
#include "model/parallel.h"
#include "quantize/sensitivity.h"
#include "train/measurement.h"
#include "train/precision.h"
#include "train/state.h"

namespace kompakt {
namespace {

constexpr TokenWeightRow token_weight_rows[] = {
    {"uniform", "every token counts the same", 0},
    {"gradient_norm", "a token counts by the norm of the loss's gradient at the layer's outputs", 0.5},
    {"fisher", "a token counts by the square of that norm", 1},
};

constexpr std::size_t metric_lanes = 4;
constexpr std::size_t weighing_round = 8;  // batches between two looks at the clock, at least; no sum depends on it

// Mean 1 over all tokens.
at::Tensor weights_scaled(const std::string& name, const at::Tensor& squares, double exponent) {
  const at::Tensor powers = squares.to(at::kDouble).pow(exponent);
  const double mean = powers.mean().item<double>();
  if (!std::isfinite(mean)) throw Error("the gradient of the loss is not finite, so that tokens have no weight").at(name).given(str(mean)).hint("evaluate the model before it is quantized, or set token_weights: uniform");
  return mean > 0 ? (powers / mean).to(at::kFloat) : at::ones_like(squares);
}

std::int64_t batch_tokens(const CalibrationSet& set, std::size_t b) { return set.valid[b].defined() ? set.valid[b].numel() : set.inputs[b].ids.numel(); }

std::vector<at::Tensor> weights_by_batch(const at::Tensor& all, const CalibrationSet& set) {
  std::vector<at::Tensor> out;
  std::int64_t first = 0;
  for (std::size_t b = 0; b < set.inputs.size(); ++b) {
    const std::int64_t count = batch_tokens(set, b);
    out.push_back(all.slice(0, first, first + count));
    first += count;
  }
  return out;
}

// The batches that `state` holds the sums of: 0 without a record that belongs to this pass.
std::size_t weighed_before(const WeighingRecord* record, const NamedTensors& state) {
  std::size_t done = 0;
  if (!record || !record->context.resume) return done;
  const bool known = recall_measurement(record->context, record->file, "token weights of a part of the text", [&] {
    const Json saved = read_state_json(record->file);
    if (saved.at("identity") != record->identity) throw Error("of another text, model or version");
    load_state(record->file, state);
    done = saved.at("batches").get<std::size_t>();
  });
  if (known) return done;
  for (const auto& [name, values] : state) values.zero_();  // part of it may have been read
  return 0;
}

}  // namespace

const TokenWeightRow* find_token_weights(std::string_view name) {
  for (const TokenWeightRow& row : token_weight_rows)
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> token_weight_names() {
  std::vector<std::string> names;
  for (const TokenWeightRow& row : token_weight_rows) names.emplace_back(row.name);
  return names;
}

TokenWeights token_weights(Transformer& model, const CalibrationSet& set, const TokenWeightRow& row, std::uint64_t seed, OutputMetrics* metrics, bool bf16, const WeighingRecord* record) {
  model.requires_grad(false);
  const RoundedWeights rounded(bf16 ? model.linears() : std::vector<Linear*>());
  // Made before everything else: small results left between large activations would keep the allocator from using their places again.
  std::map<std::string, at::Tensor> squares;
  for (const Linear* linear : model.linears()) squares[linear->name] = at::zeros({set.tokens}, at::TensorOptions().device(model.device()));
  std::vector<std::int64_t> first = {0};
  for (std::size_t b = 0; b < set.inputs.size(); ++b) first.push_back(first.back() + batch_tokens(set, b));
  // A lane's batches come one after the other: its sums do not depend on the number of threads.
  std::vector<OutputMetrics> lanes(metrics ? std::min(metric_lanes, set.inputs.size()) : 0);
  const std::int64_t width = model.config().hidden;
  for (OutputMetrics& lane : lanes)
    for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) lane.push_back(at::zeros({width, width}, at::TensorOptions().device(model.device())));
  const auto weigh = [&](std::size_t b, OutputMetrics* sums) {
    CalibrationSet one;
    one.inputs = {set.inputs[b]}, one.valid = {set.valid[b]};
    one.sequences = set.inputs[b].ids.size(0), one.tokens = batch_tokens(set, b);
    SensitivityRequest request;
    request.seed = CounterRandom(seed, str("token-weights/", b)).key();
    request.bf16 = bf16;
    request.visit = [&](const Linear& linear, const std::vector<at::Tensor>&, const std::vector<at::Tensor>& gradients) {
      const at::NoGradGuard no_grad;
      squares.at(linear.name).narrow(0, first[b], one.tokens).copy_(gradients.front().to(at::kFloat).square().mean(1));
    };
    if (sums)
      request.visit_block = [&](std::int64_t layer, const std::vector<at::Tensor>& gradients) {
        const at::NoGradGuard no_grad;
        const at::Tensor& g = gradients.front();
        const at::Tensor directions = g * g.square().sum(1, true).clamp_min(1e-30).pow((row.exponent - 1) / 2);
        (*sums)[static_cast<std::size_t>(layer)].addmm_(directions.t(), directions);
      };
    measure_sensitivities(model, one, request);
  };
  NamedTensors state;
  for (const auto& [name, values] : squares) state.emplace_back(name, values);
  for (std::size_t lane = 0; lane < lanes.size(); ++lane)
    for (std::size_t layer = 0; layer < lanes[lane].size(); ++layer) state.emplace_back(str("lane.", lane, ".", layer), lanes[lane][layer]);
  const std::size_t all = set.inputs.size(), round = metrics ? lanes.size() : std::max<std::size_t>(weighing_round, 2 * static_cast<std::size_t>(at::get_num_threads()));
  std::size_t done = weighed_before(record, state);
  std::optional<Progress> progress;
  if (record) progress.emplace(record->context.title + " token weights", set.tokens, "token");
  auto saved = std::chrono::steady_clock::now();
  while (done < all) {
    const std::size_t count = std::min(round, all - done);
    for_each_batch(model.device(), count, [&](std::size_t i) { weigh(done + i, metrics ? &lanes[i] : nullptr); });
    done += count;
    if (!record) continue;
    progress->update(first[done]);
    if (done == all || std::chrono::steady_clock::now() - saved < record->interval) continue;
    save_state(record->file, state, Json{{"identity", record->identity}, {"batches", done}});
    saved = std::chrono::steady_clock::now();
  }
  if (progress) progress->finish();
  TokenWeights out;
  for (const auto& [name, all] : squares) out[name] = weights_by_batch(weights_scaled(name, all, row.exponent), set);
  if (!metrics) return out;
  metrics->clear();
  for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) {
    at::Tensor sum = lanes.front()[layer];
    for (std::size_t lane = 1; lane < lanes.size(); ++lane) sum.add_(lanes[lane][layer]), lanes[lane][layer] = at::Tensor();
    const double trace = sum.trace().item<double>();
    metrics->push_back(trace > 0 ? sum.mul_(static_cast<double>(width) / trace) : at::eye(width, sum.options()));
  }
  return out;
}

TokenWeights kept_token_weights(Transformer& model, const CalibrationSet& set, const TokenWeightRow& row, const StageContext& context, OutputMetrics* metrics, bool bf16) {
  std::vector<std::int64_t> batches;  // labels are drawn batch by batch
  for (const ModelInput& input : set.inputs) batches.push_back(input.ids.size(0));
  Json depends{{"by", row.name}, {"calibration", set.hash}, {"batches", batches}, {"metrics", metrics != nullptr}};
  if (bf16) depends["precision"] = "bf16";
  const std::filesystem::path file = measurement_file(context, model, "token-weights/2", depends, ".safetensors");
  const auto metric_name = [](std::size_t layer) { return str("block.", layer, ".metric"); };
  TokenWeights weights;
  const bool known = recall_measurement(context, file, "token weights", [&] {
    NamedTensors saved;
    for (const Linear* linear : model.linears()) saved.emplace_back(linear->name, at::empty({set.tokens}));
    for (std::size_t layer = 0; metrics && layer < model.blocks.size(); ++layer) saved.emplace_back(metric_name(layer), at::empty({model.config().hidden, model.config().hidden}));
    load_state(file, saved);
    const std::size_t linears = model.linears().size();
    for (std::size_t i = 0; i < linears; ++i) weights[saved[i].first] = weights_by_batch(saved[i].second.to(model.device()), set);
    if (metrics) metrics->clear();
    for (std::size_t i = linears; i < saved.size(); ++i) metrics->push_back(saved[i].second.to(model.device()));
  });
  if (known) return weights;
  log_info(str(context.title, ": weighs ", set.tokens, " calibration tokens by one backward pass"));
  std::optional<WeighingRecord> record;
  if (!context.work.empty()) record.emplace(WeighingRecord{context, context.work / "token-weights.safetensors", file.filename().string()});
  weights = token_weights(model, set, row, context.seed, metrics, bf16, record ? &*record : nullptr);
  if (!file.empty()) {
    NamedTensors values;
    for (const auto& [name, parts] : weights) values.emplace_back(name, at::cat(parts));
    for (std::size_t layer = 0; metrics && layer < metrics->size(); ++layer) values.emplace_back(metric_name(layer), (*metrics)[layer]);
    make_folder(file.parent_path());
    save_state(file, values, Json::object());
  }
  if (record) std::filesystem::remove(record->file);
  return weights;
}

double effective_tokens(const std::vector<at::Tensor>& weights) {
  double sum = 0, squares = 0;
  for (const at::Tensor& w : weights) sum += w.sum(at::kDouble).item<double>(), squares += w.to(at::kDouble).square().sum().item<double>();
  return squares > 0 ? sum * sum / squares : 0;
}

}  // namespace kompakt
