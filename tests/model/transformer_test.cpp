// The transformer as an object: taps, blocks alone, transforms, compaction, cloning, classifier, sampling.
#include "../catch_torch.h"

#include <ATen/core/grad_mode.h>

#include <cmath>
#include <map>

#include "../support.h"
#include "core/error.h"
#include "core/files.h"
#include "fixtures.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/generate.h"
#include "model/rope.h"
#include "model/transformer.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

ModelInput transformer_input(std::int64_t rows, std::int64_t length, std::vector<std::int64_t> lengths = {}) {
  ModelInput input;
  input.ids = random_ids(rows, length, 67, 21);
  if (!lengths.empty()) input.lengths = at::tensor(lengths, at::kLong);
  return input;
}

}  // namespace

TEST_CASE("initial weights depend on seed and name only", "[model]") {
  ModelConfig config = tiny_config("bert");
  const Transformer a(config, 1), b(config, 1), c(config, 2);
  CHECK(fingerprint(a) == fingerprint(b));
  CHECK(fingerprint(a) != fingerprint(c));
  config.layers = 1;
  const Transformer shallow(config, 1);
  CHECK(shallow.blocks[0].mlp.up.weight.equal(a.blocks[0].mlp.up.weight));
  CHECK(a.blocks[0].mlp.up.weight.std().item<double>() == Approx(0.02).epsilon(0.1));
  CHECK(a.blocks[0].mlp.up.bias.abs().max().item<double>() == 0);
  CHECK(a.embedding_norm.weight.min().item<double>() == 1);
}

TEST_CASE("taps offer the named values with gradients", "[model]") {
  for (const char* family : {"bert", "llama"}) {
    DYNAMIC_SECTION(family) {
      Transformer model(tiny_config(family));
      randomize(model, 1);
      model.requires_grad(true);
      const std::string linear = model.blocks[1].mlp.down.name;
      TapMap taps({"embedding", "layer.1.input", "layer.1.output", "layer.1.query", "layer.1.key", "layer.1.value", "layer.1.context", "layer.1.ffn", "final", "input:" + linear});
      const at::Tensor h = model.hidden(transformer_input(2, 6), &taps);
      CHECK(taps.values().size() == taps.wanted().size());
      const std::int64_t kv = model.config().kv_heads;
      CHECK(taps.at("layer.1.query").sizes() == at::IntArrayRef({2, 4, 6, 8}));
      CHECK(taps.at("layer.1.key").sizes() == at::IntArrayRef({2, kv, 6, 8}));
      CHECK(taps.at("layer.1.ffn").sizes() == at::IntArrayRef({2, 6, 44}));
      CHECK(taps.at("final").equal(h));
      CHECK(taps.at("input:" + linear).equal(taps.at("layer.1.ffn")));
      taps.at("layer.1.context").retain_grad();
      h.square().sum().backward();
      CHECK(taps.at("layer.1.context").grad().abs().max().item<double>() > 0);
    }
  }
}

TEST_CASE("blocks one after the other are the whole model", "[model]") {
  for (const Family& row : families()) {
    DYNAMIC_SECTION(row.name) {
      const at::NoGradGuard no_grad;
      Transformer model(tiny_config(std::string(row.name)));
      randomize(model, 1);
      const ModelInput input = row.encoder ? transformer_input(2, 9, {9, 4}) : transformer_input(2, 9);
      at::Tensor x = model.embed(input);
      for (std::int64_t i = 0; i < model.config().layers; ++i) x = model.block_forward(i, x, input);
      if (model.final_norm.weight.defined()) x = model.final_norm.forward(x);
      CHECK(x.equal(model.hidden(input)));
    }
  }
}

TEST_CASE("padding of an encoder changes nothing", "[model]") {
  const at::NoGradGuard no_grad;
  Transformer model(tiny_config("bert"));
  randomize(model, 1);
  ModelInput padded = transformer_input(2, 8, {8, 5}), alone;
  alone.ids = padded.ids.narrow(0, 1, 1).narrow(1, 0, 5);
  const at::Tensor h = model.hidden(padded);
  CHECK(relative_error(h.narrow(0, 1, 1).narrow(1, 0, 5), model.hidden(alone)) < 1e-6);
  CHECK(relative_error(model.pooled(h, padded)[1], model.pooled(model.hidden(alone), alone)[0]) < 1e-6);
}

TEST_CASE("gradients of every family agree with differences", "[model]") {
  for (const Family& row : families()) {
    DYNAMIC_SECTION(row.name) {
      Transformer model(tiny_config(std::string(row.name)));
      randomize(model, 3);
      for (NamedParameter& parameter : model.parameters()) *parameter.value = parameter.value->to(at::kDouble);
      model.requires_grad(true);
      const ModelInput input = row.encoder ? transformer_input(2, 7, {7, 4}) : transformer_input(2, 7);
      const auto loss = [&] { return model.forward(input).square().mean(); };
      loss().backward();
      const at::NoGradGuard no_grad;
      for (NamedParameter& parameter : model.parameters()) {
        const at::Tensor grad = parameter.value->grad().reshape(-1);
        const std::int64_t i = grad.abs().argmax().item<std::int64_t>();
        at::Tensor flat = parameter.value->reshape(-1);
        const double step = 1e-5;
        flat[i] += step;
        const double up = loss().item<double>();
        flat[i] -= 2 * step;
        const double down = loss().item<double>();
        flat[i] += step;
        INFO(parameter.name);
        CHECK((up - down) / (2 * step) == Approx(grad[i].item<double>()).epsilon(1e-5).margin(1e-9));
      }
    }
  }
}

TEST_CASE("a weight transform reaches output and gradient", "[model]") {
  Transformer model(tiny_config("bert"));
  randomize(model, 1);
  model.requires_grad(true);
  const ModelInput input = transformer_input(1, 4);
  Linear* linear = model.find_linear("encoder.layer.1.intermediate.dense");
  REQUIRE(linear == &model.blocks[1].mlp.up);
  const at::Tensor before = model.hidden(input).detach();
  at::Tensor mask = at::ones_like(linear->weight);
  mask.select(0, 0).zero_();
  linear->transform = [mask](const at::Tensor& w) { return w * mask; };
  const at::Tensor after = model.hidden(input);
  CHECK_FALSE(after.detach().equal(before));
  after.square().sum().backward();
  CHECK(linear->weight.grad()[0].abs().max().item<double>() == 0);
  CHECK(linear->weight.grad()[1].abs().max().item<double>() > 0);
  CHECK(model.clone()->blocks[1].mlp.up.transform == nullptr);
}

TEST_CASE("a compacted embedding is exact", "[model]") {
  Transformer model(tiny_config("bert"));
  randomize(model, 1);
  model.requires_grad(true);
  ModelInput input;
  input.ids = at::tensor({5, 9, 5, 60, 2, 9}, at::kLong).reshape({2, 3});
  const at::Tensor loss_full = model.hidden(input).square().sum();
  loss_full.backward();
  const at::Tensor grad_full = model.tokens.weight.grad().clone();
  const at::Tensor ids = at::tensor({2, 5, 9, 60}, at::kLong);
  const at::Tensor untouched = model.tokens.weight.detach().clone();
  const std::string mark = fingerprint(model);

  model.tokens.compact(ids);
  CHECK(model.tokens.weight.sizes() == at::IntArrayRef({4, 32}));
  CHECK(model.tokens.weight.requires_grad());
  CHECK(fingerprint(model) == mark);
  const at::Tensor loss = model.hidden(input).square().sum();
  CHECK(loss.equal(loss_full));
  loss.backward();
  CHECK(model.tokens.weight.grad().equal(grad_full.index_select(0, ids)));
  {
    const at::NoGradGuard no_grad;
    model.tokens.weight.add_(1);
  }
  const auto copy = model.clone();
  model.tokens.expand();
  at::Tensor expected = untouched.clone();
  expected.index_put_({ids}, untouched.index_select(0, ids) + 1);
  CHECK(model.tokens.weight.detach().equal(expected));
  CHECK(copy->tokens.weight.equal(expected));
  CHECK_FALSE(copy->tokens.compacted());
  ModelInput other;
  other.ids = at::tensor({7}, at::kLong).unsqueeze(0);
  model.tokens.compact(ids);
  CHECK_THROWS(model.hidden(other));
}

TEST_CASE("a clone shares no memory", "[model]") {
  Transformer model(tiny_config("llama"));
  const auto copy = model.clone();
  CHECK(fingerprint(*copy) == fingerprint(model));
  model.blocks[0].mlp.up.weight.add_(1);
  CHECK(fingerprint(*copy) != fingerprint(model));
}

TEST_CASE("a classifier starts at equal logits and is loaded back", "[model]") {
  for (const char* pooling : {"mean", "cls", "pooler"}) {
    DYNAMIC_SECTION(pooling) {
      Transformer model(tiny_config("bert"));
      model.requires_grad(true);
      model.add_classifier({"no", "yes", "maybe"}, pooling);
      const ModelInput input = transformer_input(2, 5, {5, 3});
      CHECK(model.forward(input).abs().max().item<double>() == 0);
      CHECK(model.classifier.weight.requires_grad());
      randomize(model, 4);
      const TemporaryFolder folder;
      save_model(model, folder.path());
      const auto again = load_model(folder.path());
      CHECK((again->config().labels == std::vector<std::string>{"no", "yes", "maybe"}));
      CHECK(again->config().pooling == pooling);
      CHECK(again->forward(input).equal(model.forward(input)));
    }
  }
  Transformer decoder(tiny_config("llama"));
  CHECK(contains_all(error_text([&] { decoder.add_classifier({"a", "b"}, "mean"); }), {"llama", "encoder"}));
  Transformer encoder(tiny_config("bert"));
  CHECK(contains_all(error_text([&] { encoder.add_classifier({"a", "b"}, "median"); }), {"median", "pooler"}));
  CHECK(contains_all(error_text([&] { encoder.add_classifier({"a"}, "mean"); }), {"2 labels"}));
}

TEST_CASE("sampling follows the probabilities, the seed and the limits", "[model]") {
  Transformer model(tiny_config("llama"));
  randomize(model, 7);
  GenerateOptions options;
  options.max_new_tokens = 1;
  options.temperature = 1.0;
  const at::NoGradGuard no_grad;
  ModelInput input;
  input.ids = at::tensor({3, 4}, at::kLong).unsqueeze(0);
  const at::Tensor p = model.forward(input)[0][1].softmax(-1);
  const std::int64_t best = p.argmax().item<std::int64_t>();
  std::map<std::int64_t, int> counts;
  for (std::uint64_t seed = 0; seed < 600; ++seed) {
    options.seed = seed;
    counts[generate(model, {3, 4}, options)[0]]++;
  }
  const double expected = p[best].item<double>();
  CHECK(counts[best] / 600.0 == Approx(expected).margin(4 * std::sqrt(expected * (1 - expected) / 600)));
  options.top_k = 1;
  CHECK(generate(model, {3, 4}, options)[0] == best);
  options.top_k = 0;
  options.top_p = 1e-6;
  CHECK(generate(model, {3, 4}, options)[0] == best);
  options = {};
  options.max_new_tokens = 20;
  options.temperature = 1;
  options.seed = 9;
  const auto text = generate(model, {3}, options);
  CHECK(text.size() == 20);
  CHECK(generate(model, {3}, options) == text);
  options.stop = {text[4]};
  CHECK(generate(model, {3}, options).size() <= 4);
  options.stop = {};
  int seen = 0;
  CHECK(generate(model, {3}, options, [&](std::int64_t) { return ++seen < 3; }).size() == 3);
  CHECK(contains_all(error_text([&] { generate(model, {}, options); }), {"no tokens"}));
  CHECK(contains_all(error_text([&] { generate(model, {67}, options); }), {"67", "66"}));
  options.top_p = 0;
  CHECK(contains_all(error_text([&] { generate(model, {1}, options); }), {"top_p"}));
}

TEST_CASE("rotary rows of GGUF and back", "[model]") {
  // One head of 4: Hugging Face rows 0 1 2 3 (pairs 0-2 and 1-3) stand as 0 2 1 3 in GGUF.
  const at::Tensor w = at::arange(4, at::kFloat).unsqueeze(1);
  CHECK(permute_rope_rows(w, 1).reshape(-1).equal(at::tensor({0.F, 2.F, 1.F, 3.F})));
  const at::Tensor big = at::arange(3 * 8 * 5, at::kFloat).reshape({24, 5});
  CHECK(unpermute_rope_rows(permute_rope_rows(big, 3), 3).equal(big));
  const at::Tensor bias = at::arange(24, at::kFloat);
  CHECK(permute_rope_rows(bias, 3).equal(permute_rope_rows(bias.unsqueeze(1), 3).reshape(-1)));
}

TEST_CASE("rotary tables by hand", "[model]") {
  RopeConfig rope;
  rope.theta = 100;
  const auto f = rope_frequencies(rope, 4);
  CHECK(f[0] == Approx(1));
  CHECK(f[1] == Approx(0.1));
  const RopeTables tables = rope_tables(rope, 4, at::tensor({0, 1}, at::kLong), at::empty({0}, at::kDouble));
  const at::Tensor x = at::tensor({1.0, 0.0, 0.0, 1.0}, at::kDouble).reshape({1, 1, 1, 4}).expand({1, 1, 2, 4});
  const at::Tensor y = apply_rope(x, tables);
  CHECK(y[0][0][0].equal(x[0][0][0]));
  CHECK(y[0][0][1][0].item<double>() == Approx(std::cos(1.0)));
  CHECK(y[0][0][1][1].item<double>() == Approx(-std::sin(0.1)));
  CHECK(y[0][0][1][2].item<double>() == Approx(std::sin(1.0)));
  CHECK(y[0][0][1][3].item<double>() == Approx(std::cos(0.1)));
}
