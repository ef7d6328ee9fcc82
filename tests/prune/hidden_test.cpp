// The residual stream made narrower: exact where the channels carry nothing, gates against finite differences, what refits pay,
// rotation, the same bytes, refusals.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/node.h"
#include "model/families.h"
#include "model/invariance.h"
#include "prune/channels.h"
#include "prune/shape_planner.h"
#include "prune/stage.h"
#include "prune/stream_refit.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/calibration.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// Every kind of parameter of a decoder random; 32 channels, head size 6: hidden is not heads times their size.
std::unique_ptr<Transformer> hidden_model(const std::string& family, bool tied) {
  Json json = {{"model_type", std::string(find_family(family)->model_types.front())}, {"vocab_size", 50}, {"hidden_size", 32}, {"intermediate_size", 40}, {"num_hidden_layers", 3}, {"num_attention_heads", 4},
               {"num_key_value_heads", 2}, {"head_dim", 6}, {"max_position_embeddings", 64}, {"tie_word_embeddings", tied}, {"rms_norm_eps", 1e-6}};
  if (family == "mistral" || family == "gemma3") json["sliding_window"] = 5;
  ModelConfig config = config_from_json(json, "tiny");
  config.qkv_bias = config.out_bias = true;
  auto model = std::make_unique<Transformer>(config, 5);
  const at::NoGradGuard no_grad;
  for (const NamedParameter& parameter : model->parameters()) {
    const CounterRandom random(5, parameter.name);
    const bool norm = parameter.value->dim() == 1 && !ends_with(parameter.name, ".bias");
    for (std::int64_t i = 0; i < parameter.value->numel(); ++i)
      parameter.value->data_ptr<float>()[i] = static_cast<float>((norm && !config.family->norm_plus_one ? 1 : 0) + (norm ? 0.2 : 0.35) * random.normal(static_cast<std::uint64_t>(i)));
  }
  return model;
}

struct HiddenStage {
  TaskData data = tiny_text();
  Json details = Json::object();
  StageContext context;
  HiddenStage() {
    const CounterRandom random(3, "windows");  // more windows: a refit has as many unknowns as a matrix has rows
    for (std::uint64_t w = 0; w < 60; ++w) {
      std::vector<std::int64_t> ids;
      for (std::uint64_t t = 0; t < 16; ++t) ids.push_back(3 + static_cast<std::int64_t>(random.below(w * 16 + t, 47)));
      data.calibration.push_back(std::move(ids));
    }
    context.title = "prune", context.seed = 9, context.data = &data, context.details = &details;
  }
};

PruneOptions hidden_options(const std::string& yaml) {
  PruneOptions options;
  Problems problems;
  read_fields(parse_yaml(yaml, "recipe.yaml"), "stage \"prune\"", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("mistakes");
  return options;
}

std::vector<Linear*> hidden_writers(Transformer& model) {
  std::vector<Linear*> out;
  for (Block& block : model.blocks) out.push_back(&block.attention.output), out.push_back(&block.mlp.down);
  return out;
}

at::Tensor hidden_logits(const Transformer& model) {
  const at::NoGradGuard no_grad;
  return model.forward(tiny_input({{5, 9, 30, 12, 44, 3, 8, 21}, {40, 3, 17, 17, 6, 31, 22, 10}})).to(at::kDouble);
}

double hidden_difference(const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>() / b.abs().max().item<double>(); }

double hidden_divergence(const Transformer& a, const Transformer& b, const TaskData& data) {
  const at::NoGradGuard no_grad;
  double sum = 0, count = 0;
  for (const TokenBatch& batch : measuring_batches(data, 100, 1)) {
    const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
    const at::Tensor p = at::log_softmax(a.forward(input).to(at::kDouble), -1), q = at::log_softmax(b.forward(input).to(at::kDouble), -1), kl = (p.exp() * (p - q)).sum(-1);
    sum += kl.sum().item<double>(), count += static_cast<double>(kl.numel());
  }
  return sum / count;
}

}  // namespace

TEST_CASE("channels that carry nothing leave no trace, in every family of decoders") {
  HiddenStage stage;
  const std::vector<std::int64_t> gone{0, 5, 6, 13, 20, 27, 30, 31};
  for (const char* family : {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3"})
    for (const bool tied : {true, false}) {
      CAPTURE(std::string(family), tied);
      const auto model = hidden_model(family, tied);
      {
        const at::NoGradGuard no_grad;
        for (const std::int64_t c : gone) {
          model->tokens.weight.select(1, c).zero_();
          for (Linear* writer : hidden_writers(*model)) {
            writer->weight[c].zero_();
            if (writer->bias.defined()) writer->bias[c].zero_();
          }
        }
      }
      const at::Tensor before = hidden_logits(*model);
      for (const char* criterion : {"taylor", "taylor_abs", "activation_norm", "flap"}) {
        CAPTURE(criterion);
        const auto cut = model->clone();
        const PruneOptions options = hidden_options(str("{structured: {hidden: 0.75}, multiple_of: 8, criterion: ", criterion, "}"));
        prune(*cut, options, {}, stage.context);
        CHECK(cut->config().hidden == 24);
        CHECK(hidden_difference(hidden_logits(*cut), before) < 1e-4);
        const ModelConfig planned = pruned_config(model->config(), options);
        std::int64_t weights = 0;
        for (const auto& [name, value] : copy_of(*cut)) weights += value.numel();
        CHECK(count_parameters(planned).total == weights);
        CHECK(planned.embedding_scale == Approx(cut->config().embedding_scale));
        const ModelConfig read = config_from_json(config_to_json(cut->config()), "written");
        CHECK(read.hidden == 24);
        CHECK(read.head_dim == 6);
        CHECK(read.embedding_scale == Approx(cut->config().embedding_scale));
      }
    }
}

TEST_CASE("keeping all channels changes no byte, and what cannot be cut is a bug") {
  const auto model = tiny_decoder(3);
  const auto before = copy_of(*model);
  std::vector<std::int64_t> all(24);
  std::iota(all.begin(), all.end(), 0);
  cut_hidden(*model, all);
  CHECK(same_parameters(copy_of(*model), before));
  CHECK_THROWS_AS(cut_hidden(*model, {}), std::logic_error);
  CHECK_THROWS_AS(cut_hidden(*model, {3, 3}), std::logic_error);
  CHECK_THROWS_AS(cut_hidden(*model, {0, 24}), std::logic_error);
  CHECK_THROWS_AS(cut_hidden(*tiny_encoder(3), {0, 1}), std::logic_error);
}

TEST_CASE("Taylor scores of channels are squared finite differences of their gates") {
  const auto model = hidden_model("qwen3", false);
  TaskData data = tiny_text();
  data.calibration.resize(1);
  const auto batches = measuring_batches(data, 1, 1);
  const at::Tensor square = channels_taylor(*model, batches, 1), absolute = channels_taylor_abs(*model, batches, 1);
  CHECK(at::allclose(absolute.square(), square, 1e-6, 1e-12));  // one example
  const at::NoGradGuard no_grad;
  for (const NamedParameter& parameter : model->parameters()) *parameter.value = parameter.value->to(at::kDouble);
  const ModelInput input = to_input(batches[0], c10::Device(c10::kCPU));
  for (const std::int64_t c : {0, 7, 31}) {
    const auto loss = [&](double gate) {
      const auto gated = model->clone();
      std::vector<Norm*> norms{&gated->final_norm};
      for (Block& block : gated->blocks) norms.push_back(&block.attention_norm), norms.push_back(&block.mlp_norm);
      for (Norm* norm : norms) norm->weight[c].mul_(gate);
      const at::Tensor logits = at::log_softmax(gated->forward(input).squeeze(0), -1);
      const at::Tensor next = input.ids[0].slice(0, 1);
      return -logits.slice(0, 0, next.size(0)).gather(1, next.unsqueeze(1)).mean().item<double>();
    };
    const double slope = (loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4;
    CHECK(absolute[c].item<double>() == Approx(std::abs(slope)).epsilon(1e-3).margin(1e-6));
  }
}

TEST_CASE("the magnitude of a channel counts all weights that go with it") {
  for (const bool tied : {true, false}) {
    const auto model = hidden_model("llama", tied);
    const at::NoGradGuard no_grad;
    for (const NamedParameter& parameter : model->parameters()) parameter.value->zero_();
    // Each part alone: embedding 1, gain 2 times 3 of a reader, writer row 2 with a bias of 4, head 5 behind a gain of 1.
    model->tokens.weight[7][3] = 1;
    model->blocks[1].mlp_norm.weight[4] = 2, model->blocks[1].mlp.up.weight[6][4] = 3;
    model->blocks[0].attention.output.weight[5][1] = 2, model->blocks[0].attention.output.bias[5] = 4;
    model->final_norm.weight[6] = 1;
    if (!tied) model->lm_head.weight[9][6] = 5;
    at::Tensor want = at::zeros({32}, at::kDouble);
    want[3] = 1, want[4] = 6, want[5] = std::sqrt(20.0), want[6] = tied ? 0 : 5;
    CHECK(at::allclose(channels_magnitude(*model, {}, 1), want, 1e-12, 0));
    CHECK(best_channels(channels_magnitude(*model, {}, 1), 2) == (tied ? std::vector<std::int64_t>{4, 5} : std::vector<std::int64_t>{4, 6}));
    CHECK(best_channels(at::zeros({32}, at::kDouble), 3) == std::vector<std::int64_t>{0, 1, 2});
    CHECK(!at::equal(channels_random(*model, {}, 1), channels_random(*model, {}, 2)));
  }
}

TEST_CASE("activation norms and fluctuations of channels follow their formulas") {
  const auto model = hidden_model("llama", true);
  const TaskData data = tiny_text();
  const auto batches = measuring_batches(data, 6, 1);
  const at::Tensor norms = channels_activation(*model, batches, 1), flap = channels_flap(*model, batches, 1);
  const at::NoGradGuard no_grad;
  const ModelInput input = to_input(batches[0], c10::Device(c10::kCPU));
  at::Tensor x = model->embed(input), want = at::zeros({32}, at::kDouble), fluctuation = want.clone();
  const auto add = [&](const at::Tensor& y, const std::vector<at::Tensor>& readers) {
    want += y.to(at::kDouble).abs().mean(1).square().sum(0).sqrt();
    const at::Tensor variance = y.to(at::kDouble).flatten(0, 1).var(0, false);
    for (const at::Tensor& w : readers) fluctuation += variance * w.to(at::kDouble).square().sum(0);
  };
  for (std::int64_t i = 0; i < 3; ++i) {
    const Block& block = model->blocks[static_cast<std::size_t>(i)];
    const at::Tensor a = model->attention_input(i, x), h = model->after_attention(i, x, model->attention_context(i, a, input)), m = model->mlp_input(i, h);
    add(a, {block.attention.query.weight, block.attention.key.weight, block.attention.value.weight});
    add(m, {block.mlp.gate.weight, block.mlp.up.weight});
    x = model->block_forward(i, x, input);
  }
  add(model->final_norm.forward(x), {model->tokens.weight});
  CHECK(at::allclose(norms, want, 1e-4, 1e-6));
  CHECK(at::allclose(flap, fluctuation, 1e-4, 1e-6));
}

TEST_CASE("the rotation to principal channels changes no logit and orders the energy") {
  HiddenStage stage;
  const auto batches = measuring_batches(stage.data, 100, 1);
  for (const bool tied : {true, false})
    for (const char* family : {"llama", "qwen2", "qwen3", "smollm3"}) {
      CAPTURE(std::string(family), tied);
      const auto model = hidden_model(family, tied);
      const at::Tensor before = hidden_logits(*model), values = rotate_to_principal(*model, batches, tied);
      CHECK(hidden_difference(hidden_logits(*model), before) < 1e-4);
      CHECK(!model->config().tied);
      CHECK(values.slice(0, 1).le(values.slice(0, 0, 31)).all().item<bool>());
      CHECK(values.sum().item<double>() == Approx(32).epsilon(1e-3));  // norms put out vectors of length sqrt(d)
      // Activations of the rotated model: the mean square of channel c over norms is its eigenvalue.
      const at::NoGradGuard no_grad;
      at::Tensor energy = at::zeros({32}, at::kDouble);
      double rows = 0;
      for (const TokenBatch& batch : batches) {
        const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
        at::Tensor x = model->embed(input);
        for (std::int64_t i = 0; i < 3; ++i) {
          const at::Tensor a = model->attention_input(i, x), h = model->after_attention(i, x, model->attention_context(i, a, input));
          energy += (a.to(at::kDouble).square() + model->mlp_input(i, h).to(at::kDouble).square()).sum(at::IntArrayRef{0, 1});
          x = model->after_mlp(i, h, model->mlp_inner(i, model->mlp_input(i, h)));
        }
        energy += model->final_norm.forward(x).to(at::kDouble).square().sum(at::IntArrayRef{0, 1});
        rows += static_cast<double>(input.ids.numel());
      }
      CHECK(at::allclose(energy / (7 * rows), values, 1e-2, 1e-3));
    }
}

TEST_CASE("a stream that lies in fewer dimensions is sliced without loss") {
  HiddenStage stage;
  for (const bool tied : {true, false})
    for (const char* compensate : {"none", "ls", "stream"}) {
      CAPTURE(tied, compensate);
      const auto model = hidden_model("llama", tied);
      {
        const at::NoGradGuard no_grad;  // all that is written lies in 24 random directions of 32
        const CounterRandom random(2, "plane");
        at::Tensor raw = at::empty({32, 32}, at::kDouble);
        for (std::int64_t i = 0; i < raw.numel(); ++i) raw.data_ptr<double>()[i] = random.normal(static_cast<std::uint64_t>(i));
        const at::Tensor q = std::get<0>(at::linalg_qr(raw)).slice(1, 0, 24), plane = at::matmul(q, q.t()).to(at::kFloat);
        model->tokens.weight = at::matmul(model->tokens.weight, plane);
        for (Linear* writer : hidden_writers(*model)) {
          writer->weight = at::matmul(plane, writer->weight);
          if (writer->bias.defined()) writer->bias = at::mv(plane, writer->bias);
        }
      }
      const at::Tensor before = hidden_logits(*model);
      const PruneOptions options = hidden_options(str("{structured: {hidden: 0.75, hidden_by: rotate", tied ? ", untie: true" : "", "}, multiple_of: 8, compensate: ", compensate, "}"));
      const ModelConfig planned = pruned_config(model->config(), options);
      prune(*model, options, {}, stage.context);
      CHECK(model->config().hidden == 24);
      CHECK(hidden_difference(hidden_logits(*model), before) < 2e-3);  // the principal directions come from float32 activations
      CHECK(stage.details.at("hidden").at("share_kept").get<double>() == Approx(1).epsilon(1e-5));
      CHECK(count_parameters(planned).total == count_parameters(model->config()).total);
      CHECK(stage.details.at("removed").at("hidden") == Json({32, 24}));
    }
}

TEST_CASE("rotation and refits pay for channels") {
  HiddenStage stage;
  const auto original = hidden_model("llama", false);
  const auto divergence = [&](const std::string& keys) {
    const auto cut = original->clone();
    prune(*cut, hidden_options("{structured: {hidden: 0.75" + keys + "}, multiple_of: 8, criterion: activation_norm}"), {}, stage.context);
    return hidden_divergence(*original, *cut, stage.data);
  };
  const auto compensated = [&](const std::string& keys, const char* compensate) {
    const auto cut = original->clone();
    prune(*cut, hidden_options("{structured: {hidden: 0.75" + keys + "}, multiple_of: 8, criterion: activation_norm, compensate: " + compensate + "}"), {}, stage.context);
    return hidden_divergence(*original, *cut, stage.data);
  };
  const double selected = divergence(""), rotated = divergence(", hidden_by: rotate"), refitted = compensated(", hidden_by: rotate", "ls"), stream = compensated(", hidden_by: rotate", "stream"), mixed = compensated(", layers: 1, hidden_by: rotate", "stream"),
               without = divergence(", layers: 1, hidden_by: rotate");
  CAPTURE(selected, rotated, refitted, stream, mixed, without);
  CHECK(rotated < 0.9 * selected);
  CHECK(refitted < rotated);
  CHECK(stream < 0.9 * refitted);
  CHECK(mixed < 0.9 * without);
}

TEST_CASE("a narrower stream is the same bytes for one and two threads") {
  HiddenStage stage;
  const int before = at::get_num_threads();
  for (const char* keys : {"hidden_by: rotate", "hidden_by: select"}) {
    std::vector<std::vector<std::pair<std::string, at::Tensor>>> runs;
    for (const int threads : {1, 2}) {
      at::set_num_threads(threads);
      const auto model = hidden_model("llama", false);
      prune(*model, hidden_options(str("{structured: {hidden: 0.75, ffn: 0.8, heads: 0.5, ", keys, "}, multiple_of: 8, compensate: stream}")), {}, stage.context);
      CHECK(model->config().heads == 2);
      CHECK(model->config().ffn == 32);
      runs.push_back(copy_of(*model));
    }
    at::set_num_threads(before);
    CHECK(same_parameters(runs[0], runs[1]));
  }
}

TEST_CASE("a narrower stream: what cannot be is refused before compute") {
  HiddenStage stage;
  const auto refused = [&](Transformer& model, const std::string& yaml) { return error_text([&] { prune(model, hidden_options(yaml), {}, stage.context); }); };
  const auto tied = hidden_model("llama", true), gemma = hidden_model("gemma3", true), encoder = tiny_encoder(3);
  const auto untouched = copy_of(*tied);
  CHECK(contains_all(refused(*encoder, "{structured: {hidden: 0.5}}"), {"structured.hidden", "LayerNorm", "bert"}));
  CHECK(contains_all(refused(*tied, "{structured: {hidden: 0.5, hidden_by: rotate}, multiple_of: 8}"), {"structured.hidden_by", "shares the embedding", "untie: true", "select"}));
  CHECK(contains_all(refused(*gemma, "{structured: {hidden: 0.5, hidden_by: rotate, untie: true}, multiple_of: 8}"), {"norms with a weight per channel", "select"}));
  CHECK(contains_all(refused(*tied, "{structured: {hidden: 0.9}, multiple_of: 32}"), {"structured.hidden", "remove no", "smaller multiple_of"}));
  CHECK(contains_all(refused(*tied, "{structured: {hidden: 0.9}, multiple_of: 8}"), {"remove no channel", "0.7500 (24 channels)"}));
  CHECK(contains_all(refused(*tied, "{structured: {hidden: 0.05}, multiple_of: 8}"), {"leave no channel", "0.2500 (8 channels)"}));
  CHECK(contains_all(refused(*tied, "{structured: {hidden: 0.5, untie: true}, multiple_of: 8}"), {"structured.untie", "rotate"}));
  CHECK(contains_all(refused(*tied, "{structured: {ffn: 0.8, untie: true}, multiple_of: 8}"), {"structured.untie", "no channel"}));
  CHECK(contains_all(refused(*tied, "{structured: {ffn: 0.8, hidden_by: rotate}, multiple_of: 8}"), {"structured.hidden_by", "no channel"}));
  CHECK(contains_all(refused(*tied, "{structured: {hidden: 0.5}, multiple_of: 8, criterion: obs}"), {"obs", "activation_norm", "taylor"}));
  stage.data.calibration.clear();
  CHECK(contains_all(refused(*tied, "{structured: {hidden: 0.5, hidden_by: rotate, untie: true}, multiple_of: 8}"), {"needs data"}));
  CHECK(same_parameters(copy_of(*tied), untouched));
}

TEST_CASE("the planner knows the hidden size") {
  const ModelConfig config = hidden_model("llama", true)->config();
  ShapeTarget target;
  target.format = "test", target.grids = "grid";
  target.holds = [](const std::string& linear, std::int64_t columns, std::string& why) {
    why = str("rows of ", columns, " do not divide into groups of 16");
    return columns % 16 == 0 || ends_with(linear, "down_proj") || ends_with(linear, "o_proj");
  };
  target.size = [](const ModelConfig& shape) { return FileSize{count_parameters(shape).total, count_parameters(shape).embedding}; };
  const PruneOptions options = hidden_options("{structured: {hidden: 0.5}, multiple_of: 8}"), bad = hidden_options("{structured: {hidden: 0.75}, multiple_of: 8}");
  CHECK(contains_all(error_text([&] { check_shape(config, bad, target); }), {"structured.hidden", "24", "groups of 16", "0.5 (16 channels)"}));
  check_shape(config, options, target);
  const auto axes = plan_shapes(config, options, target);
  const auto axis = std::find_if(axes.begin(), axes.end(), [](const ShapeAxis& a) { return a.key == "structured.hidden"; });
  REQUIRE(axis != axes.end());
  REQUIRE(axis->choices.size() == 2);
  CHECK(axis->choices[1].value == 16);
  CHECK(axis->choices[1].asked);
  CHECK(axis->choices[1].size.bytes == count_parameters(pruned_config(config, options)).total);
  CHECK(axis->choices[0].size.bytes > axis->choices[1].size.bytes);
  CHECK(valid_hidden(config, 8, target) == std::vector<std::int64_t>{32, 16});
}
