// Weights of calibration tokens: equal to gradients of one whole graph, in the moments, kept for a killed run, refused where they say nothing.
#include "quantize/token_weights.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/files.h"
#include "core/random.h"
#include "core/text.h"
#include "quantize/stage.h"
#include "tests/catch_torch.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/state.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;
using testing::tiny_decoder;
using testing::tiny_encoder;

TaskData weight_text(std::int64_t windows, std::int64_t length) {
  TaskData data;
  data.kind = TaskData::Kind::text;
  const CounterRandom random(9, "text");
  for (std::int64_t w = 0; w < windows; ++w) {
    data.calibration.emplace_back();
    for (std::int64_t t = 0; t < length; ++t) data.calibration.back().push_back(static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(w * length + t), 50)));
  }
  return data;
}

StageContext weight_context(const TaskData& data) {
  StageContext context;
  context.data = &data, context.title = "quantize", context.seed = 2;
  return context;
}

class OutputTaps final : public TapSink {
 public:
  bool wants(const std::string& name) const override { return name.rfind("output:", 0) == 0; }
  void put(const std::string& name, const at::Tensor& value) override {
    value.retain_grad();
    values[name] = value;
  }
  std::map<std::string, at::Tensor> values;
};

const TokenWeightRow& row(const char* name) { return *find_token_weights(name); }

bool equal(const TokenWeights& a, const TokenWeights& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [name, batches] : a)
    for (std::size_t i = 0; i < batches.size(); ++i)
      if (!at::equal(batches[i], b.at(name).at(i))) return false;
  return true;
}

}  // namespace

TEST_CASE("token weights are the squared gradients of one graph, with mean 1", "[quantize][token_weights]") {
  auto model = tiny_decoder(7, true);
  const TaskData data = weight_text(3, 300);  // a batch each
  const CalibrationSet set = calibration_set(weight_context(data), 3);
  REQUIRE(set.inputs.size() == 3);
  OutputMetrics moments, directions;
  const TokenWeights fisher = token_weights(*model, set, row("fisher"), 5, &moments), norms = token_weights(*model, set, row("gradient_norm"), 5, &directions);
  CHECK(equal(fisher, token_weights(*model, set, row("fisher"), 5)));
  std::map<std::string, std::vector<at::Tensor>> expected, behind;  // behind: a block's last linear, where the block's output is made
  for (std::size_t b = 0; b < 3; ++b) {
    model->requires_grad(true);
    OutputTaps taps;
    const at::Tensor logits = model->forward(set.inputs[b], &taps).view({-1, 50});
    const CounterRandom random(CounterRandom(5, str("token-weights/", b)).key(), "fisher-labels");
    const at::Tensor running = at::softmax(logits.detach(), -1).cumsum(1, at::kDouble), labels = at::empty({300}, at::kLong);
    for (std::int64_t t = 0; t < 300; ++t) labels[t] = running[t].le(random.uniform(static_cast<std::uint64_t>(t)) * (1 - 1e-5)).sum();
    at::nll_loss(at::log_softmax(logits, -1), labels, {}, at::Reduction::Sum).backward();
    for (const Linear* linear : model->linears()) expected[linear->name].push_back(taps.values.at("output:" + linear->name).grad().reshape({300, -1}).square().sum(1));
    for (const Block& block : model->blocks) behind[block.mlp.down.name].push_back(taps.values.at("output:" + block.mlp.down.name).grad().reshape({300, -1}).clone());
    model->requires_grad(false);
  }
  REQUIRE(fisher.size() == model->linears().size());
  REQUIRE((moments.size() == model->blocks.size() && directions.size() == model->blocks.size()));
  for (std::size_t layer = 0; layer < moments.size(); ++layer) {
    const at::Tensor g = at::cat(behind.at(model->blocks[layer].mlp.down.name)).to(at::kDouble), u = g / g.norm(2, {1}, true).sqrt();
    for (const auto& [found, x] : {std::pair{moments[layer], g}, {directions[layer], u}}) {
      const at::Tensor wanted = at::matmul(x.t(), x), scaled = wanted * (static_cast<double>(g.size(1)) / wanted.trace().item<double>());
      CHECK((found.to(at::kDouble) - scaled).norm().item<double>() < 2e-3 * scaled.norm().item<double>());
    }
  }
  for (const auto& [name, batches] : expected) {
    INFO(name);
    const at::Tensor all = at::cat(batches), found = at::cat(fisher.at(name)), norm = at::cat(norms.at(name));
    CHECK(at::allclose(found, all / all.mean(), 2e-3, 1e-5));
    CHECK(found.mean(at::kDouble).item<double>() == Approx(1).epsilon(1e-6));
    CHECK(at::allclose(norm, all.sqrt() / all.sqrt().mean(), 2e-3, 1e-4));
    // The heavier tail is worth fewer tokens.
    CHECK(effective_tokens(fisher.at(name)) < effective_tokens(norms.at(name)));
    CHECK(effective_tokens(norms.at(name)) < 900);
  }
}

TEST_CASE("token weights without any gradient, of other seeds, and on one and two threads", "[quantize][token_weights]") {
  CHECK(effective_tokens({at::ones({7}), at::ones({5})}) == Approx(12));
  CHECK(effective_tokens({at::tensor({1.0f, 0.0f, 0.0f})}) == Approx(1));
  CHECK(effective_tokens({}) == 0);
  auto model = tiny_decoder(7, false);
  const TaskData data = weight_text(5, 300);
  const CalibrationSet set = calibration_set(weight_context(data), 5);
  const int before = at::get_num_threads();
  std::vector<TokenWeights> runs;
  std::vector<OutputMetrics> metrics(2);
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    runs.push_back(token_weights(*model, set, row("gradient_norm"), 1, &metrics[static_cast<std::size_t>(threads - 1)]));
  }
  at::set_num_threads(before);
  CHECK(equal(runs[0], runs[1]));
  for (std::size_t layer = 0; layer < model->blocks.size(); ++layer) CHECK(at::equal(metrics[0][layer], metrics[1][layer]));
  // Under autocast: the same but for roundings, which gradients of keys, differences of much larger numbers, feel most (.06 here). The weights come back.
  const std::string untouched = fingerprint(*model);
  const TokenWeights low = token_weights(*model, set, row("gradient_norm"), 1, nullptr, true);
  CHECK((fingerprint(*model) == untouched));
  for (const auto& [name, batches] : runs[0]) {
    const at::Tensor a = at::cat(batches), b = at::cat(low.at(name));
    INFO(name);
    CHECK((a - b).abs().median().item<double>() < 0.1);
    CHECK_FALSE(at::equal(a, b));
  }
  CHECK_FALSE(equal(runs[0], token_weights(*model, set, row("gradient_norm"), 2)));
  const auto broken = model->clone();
  broken->blocks[1].mlp.up.weight[3][2] = NAN;
  CHECK(contains_all(error_text([&] { token_weights(*broken, set, row("gradient_norm"), 1); }), {"the gradient of the loss is not finite", "model.layers."}));
  model->lm_head.weight.zero_();
  for (const auto& [name, batches] : token_weights(*model, set, row("fisher"), 1, &metrics[0])) CHECK(at::equal(at::cat(batches), at::ones({1500})));
  for (const at::Tensor& metric : metrics[0]) CHECK(at::equal(metric, at::eye(metric.size(0))));
}

TEST_CASE("a pass for token weights that was killed goes on behind the batches that were saved, to the same bits", "[quantize][token_weights]") {
  const auto model = tiny_decoder(7, false);
  const TaskData data = weight_text(25, 300);
  const CalibrationSet set = calibration_set(weight_context(data), 25);
  for (const bool with_metrics : {false, true}) {
    CAPTURE(with_metrics);
    OutputMetrics whole, parts;
    const TokenWeights expected = token_weights(*model, set, row("gradient_norm"), 1, with_metrics ? &whole : nullptr);
    const TemporaryFolder folder;
    StageContext context = weight_context(data);
    context.work = folder.path(), context.resume = true;
    const auto run = [&](const char* identity) {
      const WeighingRecord record{context, folder.path() / "part.safetensors", identity, std::chrono::seconds(0)};
      return token_weights(*model, set, row("gradient_norm"), 1, with_metrics ? &parts : nullptr, false, &record);
    };
    CHECK(equal(expected, run("a")));
    CHECK(read_state_json(folder.path() / "part.safetensors").at("batches") == 24);  // of 25: as if killed in the last round
    // What has been weighed is not weighed again: numbers of the first batches that no gradient has.
    const auto poison = [&](const std::string& file, float factor) {
      NamedTensors state;
      for (const Linear* linear : model->linears()) state.emplace_back(linear->name, at::empty({set.tokens}));
      std::sort(state.begin(), state.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
      for (int lane = 0; with_metrics && lane < 4; ++lane)
        for (std::size_t layer = 0; layer < model->blocks.size(); ++layer) state.emplace_back(str("lane.", lane, ".", layer), at::empty({24, 24}));
      const std::filesystem::path path = folder.path() / file;
      load_state(path, state);
      state[0].second.narrow(0, 0, 300).mul_(factor);
      save_state(path, state, read_state_json(path));
    };
    const std::string untouched = read_text(folder.path() / "part.safetensors");
    poison("part.safetensors", 4);
    CHECK_FALSE(equal(expected, run("a")));
    write_text(folder.path() / "part.safetensors", untouched);
    CHECK(equal(expected, run("a")));
    for (std::size_t layer = 0; layer < whole.size(); ++layer) CHECK(at::equal(whole[layer], parts[layer]));
    // Of something else, or damaged, or of a run that does not resume: measured from the start.
    poison("part.safetensors", 4);
    CHECK(equal(expected, run("b")));
    context.resume = false;
    CHECK(equal(expected, run("a")));
    context.resume = true;
    write_text(folder.path() / "part.safetensors", untouched.substr(0, untouched.size() - 100));
    CHECK(equal(expected, run("a")));
    for (std::size_t layer = 0; layer < whole.size(); ++layer) CHECK(at::equal(whole[layer], parts[layer]));
  }
}

TEST_CASE("weighted moments", "[quantize][token_weights]") {
  at::NoGradGuard no_grad;
  auto model = tiny_decoder(7, true);
  const TaskData data = weight_text(3, 300);
  const CalibrationSet set = calibration_set(weight_context(data), 3);
  SequentialCalibration calibration(*model, set, {.teacher = true, .means = true});
  calibration.start();
  const std::string name = model->blocks[0].attention.query.name;
  std::vector<at::Tensor> inputs, weights, ones;
  for (std::size_t b = 0; b < 3; ++b) {
    TapMap taps({"input:" + name});
    model->forward(set.inputs[b], &taps);
    inputs.push_back(taps.at("input:" + name).reshape({300, -1}).to(at::kDouble));
    weights.push_back(at::rand({300}).square()), ones.push_back(at::ones({300}));
  }
  const at::Tensor x = at::cat(inputs), w = at::cat(weights).to(at::kDouble).unsqueeze(1);
  const auto close = [](const at::Tensor& a, const at::Tensor& b) { return (a.to(at::kDouble) - b).norm().item<double>() <= 1e-5 * b.norm().item<double>(); };
  const auto found = calibration.moments(0, BlockPart::attention, {}, {&weights, nullptr, &ones});
  REQUIRE(found.size() == 3);
  CHECK(close(found[0].hessian, at::matmul((x * w).t(), x) / w.sum()));
  CHECK(close(found[0].cross, at::matmul((x * w).t(), x) / w.sum()));
  CHECK(close(found[0].mean, (x * w).sum(0) / w.sum()));
  CHECK(close(found[0].teacher_mean, (x * w).sum(0) / w.sum()));
  CHECK(at::equal(found[0].hessian, found[0].hessian.t()));
  const std::int64_t half = found[0].half_tokens;
  CHECK(found[0].half_share == Approx((w.slice(0, 0, half).sum() / w.sum()).item<double>()));
  CHECK(close(found[0].half, at::matmul((x * w).slice(0, 0, half).t(), x.slice(0, 0, half)) / w.slice(0, 0, half).sum()));
  // Equal weights are no weights.
  CHECK(at::equal(found[1].hessian, found[2].hessian));
  CHECK(at::equal(found[1].cross, found[2].cross));
  CHECK(found[1].half_share == Approx(static_cast<double>(half) / 900));
}

TEST_CASE("token weights in the stage: kept for a killed run, told in the report, refused where they say nothing", "[quantize][token_weights]") {
  const TaskData data = weight_text(4, 200);
  const auto original = tiny_decoder(7, true);
  QuantizeOptions options;
  options.weights = "ternary", options.group = 8, options.method = "trifit", options.embedding = "none";
  const auto codes = [&](const char* weights, StageContext& context) {
    auto model = original->clone();
    options.token_weights = weights;
    Json details = Json::object();
    context.details = &details;
    const QuantizedModel result = quantize(*model, options, {}, context);
    CHECK(details.at("calibration").contains("token_weights") == (std::string(weights) != "uniform"));
    if (details.at("calibration").contains("token_weights")) CHECK(details.at("calibration").at("token_weights").at("least_effective_tokens").get<double>() < 800);
    const TemporaryFolder folder;
    save_quantized(result, folder.path());
    return read_text(folder.path() / "quantization.safetensors");
  };
  StageContext plain = weight_context(data);
  const std::string uniform = codes("uniform", plain), norm = codes("gradient_norm", plain), fisher = codes("fisher", plain);
  CHECK((uniform != norm && norm != fisher && uniform != fisher));

  const TemporaryFolder work;
  StageContext context = weight_context(data);
  context.work = work.path();
  CHECK((codes("gradient_norm", context) == norm));
  const auto measured = [](const std::filesystem::path& folder) {
    std::vector<std::filesystem::path> out;
    for (const auto& entry : std::filesystem::directory_iterator(folder))
      if (entry.path().filename().string().rfind("token-weights-", 0) == 0) out.push_back(entry.path());
    return out;
  };
  REQUIRE(measured(work.path()).size() == 1);
  const std::filesystem::path file = measured(work.path()).front();
  for (const auto& entry : std::filesystem::directory_iterator(work.path()))
    if (entry.path() != file) std::filesystem::remove_all(entry.path());
  const auto time = std::filesystem::last_write_time(file);
  CHECK((codes("gradient_norm", context) == norm));
  CHECK(std::filesystem::last_write_time(file) == time);  // read, not made again

  // Other runs, with a folder of work each, share a folder of measurements: another method of the same model takes them over, other
  // weights of tokens, another text or seed and another model do not.
  const TemporaryFolder shared;
  StageContext other = weight_context(data);
  other.measurements = shared.path() / "importance";
  CHECK((codes("gradient_norm", other) == norm));
  REQUIRE(measured(other.measurements).size() == 1);
  const std::filesystem::path kept = measured(other.measurements).front();
  const std::string bytes = read_text(kept);
  options.damping = 0.2;
  CHECK((codes("gradient_norm", other) != norm));
  CHECK(measured(other.measurements).size() == 1);
  options.damping = QuantizeOptions().damping;
  CHECK((codes("fisher", other) == fisher));
  CHECK(measured(other.measurements).size() == 2);
  options.calibration_precision = "bf16", codes("gradient_norm", other), options.calibration_precision = "float32";
  CHECK(measured(other.measurements).size() == 3);
  ++other.seed, codes("gradient_norm", other);
  CHECK(measured(other.measurements).size() == 4);
  const TaskData longer = weight_text(5, 200);
  StageContext text = weight_context(longer);
  text.measurements = other.measurements;
  codes("gradient_norm", text);
  CHECK(measured(other.measurements).size() == 5);
  // A damaged file is measured again and mended.
  --other.seed, write_text(kept, bytes.substr(0, bytes.size() / 2));
  CHECK((codes("gradient_norm", other) == norm));
  CHECK((read_text(kept) == bytes));

  options.calibration_precision = "bf16", options.sweep_precision = "float64";
  CHECK(contains_all(error_text([&] { plan_quantization(original->config(), options); }), {"quantize.calibration_precision", "float64", "leave one of the two out"}));
  options.sweep_precision = "float32", options.has_block_tune = true;
  CHECK(contains_all(error_text([&] { plan_quantization(original->config(), options); }), {"quantize.calibration_precision", "blocks are tuned towards outputs of float32", "block_tune: {precision: bf16}"}));
  options.has_block_tune = false;
  options.method = "rtn", options.token_weights = "uniform";
  CHECK(contains_all(error_text([&] { plan_quantization(original->config(), options); }), {"quantize.calibration_precision", "method rtn makes no pass", "gptq"}));
  options.calibration_precision = "float32", options.method = "trifit";
  options.has_block_tune = true, options.block_tune.fisher = 0.5, options.token_weights = "uniform";
  CHECK(contains_all(error_text([&] { plan_quantization(original->config(), options); }), {"quantize.block_tune.fisher", "token_weights: uniform", "gradient_norm"}));
  options.has_block_tune = false, options.block_tune = {}, options.token_weights = "fisher";
  options.method = "rtn";
  CHECK(contains_all(error_text([&] { plan_quantization(original->config(), options); }), {"quantize.token_weights", "method rtn looks at no calibration token"}));
  // Under a byte budget too, which plans by itself.
  options.has_budget = true, options.budget.bytes = 100000;
  CHECK(contains_all(error_text([&] { budget_frame(original->config(), options, {}); }), {"quantize.token_weights", "method rtn looks at no calibration token"}));
  options.has_budget = false, options.method = "trifit";
  ModelConfig encoder = tiny_encoder(3)->config();
  CHECK(plan_quantization(encoder, options).tensors.size() > 0);  // a classifier has predictions
  encoder.labels.clear();
  REQUIRE_FALSE(encoder.is_classifier());
  CHECK(contains_all(error_text([&] { plan_quantization(encoder, options); }), {"quantize.token_weights", "an encoder without a classifier"}));
}

}  // namespace kompakt
