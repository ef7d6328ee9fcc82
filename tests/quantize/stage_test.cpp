// The stage on tiny models: plans and their errors, fake quantization in training, calibration by blocks, lossless files.
#include "quantize/stage.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <cmath>

#include "core/files.h"
#include "core/random.h"
#include "core/text.h"
#include "quantize/fake_quant.h"
#include "quantize/methods.h"
#include "quantize/tensors.h"
#include "tests/support.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

std::unique_ptr<Transformer> stage_llama(std::int64_t hidden = 64, bool tied = true) {
  const Json json = {{"model_type", "llama"}, {"hidden_size", hidden}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"intermediate_size", 128},
                     {"vocab_size", 90}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", tied}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), 3);
  for (Linear* linear : model->linears()) linear->weight = linear->weight * 8;  // N(0, 0.02) computes next to nothing
  return model;
}

std::unique_ptr<Transformer> stage_bert() {
  const Json json = {{"model_type", "bert"}, {"hidden_size", 64}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"intermediate_size", 128}, {"vocab_size", 60},
                     {"max_position_embeddings", 32}, {"type_vocab_size", 2}, {"layer_norm_eps", 1e-12}, {"hidden_act", "gelu"}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), 4);
  for (Linear* linear : model->linears()) linear->weight = linear->weight * 8;
  model->add_classifier({"a", "b", "c"}, "mean");
  model->classifier.weight = at::randn({3, 64});
  return model;
}

TaskData stage_text(std::int64_t windows = 24, std::int64_t length = 32) {
  TaskData data;
  data.kind = TaskData::Kind::text;
  const CounterRandom random(9, "text");
  for (std::int64_t w = 0; w < windows; ++w) {
    std::vector<std::int64_t> ids;
    for (std::int64_t t = 0; t < length; ++t) ids.push_back(static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(w * length + t), 90)));
    data.calibration.push_back(ids);
  }
  return data;
}

TaskData stage_examples(std::int64_t count = 60) {
  TaskData data;
  data.kind = TaskData::Kind::classification;
  data.labels = {"a", "b", "c"};
  const CounterRandom random(10, "examples");
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t label = i % 3;
    std::vector<std::int64_t> ids = {1, 3 + label};
    for (std::int64_t t = 0; t < i % 7; ++t) ids.push_back(10 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(i * 16 + t), 50)));
    (i % 5 ? data.train : data.dev).ids.push_back(ids);
    (i % 5 ? data.train : data.dev).labels.push_back(label);
  }
  data.hash = "examples";
  return data;
}

at::Tensor stage_logits(const Transformer& model, const TaskData& data) {
  at::NoGradGuard no_grad;
  ModelInput input;
  const auto& ids = data.calibration.front();
  input.ids = at::tensor(at::ArrayRef<std::int64_t>(ids), at::kLong).unsqueeze(0);
  return model.forward(input);
}

QuantizeOptions stage_options(const char* weights, const char* method) {
  QuantizeOptions options;
  options.weights = weights, options.method = method, options.calibration_sequences = 24;
  return options;
}

}  // namespace

TEST_CASE("a plan names every matrix once and says what does not fit", "[quantize][stage]") {
  const auto model = stage_llama();
  QuantizeOptions options = stage_options("ternary", "rtn");
  const QuantizationPlan plan = plan_quantization(model->config(), options);
  CHECK(plan.tensors.size() == 15);  // 2 x 7 linears and the embedding
  CHECK(plan.tensors.at("model.embed_tokens").grid->name == "int8");
  CHECK(plan.tensors.at("model.layers.1.mlp.down_proj").group == 64);
  options.keep_float = {"*.mlp.*", "model.embed_tokens"};
  CHECK(plan_quantization(model->config(), options).tensors.size() == 8);
  options.keep_float = {"*.mpl.*"};
  CHECK(contains_all(error_text([&] { plan_quantization(model->config(), options); }), {"mpl", "quantize.keep_float"}));
  options = stage_options("tq1_0", "rtn");
  CHECK(contains_all(error_text([&] { plan_quantization(model->config(), options); }), {"model.layers.0.self_attn.q_proj", "64", "256", "allow_fallback"}));
  options.allow_fallback = true;
  options.fallback = "q8_0";
  const QuantizationPlan fallen = plan_quantization(model->config(), options);
  CHECK(fallen.fallbacks.size() == 14);
  CHECK(contains_all(fallen.fallbacks.front(), {"256", "q8_0", "tq1_0"}));
  options.fallback = "tq2_0";
  CHECK(contains_all(error_text([&] { plan_quantization(model->config(), options); }), {"fallback", "int8"}));
  options = stage_options("q4_0", "rtn");
  options.group = 64;
  CHECK(contains_all(error_text([&] { plan_quantization(model->config(), options); }), {"q4_0", "32", "leave the key out"}));
  options = stage_options("ternery", "gtpq");
  CHECK(contains_all(error_text([&] { plan_quantization(model->config(), options); }), {"ternery", "did you mean", "gtpq", "gptq"}));
}

TEST_CASE("untied heads and classifiers take a grid when asked", "[quantize][stage]") {
  QuantizeOptions options = stage_options("int4", "rtn");
  options.head = "int8", options.embedding = "none";
  const auto untied = stage_llama(64, false);
  CHECK(plan_quantization(untied->config(), options).tensors.count("lm_head") == 1);
  CHECK(plan_quantization(untied->config(), options).tensors.count("model.embed_tokens") == 0);
  CHECK(plan_quantization(stage_bert()->config(), options).tensors.count("classifier") == 1);
}

TEST_CASE("the straight-through gradient is the identity and the value exactly that of the grid", "[quantize][fake]") {
  at::Tensor w = at::randn({6, 64}).requires_grad_(true);
  const GridSpec spec{find_grid("ternary"), 64};
  const at::Tensor g = at::randn({6, 64}), out = straight_through(w, round_to_grid(spec, w));
  CHECK(at::equal(out, round_to_grid(spec, w)));
  (out * g).sum().backward();
  CHECK(at::equal(w.grad(), g));
}

TEST_CASE("fake quantization computes the deployed model, follows the weights, and leaves no trace", "[quantize][fake]") {
  auto model = stage_llama();
  const TaskData data = stage_text();
  const at::Tensor float_logits = stage_logits(*model, data);
  const QuantizationPlan plan = plan_quantization(model->config(), stage_options("ternary", "rtn"));
  auto rounded = model->clone();
  for (const auto& [name, spec] : plan.tensors) {
    const QuantizableTensor tensor = find_quantizable(*rounded, name);
    *tensor.weight = round_to_grid(spec, *tensor.weight);
  }
  const auto constraint = fake_quantization(plan);
  constraint->attach(*model);
  constraint->before_forward(*model, 0, 10);
  CHECK(at::equal(stage_logits(*model, data), stage_logits(*rounded, data)));
  model->linears().front()->weight.mul_(-1);
  CHECK(at::equal(stage_logits(*model, data), stage_logits(*rounded, data)));  // one step, one rounding
  constraint->after_step(*model);
  CHECK(!at::equal(stage_logits(*model, data), stage_logits(*rounded, data)));
  model->linears().front()->weight.mul_(-1);
  constraint->detach(*model);
  CHECK(at::equal(stage_logits(*model, data), float_logits));

  const auto gradual = fake_quantization(plan, {0.5, "linear"});
  gradual->attach(*model);
  gradual->before_forward(*model, 0, 20);  // a tenth of the way
  const at::Tensor w = model->linears().front()->weight, effective = model->linears().front()->effective_weight();
  CHECK(at::allclose(effective, w + 0.1 * (round_to_grid({find_grid("ternary"), 64}, w) - w)));
  gradual->before_forward(*model, 10, 20);
  CHECK(at::equal(model->linears().front()->effective_weight(), round_to_grid({find_grid("ternary"), 64}, w)));
  gradual->detach(*model);
}

TEST_CASE("a mask acts before the grid: what it removes stays zero", "[quantize][fake]") {
  auto model = stage_llama();
  Linear* linear = model->linears().front();
  const at::Tensor mask = at::rand({64, 64}).gt(0.5).to(at::kFloat);
  linear->transform = [mask](const at::Tensor& w) { return w * mask; };
  const auto constraint = fake_quantization(plan_quantization(model->config(), stage_options("ternary", "rtn")));
  constraint->attach(*model);
  constraint->before_forward(*model, 0, 1);
  linear->weight.requires_grad_(true);
  const at::Tensor effective = linear->effective_weight();
  CHECK((effective * (1 - mask)).abs().max().item<float>() == 0.0f);
  effective.sum().backward();
  CHECK(at::equal(linear->weight.grad(), mask));
  constraint->detach(*model);
  CHECK(static_cast<bool>(linear->transform));
}

TEST_CASE("compacted embeddings are rounded as the whole table would be", "[quantize][fake]") {
  auto model = stage_bert();
  const QuantizationPlan plan = plan_quantization(model->config(), stage_options("ternary", "rtn"));
  const at::Tensor whole = round_to_grid(plan.tensors.at(model->tokens.name), model->tokens.weight), ids = at::tensor({0, 3, 7, 59}, at::kLong);
  model->tokens.compact(ids);
  const auto constraint = fake_quantization(plan);
  constraint->attach(*model);
  constraint->before_forward(*model, 0, 1);
  CHECK(at::equal(model->tokens.effective_weight(), whole.index_select(0, ids)));
  constraint->detach(*model);
  model->tokens.expand();
}

TEST_CASE("the embedding rounds the rows that a batch looks up, and as the whole table would be", "[quantize][fake]") {
  auto model = stage_bert();
  const QuantizationPlan plan = plan_quantization(model->config(), stage_options("ternary", "rtn"));
  const GridSpec spec = plan.tensors.at(model->tokens.name);
  model->tokens.weight.requires_grad_(true);
  const at::Tensor ids = at::tensor({7, 3, 59, 3, 0, 7}, at::kLong).reshape({2, 3}), g = at::randn({2, 3, model->config().hidden});
  const at::Tensor expected = at::embedding(straight_through(model->tokens.weight, round_to_grid(spec, model->tokens.weight)), ids);
  (expected * g).sum().backward();
  const at::Tensor gradient = model->tokens.weight.grad();
  model->tokens.weight.mutable_grad() = at::Tensor();

  const auto constraint = fake_quantization(plan);
  constraint->attach(*model);
  constraint->before_forward(*model, 0, 1);
  CHECK(model->tokens.transform_by_row);
  const at::Tensor out = model->tokens.forward(ids);
  CHECK(at::equal(out, expected));
  (out * g).sum().backward();
  CHECK(at::allclose(model->tokens.weight.grad(), gradient));
  constraint->detach(*model);
  CHECK_FALSE(model->tokens.transform_by_row);

  auto tied = stage_llama();
  const auto whole = fake_quantization(plan_quantization(tied->config(), stage_options("ternary", "rtn")));
  whole->attach(*tied);
  CHECK(tied->tokens.transform_by_row == !tied->config().tied);  // a tied head needs every row
  whole->detach(*tied);
}

TEST_CASE("each method leaves the decoded model, its table and better outputs than the one before", "[quantize][stage]") {
  const TaskData data = stage_text();
  const auto original = stage_llama();
  const at::Tensor logits = stage_logits(*original, data);
  std::map<std::string, double> errors;
  for (const char* method : {"rtn", "gptq", "trifit"}) {
    auto model = original->clone();
    Json details = Json::object();
    StageContext context;
    context.data = &data, context.title = "quantize", context.details = &details;
    QuantizeOptions options = stage_options("ternary", method);
    const QuantizedModel result = quantize(*model, options, {}, context);
    REQUIRE(result.tensors.size() == 15);
    for (const auto& [name, q] : result.tensors) CHECK(at::equal(*find_quantizable(*model, name).weight, decode(result.plan.tensors.at(name), q)));
    REQUIRE(details.at("layers").size() == 15);
    CHECK(details.at("layers")[1].contains("output_error") == (std::string(method) != "rtn"));
    if (std::string(method) != "rtn") CHECK(details.at("calibration").at("tokens").get<std::int64_t>() == 24 * 32);
    double total = 0;
    for (const auto& row : details.at("layers")) total += row.value("output_error", 0.0);
    errors[method] = ((stage_logits(*model, data) - logits).square().sum() / logits.square().sum()).item<double>();
    std::printf("%-8s logits error %.5f, sum of output errors %.5f\n", method, errors[method], total);

    const TemporaryFolder folder;
    save_quantized(result, folder.path());
    CHECK(has_quantized(folder.path()));
    const QuantizedModel loaded = load_quantized(folder.path());
    REQUIRE(loaded.tensors.size() == result.tensors.size());
    for (const auto& [name, q] : result.tensors) {
      CHECK(at::equal(loaded.tensors.at(name).codes, q.codes));
      CHECK(at::equal(decode(loaded.plan.tensors.at(name), loaded.tensors.at(name)), *find_quantizable(*model, name).weight));
    }
    const std::string first = read_text(folder.path() / "quantization.safetensors");
    save_quantized(loaded, folder.path());
    CHECK(read_text(folder.path() / "quantization.safetensors") == first);
  }
  CHECK(errors["gptq"] < errors["rtn"]);
  CHECK(errors["trifit"] < errors["gptq"]);
}

TEST_CASE("the output matrix is chosen by its inputs, tied or not", "[quantize][stage]") {
  const TaskData data = stage_text();
  for (const bool tied : {true, false})
    for (const char* method : {"gptq", "trifit"})
      for (const bool calibrated : {true, false}) {
        CAPTURE(tied, method, calibrated);
        const auto model = stage_llama(64, tied);
        const at::Tensor head = (tied ? model->tokens.weight : model->lm_head.weight).clone();
        QuantizeOptions options = stage_options("int4", method);
        options.embedding = "int4", options.calibrate_head = calibrated;
        if (!tied) options.head = "int4";
        Json details = Json::object();
        StageContext context;
        context.data = &data, context.details = &details;
        const QuantizedModel result = quantize(*model, options, {}, context);
        const std::string name = tied ? model->tokens.name : model->lm_head.name;
        const Json* row = nullptr;
        for (const Json& layer : details.at("layers"))
          if (layer.at("layer") == name) row = &layer;
        REQUIRE(row);
        const at::Tensor now = tied ? model->tokens.weight : model->lm_head.weight, rounded = decode(result.plan.tensors.at(name), encode(result.plan.tensors.at(name), head));
        CHECK(at::equal(now, decode(result.plan.tensors.at(name), result.tensors.at(name))));
        CHECK(result.tensors.size() == (tied ? 15u : 16u));
        CHECK(row->contains("output_error") == calibrated);
        CHECK(at::equal(now, rounded) != calibrated);
        if (calibrated) CHECK(row->at("output_error").get<double>() < 0.9 * row->at("rounding_error").get<double>());
        if (!tied) CHECK(at::equal(model->tokens.weight, decode(result.plan.tensors.at(model->tokens.name), result.tensors.at(model->tokens.name))));
      }
  // Eight bits are rounded: there is nothing to gain.
  const auto model = stage_llama();
  QuantizeOptions options = stage_options("int4", "gptq");
  Json details = Json::object();
  StageContext context;
  context.data = &data, context.details = &details;
  quantize(*model, options, {}, context);
  CHECK(details.at("layers").back().contains("output_error"));  // a linear is the last
}

TEST_CASE("every grid survives the file, bit for bit, and damage is named", "[quantize][stage]") {
  QuantizedModel all;
  for (const Grid& grid : grids()) {
    const GridSpec spec{&grid, grid.default_group};
    const std::string name = "layer." + std::string(grid.name);
    all.plan.tensors[name] = spec;
    all.tensors[name] = encode(spec, at::randn({5, 256}));
  }
  all.plan.fallbacks = {"a sentence"};
  const TemporaryFolder folder;
  save_quantized(all, folder.path());
  const QuantizedModel loaded = load_quantized(folder.path());
  CHECK(loaded.plan.fallbacks == all.plan.fallbacks);
  for (const auto& [name, q] : all.tensors) {
    CAPTURE(name);
    CHECK(at::equal(decode(all.plan.tensors.at(name), q), decode(loaded.plan.tensors.at(name), loaded.tensors.at(name))));
  }
  std::string bytes = read_text(folder.path() / "quantization.safetensors");
  const auto at = bytes.find("layer.int8.codes");
  REQUIRE(at != std::string::npos);
  bytes.replace(at, 16, "layer.intx.codes");
  write_text(folder.path() / "quantization.safetensors", bytes);
  CHECK(contains_all(error_text([&] { load_quantized(folder.path()); }), {"layer.int8.codes", "missing"}));
}

TEST_CASE("quantization-aware training on the grid ends on the grid", "[quantize][stage]") {
  const TaskData data = stage_examples();
  auto model = stage_bert();
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context;
  context.data = &data, context.title = "quantize", context.details = &details, context.work = work.path(), context.seed = 1;
  QuantizeOptions options = stage_options("ternary", "qad");
  options.train.epochs = 3, options.train.batch_size = 8, options.train.learning_rate = 3e-3, options.train.precision = "float32", options.train.dropout = 0;
  const std::vector<std::shared_ptr<Objective>> objectives = {label_cross_entropy()};
  CHECK(contains_all(error_text([&] { quantize(*model, options, {}, context); }), {"qad", "objective"}));
  const QuantizedModel result = quantize(*model, options, objectives, context);
  for (const auto& [name, q] : result.tensors) CHECK(at::equal(*find_quantizable(*model, name).weight, decode(result.plan.tensors.at(name), q)));
  for (const QuantizableTensor& tensor : quantizable_tensors(*model)) CHECK(!*tensor.transform);
  CHECK(details.at("training").at("steps").get<std::int64_t>() > 0);
  CHECK(details.at("training").at("final_loss").get<double>() < 1.0);
}

TEST_CASE("methods that need data say so", "[quantize][stage]") {
  auto model = stage_llama();
  TaskData data;
  data.kind = TaskData::Kind::text;
  StageContext context;
  context.data = &data, context.title = "04-quantize";
  CHECK(contains_all(error_text([&] { quantize(*model, stage_options("int4", "gptq"), {}, context); }), {"calibration", "04-quantize", "rtn"}));
}

TEST_CASE("a weight that is not finite is named by its tensor", "[quantize][stage]") {
  auto model = stage_llama();
  model->blocks[1].mlp.up.weight[3][4] = NAN;
  const TaskData data = stage_text();
  StageContext context;
  context.data = &data, context.title = "quantize";
  CHECK(contains_all(error_text([&] { quantize(*model, stage_options("int4", "rtn"), {}, context); }), {"model.layers.1.mlp.up_proj", "row 3", "not finite"}));
}

}  // namespace kompakt
