// SubLN: the forward pass by hand, gradients, shapes, files, depth, devices.
#include "../catch_torch.h"

#include <ATen/core/grad_mode.h>

#include <cmath>

#include "../support.h"
#include "core/files.h"
#include "fixtures.h"
#include "model/checkpoint.h"
#include "model/depth.h"
#include "model/families.h"
#include "model/transformer.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

ModelConfig sub_norm_config(const std::string& family) {
  ModelConfig config = tiny_config(family);
  config.sub_norms = true;
  return config;
}

ModelInput sub_norm_input(const Family& family, std::int64_t length = 7) {
  ModelInput input;
  input.ids = random_ids(2, length, 67, 5);
  if (family.encoder) input.lengths = at::tensor({length, length - 3}, at::kLong);
  return input;
}

}  // namespace

TEST_CASE("a sub-norm divides by the root mean square of what the projection sees, by hand", "[model][subln]") {
  const at::NoGradGuard no_grad;
  for (const char* family : {"bert", "llama"}) {
    DYNAMIC_SECTION(family) {
      Transformer plain(tiny_config(family));
      randomize(plain, 1);
      const auto model = plain.clone();
      model->add_sub_norms();
      CHECK(model->config().sub_norms);
      CHECK_FALSE(plain.config().sub_norms);
      CHECK_THROWS_AS(model->add_sub_norms(), std::logic_error);
      Block& block = model->blocks[0];
      CHECK(block.attention.sub_norm.weight.eq(1).all().item<bool>());
      CHECK_FALSE(block.mlp.sub_norm.bias.defined());
      block.mlp.sub_norm.weight = at::linspace(0.5, 2, 44);
      const ModelInput input = sub_norm_input(*plain.config().family);
      const at::Tensor x = plain.embed(input), in = plain.attention_input(0, x);
      const auto by_hand = [](const at::Tensor& v, const at::Tensor& gain, double eps) {
        at::Tensor out = at::empty_like(v);
        for (std::int64_t b = 0; b < v.size(0); ++b)
          for (std::int64_t t = 0; t < v.size(1); ++t) {
            double sum = 0;
            for (std::int64_t i = 0; i < v.size(2); ++i) sum += std::pow(v[b][t][i].item<double>(), 2);
            out[b][t] = v[b][t] / std::sqrt(sum / static_cast<double>(v.size(2)) + eps) * gain;
          }
        return out;
      };
      const double eps = plain.config().norm_eps;
      const at::Tensor context = plain.attention_context(0, in, input), inner = plain.mlp_inner(0, x);
      CHECK(relative_error(model->attention_context(0, in, input), by_hand(context, at::ones(32), eps)) < 1e-5);
      CHECK(relative_error(model->mlp_inner(0, x), by_hand(inner, block.mlp.sub_norm.weight, eps)) < 1e-5);

      // The taps are what the projections see.
      TapMap taps({"layer.0.context", "layer.0.ffn", "input:" + block.attention.output.name, "input:" + block.mlp.down.name});
      model->hidden(input, &taps);
      CHECK(taps.at("layer.0.context").equal(taps.at("input:" + block.attention.output.name)));
      CHECK(taps.at("layer.0.ffn").equal(taps.at("input:" + block.mlp.down.name)));
      CHECK(relative_error(taps.at("layer.0.context"), by_hand(context, at::ones(32), eps)) < 1e-5);
    }
  }
}

TEST_CASE("gradients through sub-norms agree with differences, in every family", "[model][subln]") {
  for (const Family& row : families()) {
    DYNAMIC_SECTION(row.name) {
      Transformer model(sub_norm_config(std::string(row.name)));
      randomize(model, 3);
      for (NamedParameter& parameter : model.parameters()) *parameter.value = parameter.value->to(at::kDouble);
      model.requires_grad(true);
      const ModelInput input = sub_norm_input(row);
      const auto loss = [&] { return model.forward(input).square().mean(); };
      loss().backward();
      const at::NoGradGuard no_grad;
      std::int64_t checked = 0;
      for (Block& block : model.blocks)
        for (at::Tensor* value : {&block.attention.sub_norm.weight, &block.mlp.sub_norm.weight, &block.attention.value.weight, &block.mlp.up.weight, &block.mlp.down.weight}) {
          const at::Tensor grad = value->grad().reshape(-1);
          const std::int64_t i = grad.abs().argmax().item<std::int64_t>();
          at::Tensor flat = value->reshape(-1);
          const double step = 1e-5;
          flat[i] += step;
          const double up = loss().item<double>();
          flat[i] -= 2 * step;
          const double down = loss().item<double>();
          flat[i] += step;
          CHECK((up - down) / (2 * step) == Approx(grad[i].item<double>()).epsilon(1e-5).margin(1e-9));
          ++checked;
        }
      CHECK(checked == 5 * model.config().layers);
    }
  }
}

TEST_CASE("inserted sub-norms fit shapes, counts, files and the config", "[model][subln]") {
  for (const Family& row : families()) {
    DYNAMIC_SECTION(row.name) {
      const at::NoGradGuard no_grad;
      Transformer model(tiny_config(std::string(row.name)));
      model.add_sub_norms();
      const Transformer fresh(sub_norm_config(std::string(row.name)));
      CHECK(fingerprint(model) == fingerprint(fresh));  // names, shapes and gains of one
      std::int64_t total = 0;
      for (const auto& [name, value] : fresh.parameters()) total += value.numel();
      CHECK(count_parameters(model.config()).total == total);
      CHECK(count_parameters(model.config()).total - count_parameters(tiny_config(std::string(row.name))).total == model.config().layers * (32 + 44));

      randomize(model, 6);
      const ModelInput input = sub_norm_input(row);
      const at::Tensor before = model.forward(input);
      const TemporaryFolder folder;
      save_model(model, folder.path());
      const auto again = load_model(folder.path());
      CHECK(again->config().sub_norms);
      CHECK(again->forward(input).equal(before));
      CHECK(fingerprint(*again) == fingerprint(model));
      CHECK(model.clone()->forward(input).equal(before));
      // Other programs must not take the file for one of the family's and compute without the norms.
      const Json json = read_json(folder.path() / "config.json");
      CHECK(json.at("model_type") == "kompakt_" + std::string(row.model_types.front()));
      CHECK(json.at("architectures")[0].get<std::string>().find("Kompakt") == 0);
      save_model(*again, folder.path());
      CHECK(read_json(folder.path() / "config.json") == json);
    }
  }
}

TEST_CASE("a file without a sub-norm, or with one that the config does not name, is refused", "[model][subln]") {
  Transformer model(sub_norm_config("llama"));
  const TemporaryFolder folder;
  save_model(model, folder.path());
  Json json = read_json(folder.path() / "config.json");
  json["kompakt"]["sub_norms"] = false;
  write_json(folder.path() / "config.json", json);
  CHECK(contains_all(error_text([&] { load_model(folder.path()); }), {"unexpected", "model.layers.0.mlp.ffn_sub_norm.weight"}));
  const Transformer plain(tiny_config("llama"));
  save_model(plain, folder.path());
  json = read_json(folder.path() / "config.json");
  json["kompakt"]["sub_norms"] = true;
  write_json(folder.path() / "config.json", json);
  CHECK(contains_all(error_text([&] { load_model(folder.path()); }), {"missing", "model.layers.0.self_attn.attn_sub_norm.weight"}));
}

TEST_CASE("blocks with sub-norms can go, and those that stay are numbered anew", "[model][subln]") {
  const at::NoGradGuard no_grad;
  for (const char* family : {"bert", "llama"}) {
    DYNAMIC_SECTION(family) {
      Transformer model(sub_norm_config(family));
      randomize(model, 2);
      const at::Tensor gain = model.blocks[2].mlp.sub_norm.weight;
      keep_blocks(model, {0, 2});
      CHECK(model.blocks[1].mlp.sub_norm.weight.equal(gain));
      const ModelInput input = sub_norm_input(*model.config().family);
      const TemporaryFolder folder;
      save_model(model, folder.path());
      CHECK(load_model(folder.path())->forward(input).equal(model.forward(input)));
    }
  }
}

TEST_CASE("a classifier with sub-norms is loaded back, and shapes alone pass on meta", "[model][subln]") {
  Transformer model(sub_norm_config("bert"));
  model.add_classifier({"no", "yes"}, "pooler");
  randomize(model, 4);
  const ModelInput input = sub_norm_input(*model.config().family);
  const TemporaryFolder folder;
  save_model(model, folder.path());
  const auto again = load_model(folder.path());
  CHECK(again->config().is_classifier());
  CHECK(again->forward(input).equal(model.forward(input)));
  for (const char* family : {"bert", "llama", "gemma3"}) {
    ModelConfig config = sub_norm_config(family);
    config.tied = false;
    Transformer shapes(config, 0, c10::Device(c10::kMeta));
    shapes.requires_grad(true);
    shapes.tokens.weight.requires_grad_(false);  // the lookup's backward has no meta kernel
    ModelInput nothing;
    nothing.ids = at::zeros({2, 9}, at::TensorOptions().dtype(at::kLong).device(at::kMeta));
    const at::Tensor out = shapes.forward(nothing);
    CHECK(out.is_meta());
    out.sum().backward();
    CHECK(shapes.blocks[0].mlp.sub_norm.weight.grad().is_meta());
  }
}
