// Calibrated and dynamic rounding of activations, keys and values as a part of the stage.
#include "quantize/activation_rounding.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <cmath>
#include <limits>

#include "core/files.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "quantize/activation_clip.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

ValueSample activation_sample(const at::Tensor& values) { return {std::min(0.0f, values.min().item<float>()), std::max(0.0f, values.max().item<float>()), values}; }

QuantizeOptions activation_options(const std::string& mode) {
  QuantizeOptions options;
  options.weights = "int8", options.embedding = "none";
  options.has_activations = true, options.activations.mode = mode;
  return options;
}

struct ActivationRun {
  std::unique_ptr<Transformer> model;
  QuantizedModel quantized;
  Json details = Json::object();
};

ActivationRun activation_run(const QuantizeOptions& options, const TaskData& data, const std::function<void(Transformer&)>& change = {}, bool tied = false) {
  ActivationRun run;
  run.model = testing::tiny_decoder(8, tied);
  if (change) change(*run.model);
  StageContext context;
  context.title = "quantize", context.data = &data, context.details = &run.details;
  run.quantized = quantize(*run.model, options, {}, context);
  return run;
}

at::Tensor activation_logits(const Transformer& model, const std::vector<std::int64_t>& ids = {3, 9, 27, 11, 40}) {
  const at::NoGradGuard no_grad;
  return model.forward(testing::tiny_input({ids}));
}

}  // namespace

TEST_CASE("ranges of static scales, by hand", "[activations]") {
  const RoundingFormat& int8 = *find_rounding_format("int8");
  const at::Tensor ramp = at::arange(1, 101, at::kFloat);
  const ValueSample sample = activation_sample(ramp);
  CHECK(find_clip("absmax")->range(sample, {int8, true, 99}).high == 100);
  CHECK(find_clip("percentile")->range(sample, {int8, true, 90}).high == 90);
  CHECK(find_clip("percentile")->range(sample, {int8, true, 90}).low == -90);
  const ClipRange sides = find_clip("percentile")->range(activation_sample(ramp - 50.5), {int8, false, 90});
  CHECK(sides.high == 39.5f);
  CHECK(sides.low == -39.5f);
  CHECK(find_clip("percentile")->range(activation_sample(at::cat({at::zeros({999}), at::ones({1})})), {int8, true, 90}).high == 1);  // never empty
  CHECK(find_clip("percentile")->range(sample, {int8, true, 100}).high == 100);
  // mse: the smallest error of the candidates, found by trying all of them here.
  at::manual_seed(3);
  const at::Tensor heavy = at::cat({at::randn({20000}), at::tensor({60.0f, -45.0f})});
  const ValueSample tails = activation_sample(heavy);
  const ClipRange best = find_clip("mse")->range(tails, {int8, true, 0});
  double least = INFINITY, at = 0;
  for (int i = 0; i <= 64; ++i) {
    const float high = tails.high * std::exp2(-static_cast<float>(i) / 8);
    const double error = sample_error(tails, int8, rounding_scale(int8, true, -high, high));
    if (error < least) least = error, at = high;
  }
  CHECK(static_cast<double>(best.high) == at);
  CHECK(at < 60);
  CHECK(sample_error(tails, int8, rounding_scale(int8, true, best.low, best.high)) < 0.95 * sample_error(tails, int8, rounding_scale(int8, true, tails.low, tails.high)));
  CHECK(sample_error(activation_sample(at::zeros({5})), int8, {1, 0}) == 0);
  // What lies on the codes costs nothing at the full range.
  CHECK(find_clip("mse")->range(activation_sample(at::tensor({127.0f, -1.0f, 5.0f}) * 0.5), {int8, false, 0}).high == 63.5f);
}

TEST_CASE("dynamic int8 activations round what quantized linears see and need no data", "[activations]") {
  const TaskData nothing;
  QuantizeOptions plain = activation_options("dynamic");
  plain.has_activations = false;
  const ActivationRun without = activation_run(plain, nothing), with = activation_run(activation_options("dynamic"), nothing);
  CHECK(testing::same_parameters(testing::copy_of(*without.model), testing::copy_of(*with.model)));
  const at::Tensor a = activation_logits(*without.model), b = activation_logits(*with.model);
  CHECK_FALSE(at::equal(a, b));
  CHECK((a - b).norm().item<double>() < 0.05 * a.norm().item<double>());
  CHECK(with.details.at("activations").at("linears") == 21);
  CHECK(with.details.at("activations").at("mode") == "dynamic");
  // What stays in float is not rounded.
  QuantizeOptions kept = activation_options("dynamic");
  kept.keep_float = {"*down_proj"};
  const ActivationRun partly = activation_run(kept, nothing);
  CHECK_FALSE(partly.model->blocks[0].mlp.down.input_transform);
  CHECK(partly.model->blocks[0].mlp.up.input_transform);
  CHECK(partly.details.at("activations").at("kept_in_float") == 3);
  kept.keep_float = {"model.layers.*"};
  CHECK(contains_all(error_text([&] { activation_run(kept, nothing); }), {"all weights are kept in float", "quantize.activations"}));
}

TEST_CASE("static scales of a single token are the dynamic ones", "[activations]") {
  TaskData data = testing::tiny_text();
  data.calibration = {{17}};
  for (const bool symmetric : {true, false}) {
    for (const char* clip : {"absmax", "percentile"}) {
      QuantizeOptions fixed = activation_options("static"), free = activation_options("dynamic");
      fixed.activations.symmetric = free.activations.symmetric = symmetric, fixed.activations.clip = clip;
      if (fixed.activations.clip == "percentile") fixed.activations.percentile = 100;
      const ActivationRun a = activation_run(fixed, data), b = activation_run(free, data);
      CHECK(at::equal(activation_logits(*a.model, {17}), activation_logits(*b.model, {17})));
      CHECK_FALSE(at::equal(activation_logits(*a.model, {17, 20}), activation_logits(*b.model, {17, 20})));
    }
  }
}

TEST_CASE("static scales cover what the calibration set shows, keys and values included", "[activations]") {
  const TaskData data = testing::tiny_text();
  for (const char* format : {"int8", "fp8_e4m3"}) {
    QuantizeOptions options = activation_options("static");
    options.activations.format = format;
    options.has_kv_cache = true, options.kv_cache.format = format;
    const ActivationRun run = activation_run(options, data);
    const RuntimeRounding rounding = rounding_of(run.model->config());
    REQUIRE(rounding.activations->scales.size() == 21);
    REQUIRE(rounding.kv_cache->key_scales.size() == 3);
    const auto scale = [&](const std::string& name) { return rounding.activations->scales.at(name).scale; };
    CHECK(scale("model.layers.1.self_attn.q_proj") == scale("model.layers.1.self_attn.v_proj"));
    CHECK(scale("model.layers.1.mlp.gate_proj") == scale("model.layers.1.mlp.up_proj"));
    // The last block's values, from a pass of the deployed model over the whole set.
    const at::NoGradGuard no_grad;
    float down = 0, key = 0, value = 0;
    for (const auto& window : data.calibration) {
      TapMap taps({"input:model.layers.2.mlp.down_proj", "layer.2.cached_key", "layer.2.value"});
      run.model->forward(testing::tiny_input({window}), &taps);
      down = std::max(down, taps.at("input:model.layers.2.mlp.down_proj").abs().max().item<float>());
      key = std::max(key, taps.at("layer.2.cached_key").abs().max().item<float>());
      value = std::max(value, taps.at("layer.2.value").abs().max().item<float>());
    }
    const float half_range = std::string(format) == "int8" ? 127.5f : 448.0f;
    // Batches of another size sum in another order.
    CHECK(scale("model.layers.2.mlp.down_proj") == Approx(down / half_range).epsilon(0.02));
    CHECK(rounding.kv_cache->key_scales[2] == Approx(key / half_range).epsilon(0.02));
    CHECK(rounding.kv_cache->value_scales[2] == Approx(value / half_range).epsilon(0.02));
    REQUIRE(run.details.at("activations").at("inputs").size() == 12);
    CHECK(run.details.at("activations").at("inputs")[11].at("input") == "model.layers.2.mlp.down_proj");
    CHECK(run.details.at("kv_cache").at("layers").size() == 3);
    CHECK(run.details.at("kv_cache").at("layers")[2].at("key_error").get<double>() < 0.01);
    // Saved with the model and loaded with it.
    const TemporaryFolder folder;
    save_model(*run.model, folder.path());
    CHECK(at::equal(activation_logits(*load_model(folder.path())), activation_logits(*run.model)));
    // A second run gives the same.
    CHECK(activation_run(options, data).model->config().source == run.model->config().source);
  }
}

TEST_CASE("other clips and smoothquant work with rounded activations", "[activations]") {
  const TaskData data = testing::tiny_text();
  for (const char* clip : {"percentile", "mse"}) {
    QuantizeOptions options = activation_options("static");
    options.activations.clip = clip, options.has_kv_cache = true, options.kv_cache.clip = clip;
    const ActivationRun run = activation_run(options, data);
    for (const Json& row : run.details.at("activations").at("inputs")) {
      CHECK(row.at("covered").get<double>() <= row.at("largest").get<double>());
      CHECK(row.at("error").get<double>() < 0.05);
    }
  }
  // A channel of outliers in front of the linears: SmoothQuant moves it into the weights, and rounding costs less.
  const auto outliers = [](Transformer& model) {
    for (Block& block : model.blocks) block.mlp_norm.weight.narrow(0, 3, 1).mul_(80), block.attention_norm.weight.narrow(0, 5, 1).mul_(80);
    for (Block& block : model.blocks) {
      for (Linear* linear : {&block.mlp.gate, &block.mlp.up}) linear->weight.select(1, 3).mul_(1.0 / 80);
      for (Linear* linear : {&block.attention.query, &block.attention.key, &block.attention.value}) linear->weight.select(1, 5).mul_(1.0 / 80);
    }
  };
  const auto exact = testing::tiny_decoder(8);
  outliers(*exact);
  QuantizeOptions options = activation_options("static");
  const double rough = (activation_logits(*activation_run(options, data, outliers).model) - activation_logits(*exact)).norm().item<double>();
  options.basis.basis = "smoothquant";
  const double smooth = (activation_logits(*activation_run(options, data, outliers).model) - activation_logits(*exact)).norm().item<double>();
  CHECK(smooth < 0.5 * rough);
}

TEST_CASE("a killed stage that goes on finds the same scales", "[activations]") {
  const TaskData data = testing::tiny_text();
  QuantizeOptions options = activation_options("static");
  options.method = "gptq", options.has_kv_cache = true;
  const TemporaryFolder folder;
  const auto run = [&](bool resume) {
    const auto model = testing::tiny_decoder(8);
    StageContext context;
    context.title = "quantize", context.data = &data, context.work = folder.path() / "work", context.resume = resume;
    std::filesystem::create_directories(context.work);
    quantize(*model, options, {}, context);
    const TemporaryFolder out;
    save_model(*model, out.path());
    return read_text(out.path() / "config.json") + read_text(out.path() / "model.safetensors");
  };
  const std::string whole = run(false);
  std::filesystem::remove_all(folder.path() / "work" / "block-0002");  // killed behind the second block
  CHECK(run(true) == whole);
}

TEST_CASE("a second stage and a plan decide anew what is rounded", "[activations]") {
  const TaskData data = testing::tiny_text();
  QuantizeOptions options = activation_options("static");
  options.has_kv_cache = true;
  ActivationRun run = activation_run(options, data);
  const RuntimeRounding planned = planned_rounding(testing::tiny_decoder(8)->config(), options, run.quantized.plan.tensors);
  CHECK(planned.activations->scales.size() == 21);
  CHECK(planned.kv_cache->key_scales.size() == 3);
  options.has_activations = options.has_kv_cache = false;
  StageContext context;
  context.data = &data;
  quantize(*run.model, options, {}, context);
  CHECK(rounding_of(run.model->config()).empty());
  CHECK_FALSE(run.model->blocks[0].mlp.up.input_transform);
}

TEST_CASE("rounding that cannot be is refused with the reason", "[activations]") {
  TaskData data = testing::tiny_text();
  const auto refused = [&](const std::function<void(QuantizeOptions&)>& change, const std::function<void(Transformer&)>& model = {}) {
    QuantizeOptions options = activation_options("static");
    change(options);
    return error_text([&] { activation_run(options, data, model); });
  };
  const auto kv = [](QuantizeOptions& o) { o.has_kv_cache = true; };
  const auto nothing = [](QuantizeOptions&) {};
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.activations.format = "fp8_e4m3", o.activations.symmetric = false; }), {"no zero point", "int8"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.activations.mode = "dynamic", o.activations.clip = "mse"; }), {"dynamic", "mode: static"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.activations.percentile = 99; }), {"percentile", "clip: percentile"}));
  CHECK(contains_all(refused(nothing, [](Transformer& m) { m.blocks[1].mlp_norm.weight.fill_(std::numeric_limits<float>::infinity()); }), {"model.layers.1.mlp.gate_proj", "not finite"}));
  CHECK(contains_all(refused(kv, [](Transformer& m) { m.blocks[2].attention.value.weight.zero_(); }), {"values of layer 2", "all zero"}));
  CHECK(contains_all(refused(nothing, [](Transformer& m) { m.blocks[0].attention_norm.weight.zero_(); }), {"model.layers.0.self_attn.q_proj", "all zero", "keep_float"}));
  data.calibration.clear();
  CHECK(contains_all(refused(nothing), {"needs calibration data", "mode: dynamic"}));
  Problems problems;
  QuantizeOptions encoder;
  encoder.has_kv_cache = true;
  check_activations(testing::tiny_encoder(1)->config(), encoder, problems);
  CHECK(contains_all(error_text([&] { problems.throw_if_any("no"); }), {"encoder", "no keys and values"}));
}

}  // namespace kompakt
