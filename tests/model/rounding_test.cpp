// Rounding of activations, keys and values: by hand, against compressed-tensors, in a model, in its config.
#include "model/rounding.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include "core/files.h"
#include "core/json.h"
#include "model/checkpoint.h"
#include "model/transformer.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

at::Tensor golden_values(const Json& json, at::IntArrayRef shape) {
  const auto values = json.get<std::vector<double>>();
  at::Tensor out = at::empty({static_cast<std::int64_t>(values.size())}, at::kFloat);
  for (std::size_t i = 0; i < values.size(); ++i) out.data_ptr<float>()[i] = static_cast<float>(values[i]);
  return out.reshape(shape);
}

RuntimeRounding every_rounding(const Transformer& model, bool dynamic) {
  RuntimeRounding rounding;
  rounding.activations = ActivationScheme{};
  rounding.activations->dynamic = dynamic;
  rounding.activations->except = {model.blocks[1].mlp.down.name};
  for (Linear* linear : const_cast<Transformer&>(model).linears())
    if (!dynamic && linear->name != model.blocks[1].mlp.down.name) rounding.activations->scales[linear->name] = {0.03f, 0};
  rounding.kv_cache = KvCacheScheme{"fp8_e4m3", {0.01f, 0.011f, 0.012f}, {0.02f, 0.021f, 0.022f}};
  return rounding;
}

at::Tensor rounding_logits(const Transformer& model) {
  const at::NoGradGuard no_grad;
  return model.forward(testing::tiny_input({{3, 9, 27, 11, 40}, {5, 6, 7, 8, 12}}));
}

}  // namespace

TEST_CASE("scales and zero points of a range, by hand", "[rounding]") {
  const RoundingFormat &int8 = *find_rounding_format("int8"), &fp8 = *find_rounding_format("fp8_e4m3");
  CHECK(rounding_scale(int8, true, -1, 2).scale == 2.0f / 127.5f);
  CHECK(rounding_scale(int8, true, -3, 2).scale == 3.0f / 127.5f);
  CHECK(rounding_scale(fp8, true, -448, 2).scale == 1.0f);
  const RoundingScale both = rounding_scale(int8, false, -1, 3);
  CHECK(both.scale == 4.0f / 255.0f);
  CHECK(both.zero == -64);  // -128 + 63.75
  // Zero is representable even where nothing below was seen.
  CHECK(rounding_scale(int8, false, 2, 4).scale == 4.0f / 255.0f);
  CHECK(rounding_scale(int8, false, 2, 4).zero == -128);
  CHECK(rounding_scale(int8, false, -4, -2).zero == 127);
  CHECK(rounding_scale(int8, true, 0, 0).scale == 0.0f);
  CHECK(rounding_scale(int8, false, 0, 0).scale == 0.0f);
}

TEST_CASE("a token is rounded with its own scale, by hand", "[rounding]") {
  const RoundingFormat& int8 = *find_rounding_format("int8");
  const at::Tensor x = at::tensor({1.0f, -0.5f, 0.25f, 0.0f, 0.0f, 0.0f, 10.0f, 2.55f, -5.0f}).reshape({1, 3, 3});
  const float a = 1.0f / 127.5f, b = 10.0f / 127.5f;
  // 127.5 is clamped to 127; -63.75 and 31.875 are -64 and 32; 32.5125 is 33.
  const at::Tensor expected = at::tensor({127 * a, -64 * a, 32 * a, 0.0f, 0.0f, 0.0f, 127 * b, 33 * b, -64 * b}).reshape({1, 3, 3});
  CHECK(at::equal(round_per_token(x, int8, true), expected));
  CHECK(at::equal(round_per_token(x.narrow(1, 1, 1), int8, false), at::zeros({1, 1, 3})));
  CHECK(round_per_token(at::zeros({2, 0}), int8, true).numel() == 0);
  // E4M3 has steps of 2 between 16 and 32, of 1/32 between a quarter and a half; a tie goes to the even mantissa.
  const RoundingFormat& fp8 = *find_rounding_format("fp8_e4m3");
  CHECK(at::equal(round_per_token(at::tensor({448.0f, 17.0f, 0.3f, -19.0f}), fp8, true), at::tensor({448.0f, 16.0f, 0.3125f, -20.0f})));
  CHECK(at::equal(round_static(at::tensor({900.0f, -1000.0f}), fp8, {1, 0}), at::tensor({448.0f, -448.0f})));
  CHECK(at::equal(round_static(at::tensor({0.0f, 0.6f, -0.4f, 9.0f}), int8, {0.5f, 120}), at::tensor({0.0f, 0.5f, -0.5f, 3.5f})));
}

TEST_CASE("rounding is that of compressed-tensors, bit for bit", "[rounding][golden]") {
  const Json goldens = read_json(testing::source_folder() / "tests" / "goldens" / "compressed_tensors.json");
  for (const Json& row : goldens.at("dynamic")) {
    INFO(row.at("format") << " symmetric " << row.at("symmetric"));
    const auto shape = row.at("shape").get<std::vector<std::int64_t>>();
    const at::Tensor rounded = round_per_token(golden_values(row.at("x"), shape), *find_rounding_format(row.at("format").get<std::string>()), row.at("symmetric"));
    CHECK(at::equal(rounded, golden_values(row.at("rounded"), shape)));
  }
  for (const Json& row : goldens.at("static")) {
    INFO(row.at("format") << " symmetric " << row.at("symmetric"));
    const RoundingFormat& format = *find_rounding_format(row.at("format").get<std::string>());
    const RoundingScale scale = rounding_scale(format, row.at("symmetric"), row.at("low").get<float>(), row.at("high").get<float>());
    CHECK(scale.scale == row.at("scale").get<float>());
    CHECK(scale.zero == row.at("zero").get<std::int64_t>());
    CHECK(at::equal(round_static(golden_values(row.at("x"), {-1}), format, scale), golden_values(row.at("rounded"), {-1})));
  }
}

TEST_CASE("gradients pass straight through rounding", "[rounding]") {
  for (const bool dynamic : {true, false}) {
    const at::Tensor x = at::randn({4, 6}, at::kDouble).requires_grad_(true), weight = at::randn({4, 6}, at::kDouble);
    const RoundingFormat& int8 = *find_rounding_format("int8");
    const at::Tensor y = dynamic ? round_per_token(x, int8, true) : round_static(x, int8, {0.02f, 0});
    CHECK_FALSE(at::equal(y.detach(), x.detach()));
    (y * weight).sum().backward();
    CHECK(at::equal(x.grad(), weight));
  }
}

TEST_CASE("what is rounded stands in the config and comes back with the model", "[rounding]") {
  for (const bool dynamic : {true, false}) {
    const auto model = testing::tiny_decoder(5);
    const at::Tensor plain = rounding_logits(*model);
    const Json before = config_to_json(model->config());
    set_rounding(*model, every_rounding(*model, dynamic));
    const at::Tensor rounded = rounding_logits(*model);
    CHECK_FALSE(at::equal(plain, rounded));
    CHECK_FALSE(model->blocks[1].mlp.down.input_transform);
    CHECK(model->blocks[0].mlp.down.input_transform);
    CHECK(at::equal(rounding_logits(*model->clone()), rounded));
    const TemporaryFolder folder;
    save_model(*model, folder.path());
    const auto read = load_model(folder.path());
    CHECK(at::equal(rounding_logits(*read), rounded));
    CHECK(read->blocks[2].attention.key_transform);
    set_rounding(*read, RuntimeRounding());
    CHECK(at::equal(rounding_logits(*read), plain));
    set_rounding(*model, RuntimeRounding());
    CHECK(config_to_json(model->config()) == before);
  }
}

TEST_CASE("keys are rounded behind the rotation, and the same with a cache", "[rounding]") {
  const at::NoGradGuard no_grad;
  const auto model = testing::tiny_decoder(6);
  RuntimeRounding rounding;
  rounding.kv_cache = KvCacheScheme{"int8", {0.05f, 0.05f, 0.05f}, {0.05f, 0.05f, 0.05f}};
  set_rounding(*model, rounding);
  const std::vector<std::int64_t> ids = {3, 9, 27, 11, 40, 22, 8};
  KvCache whole;
  TapMap taps({"layer.1.cached_key", "layer.1.value"});
  const at::Tensor logits = model->forward(testing::tiny_input({ids}), &taps, &whole);
  CHECK(at::equal(whole.layers[1].first, round_static(taps.at("layer.1.cached_key"), *find_rounding_format("int8"), {0.05f, 0})));
  CHECK(at::equal(whole.layers[1].second, round_static(taps.at("layer.1.value"), *find_rounding_format("int8"), {0.05f, 0})));
  KvCache cache;
  model->forward(testing::tiny_input({{ids.begin(), ids.begin() + 4}}), nullptr, &cache);
  for (std::size_t t = 4; t < ids.size(); ++t) {
    const at::Tensor step = model->forward(testing::tiny_input({{ids[t]}}), nullptr, &cache);
    // A code may flip where float sums of another order meet a tie.
    CHECK((step.select(1, 0) - logits.select(1, static_cast<std::int64_t>(t))).abs().max().item<float>() < 0.05f);
  }
}

TEST_CASE("a config whose rounding cannot be is refused", "[rounding]") {
  const auto model = testing::tiny_decoder(7);
  const auto refused = [&](const std::function<void(Json&)>& change) {
    set_rounding(*model, every_rounding(*model, false));
    Json json = config_to_json(model->config());
    change(json["kompakt"]);
    return error_text([&] { Transformer other(config_from_json(json, "config.json"), 0); });
  };
  CHECK(contains_all(refused([](Json& own) { own["kv_cache"]["key_scales"][1] = 0; }), {"key_scales of layer 1", "0", "positive"}));
  CHECK(contains_all(refused([](Json& own) { own["kv_cache"]["value_scales"] = Json::array({1.0}); }), {"value_scales has 1 entries for 3 layers"}));
  CHECK(contains_all(refused([](Json& own) { own["activations"]["format"] = "int9"; }), {"int9", "did you mean \"int8\""}));
  CHECK(contains_all(refused([](Json& own) { own["activations"]["mode"] = "sometimes"; }), {"sometimes", "dynamic, static"}));
  CHECK(contains_all(refused([](Json& own) { own["activations"]["scales"].erase("model.layers.0.mlp.up_proj"); }), {"model.layers.0.mlp.up_proj", "no scale"}));
  CHECK(contains_all(refused([](Json& own) { own["activations"]["zeros"] = Json{{"model.layers.0.mlp.up_proj", 300}}; }), {"zero point", "300"}));
}

}  // namespace kompakt
