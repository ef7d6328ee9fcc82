// Scales per channel (AWQ, SmoothQuant): formulas by hand, the function kept on every family, the search against the identity.
#include "quantize/channel_scales.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include "core/text.h"
#include "model/families.h"
#include "model/invariance.h"
#include "quantize/stage.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

at::Tensor scales_row(std::initializer_list<double> values) { return at::tensor(at::ArrayRef<double>(values.begin(), values.size()), at::kDouble); }

// Random positive scales, [channels] of a mapping.
at::Tensor scales_random(const ScaleMapping& mapping, std::uint64_t seed) {
  const std::int64_t channels = mapping.norm ? mapping.norm->weight.size(0) : mapping.producer->out_features();
  const CounterRandom random(seed, mapping.name);
  at::Tensor s = at::empty({channels}, at::kDouble);
  for (std::int64_t i = 0; i < channels; ++i) s.data_ptr<double>()[i] = std::exp(random.normal(static_cast<std::uint64_t>(i)));
  return s;
}

std::unique_ptr<Transformer> scales_model(const Family& family) {
  Json json = {{"model_type", std::string(family.model_types.front())}, {"vocab_size", 50}, {"hidden_size", 32}, {"intermediate_size", 48}, {"num_hidden_layers", 3}, {"num_attention_heads", 4}, {"max_position_embeddings", 64}};
  if (!family.encoder) json["num_key_value_heads"] = 2, json["head_dim"] = 8;
  ModelConfig config = config_from_json(json, "tiny");
  config.qkv_bias = config.mlp_bias = true;
  auto model = std::make_unique<Transformer>(config, 3);
  for (const NamedParameter& parameter : model->parameters()) {
    const CounterRandom random(3, "scales/" + parameter.name);
    at::Tensor values = at::empty(parameter.value->sizes(), at::kDouble);
    const bool norm = values.dim() == 1 && !ends_with(parameter.name, ".bias") && !family.norm_plus_one;
    for (std::int64_t i = 0; i < values.numel(); ++i) values.data_ptr<double>()[i] = (norm ? 1 : 0) + 0.3 * random.normal(static_cast<std::uint64_t>(i));
    *parameter.value = values;
  }
  return model;
}

at::Tensor scales_output(const Transformer& model) {
  const at::NoGradGuard no_grad;
  const ModelInput input = testing::tiny_input({{3, 9, 14, 2, 40, 33, 8, 21}, {5, 5, 17, 48, 1, 30, 12, 6}});
  return model.config().family->encoder ? model.hidden(input) : model.forward(input);
}

StageContext scales_context(const TaskData& data, Json* details = nullptr) {
  StageContext context;
  context.title = "quantize", context.data = &data, context.details = details;
  return context;
}

QuantizeOptions scales_options(const char* basis, const char* weights = "int3", const char* method = "rtn") {
  QuantizeOptions options;
  options.weights = weights, options.group = 8, options.embedding = "none", options.method = method, options.basis.basis = basis;
  return options;
}

}  // namespace

TEST_CASE("AWQ's and SmoothQuant's scales by hand", "[quantize][basis][scales]") {
  const at::Tensor x = scales_row({4, 1, 0.25}), w = scales_row({0.5, 0.25, 1});
  CHECK(at::allclose(awq_scales(x, w, 0, false), at::ones({3}, at::kDouble), 1e-12));
  // x / sqrt(4 * 0.25)
  CHECK(at::allclose(awq_scales(x, w, 1, false), scales_row({4, 1, 0.25}), 1e-12));
  CHECK(at::allclose(awq_scales(x, w, 0.5, false), scales_row({2, 1, 0.5}), 1e-12));
  // r = 0.5, duo: 2 / (sqrt 0.5 + 1e-4), 1 / (0.5 + 1e-4), 0.5 / (1 + 1e-4), then / sqrt(max min)
  const double a = 2 / (std::sqrt(0.5) + 1e-4), b = 1 / 0.5001, c = 0.5 / 1.0001, middle = std::sqrt(a * c);
  CHECK(at::allclose(awq_scales(x, w, 0.5, true), scales_row({a / middle, b / middle, c / middle}), 1e-12));
  CHECK(awq_scales(scales_row({0, 1, 2}), w, 1, false).gt(0).all().item<bool>());  // a dead channel
  CHECK(at::allclose(smoothquant_scales(scales_row({16, 1, 0, 9}), scales_row({4, 4, 1, 0}), 0.5), scales_row({2, 0.5, 1, 1}), 1e-12));
  CHECK(at::allclose(smoothquant_scales(scales_row({16}), scales_row({4}), 1), scales_row({16}), 1e-12));
  CHECK(at::allclose(smoothquant_scales(scales_row({16}), scales_row({4}), 0), scales_row({0.25}), 1e-12));
}

TEST_CASE("scales between any producer and its readers keep the function", "[quantize][basis][scales]") {
  for (const Family& family : families()) {
    INFO(family.name);
    const auto model = scales_model(family);
    const at::Tensor expected = scales_output(*model);
    std::size_t count = 0;
    for (std::int64_t layer = 0; layer < 3; ++layer)
      for (const ScaleMapping& mapping : scale_mappings(*model, layer)) {
        apply_scales(mapping, scales_random(mapping, 7));
        ++count;
      }
    CHECK(count == (family.post_norm ? 3 : 12));  // BERT: value to output alone
    CHECK((scales_output(*model) - expected).abs().max().item<double>() < 1e-9 * expected.abs().max().item<double>());
  }
}

TEST_CASE("grouped queries share the scales of their value head", "[quantize][basis][scales]") {
  ScaleMapping mapping;
  mapping.heads = 2, mapping.repeats = 2;
  CHECK(at::equal(reader_scales(mapping, scales_row({1, 2, 3, 4})), scales_row({1, 2, 1, 2, 3, 4, 3, 4})));
}

TEST_CASE("the search never loses to the identity and keeps the function", "[quantize][basis][scales][stage]") {
  TaskData data = testing::tiny_text();
  auto model = testing::tiny_decoder(6);
  for (Block& block : model->blocks) block.attention_norm.weight.mul_(at::exp(at::linspace(-2, 2, 24)));  // something to find
  const auto before = model->clone();
  const QuantizeOptions options = scales_options("awq");
  const QuantizationPlan plan = plan_quantization(model->config(), options);
  StageContext context = scales_context(data);
  const CalibrationSet set = calibration_set(context, 6);
  const Json rows = search_scales(*model, set, {plan.tensors, {}, 5, 0});
  CHECK(rows.size() == 12);
  std::int64_t moved = 0;
  for (const Json& row : rows) {
    CHECK(row.at("loss").get<double>() <= row.at("loss_of_identity").get<double>());
    moved += row.at("choice") != "identity";
  }
  CHECK(moved > 0);
  const ModelInput& input = set.inputs.front();
  const at::NoGradGuard no_grad;
  CHECK((model->forward(input) - before->forward(input)).abs().max().item<double>() < 1e-4 * before->forward(input).abs().max().item<double>());

  // The single point r = 0 without duo is the identity, whose loss is that of plain rounding.
  auto plain = before->clone();
  ScaleMapping mapping = scale_mappings(*plain, 0)[1];
  const at::Tensor w = plain->blocks[0].attention.output.weight;
  CHECK(at::equal(round_to_grid(plan.tensors.at(mapping.readers[0]->name), w * reader_scales(mapping, awq_scales(at::rand({12}, at::kDouble), at::rand({12}, at::kDouble), 0, false)).to(at::kFloat)), round_to_grid(plan.tensors.at(mapping.readers[0]->name), w)));

  // Only linears with a grid are searched.
  auto partial = before->clone();
  QuantizeOptions kept = options;
  kept.keep_float = {"*.mlp.*", "*.o_proj"};
  CHECK(search_scales(*partial, set, {plan_quantization(model->config(), kept).tensors, {}, 2, 1}).size() == 1);
}

TEST_CASE("AWQ's loss is that of the module", "[quantize][basis][scales]") {
  // One block, scales searched by hand for up -> down: |x (Q(W s)/s - W)^T|^2 over all tokens.
  TaskData data = testing::tiny_text();
  auto model = testing::tiny_decoder(8, false, 1);
  StageContext context = scales_context(data);
  const CalibrationSet set = calibration_set(context, 6);
  const QuantizationPlan plan = plan_quantization(model->config(), scales_options("awq"));
  const at::NoGradGuard no_grad;
  TapMap taps({"input:" + model->blocks[0].mlp.down.name, "layer.0.context"});
  model->forward(set.inputs.front(), &taps);
  const at::Tensor x = taps.at("input:" + model->blocks[0].mlp.down.name).reshape({-1, 40}), w = model->blocks[0].mlp.down.weight;
  const double expected = at::matmul(x, (round_to_grid(plan.tensors.at("model.layers.0.mlp.down_proj"), w) - w).t()).square().sum().item<double>();
  // And for the norm in front of attention: the change of what the output projection puts out.
  const auto rounded = model->clone();
  for (Linear* linear : {&rounded->blocks[0].attention.query, &rounded->blocks[0].attention.key, &rounded->blocks[0].attention.value}) linear->weight = round_to_grid(plan.tensors.at(linear->name), linear->weight);
  TapMap changed({"layer.0.context"});
  rounded->forward(set.inputs.front(), &changed);
  const double expected_attention = at::matmul((changed.at("layer.0.context") - taps.at("layer.0.context")).reshape({-1, 24}), model->blocks[0].attention.output.weight.t()).square().sum().item<double>();
  const Json rows = search_scales(*model, set, {plan.tensors, {}, 1, 0});
  CHECK(rows[3].at("mapping") == "model.layers.0.mlp.up_proj");
  CHECK(rows[3].at("loss_of_identity").get<double>() == Approx(expected).epsilon(1e-4));
  CHECK(rows[0].at("loss_of_identity").get<double>() == Approx(expected_attention).epsilon(1e-4));
}

TEST_CASE("SmoothQuant moves outliers of the activations into the weights", "[quantize][basis][scales][stage]") {
  TaskData data = testing::tiny_text();
  Json details = Json::object();
  StageContext context = scales_context(data, &details);
  auto model = testing::tiny_decoder(6);
  model->blocks[1].mlp_norm.weight.index_put_({at::tensor({5}, at::kLong)}, at::tensor({40.0f}));
  const auto largest = [&] {
    const at::NoGradGuard no_grad;
    TapMap taps({"input:model.layers.1.mlp.up_proj"});
    model->forward(calibration_set(context, 6).inputs.front(), &taps);
    const at::Tensor top = taps.values().begin()->second.abs().amax({0, 1});
    return (top.max() / top.median()).item<double>();
  };
  const double before = largest();
  QuantizeOptions options = scales_options("smoothquant");
  change_basis(*model, options, {}, context);
  CHECK(largest() < 0.5 * before);
  CHECK(contains_all(details["basis"].dump(), {"6 norms", "alpha 0.5"}));
  auto encoder = testing::tiny_encoder(1);
  CHECK(contains_all(error_text([&] { change_basis(*encoder, options, {}, context); }), {"bert", "smoothquant"}));
}

TEST_CASE("auto takes what diverges least", "[quantize][basis][stage]") {
  TaskData data = testing::tiny_text();
  Json details = Json::object();
  StageContext context = scales_context(data, &details);
  // Scale torn apart between norms and linears: rounding as it is must lose.
  auto model = testing::tiny_decoder(6);
  const CounterRandom random(4, "tear");
  for (Block& block : model->blocks) {
    at::Tensor factor = at::empty({24}, at::kFloat);
    for (std::int64_t i = 0; i < 24; ++i) factor.data_ptr<float>()[i] = static_cast<float>(std::exp(1.5 * random.normal(static_cast<std::uint64_t>(i))));
    block.attention_norm.weight = block.attention_norm.weight * factor;
    block.mlp_norm.weight = block.mlp_norm.weight * factor;
    for (Linear* linear : {&block.attention.query, &block.attention.key, &block.attention.value, &block.mlp.gate, &block.mlp.up}) linear->weight = linear->weight / factor;
  }
  const auto copy = model->clone();
  QuantizeOptions options = scales_options("auto", "int4");
  options.basis.blocks = 2;
  quantize(*model, options, {}, context);
  const Json basis = details["basis"], candidates = basis["figures"]["candidates"];
  INFO(basis.dump());
  CHECK(basis["name"] == "auto");
  CHECK(candidates.size() == 4);
  CHECK(candidates["fold"].get<double>() < 0.7 * candidates["none"].get<double>());
  CHECK(basis["parts"][0] != "chosen: none");
  // The probe's choice is what the stage then does: the same as naming it.
  const std::string chosen = basis["parts"][0].get<std::string>().substr(8);
  auto named = copy->clone();
  options.basis.basis = chosen;
  quantize(*named, options, {}, context);
  CHECK(testing::same_parameters(testing::copy_of(*named), testing::copy_of(*model)));

  // A classifier: folding is illegal and listed, the others are compared on examples.
  TaskData examples = testing::tiny_classification();
  context.data = &examples;
  auto encoder = testing::tiny_encoder(2);
  quantize(*encoder, scales_options("auto"), {}, context);
  CHECK(contains_all(details["basis"].dump(), {"fold not tried", "candidates"}));
  CHECK(details["basis"]["figures"]["candidates"].size() == 3);
  TaskData nothing;
  nothing.kind = TaskData::Kind::text;
  context.data = &nothing;
  CHECK(contains_all(error_text([&] { change_basis(*copy, scales_options("auto"), {}, context); }), {"basis auto", "data.calibration"}));
}
}  // namespace kompakt
