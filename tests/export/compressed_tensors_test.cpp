// compressed-tensors folders: names, shapes and bytes of the format, equal logits from our own reader, refusals.
#include "export/compressed_tensors.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "export/exporters.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/rounding.h"
#include "quantize/stage.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;
namespace fs = std::filesystem;

struct CompressedFixture {
  std::unique_ptr<Transformer> model;
  QuantizedTensors tensors;
  std::map<std::string, GridSpec> plan;
  ExportRequest request() const { return {*model, tensors, "test", {}}; }
};

CompressedFixture compressed_fixture(const QuantizeOptions& options, std::unique_ptr<Transformer> model = testing::tiny_decoder(9)) {
  CompressedFixture out;
  out.model = std::move(model);
  TaskData data = out.model->config().is_classifier() ? testing::tiny_classification() : testing::tiny_text();
  StageContext context;
  context.data = &data;
  const QuantizedModel quantized = quantize(*out.model, options, {}, context);
  out.plan = quantized.plan.tensors;
  for (const auto& [name, values] : quantized.tensors) out.tensors[name] = {out.plan.at(name), values};
  return out;
}

QuantizeOptions compressed_options(const std::string& weights, std::int64_t group = -1) {
  QuantizeOptions options;
  options.weights = weights, options.group = group, options.embedding = "none";
  return options;
}

at::Tensor compressed_logits(const Transformer& model) {
  const at::NoGradGuard no_grad;
  return model.forward(testing::tiny_input({{3, 9, 27, 11, 40, 7}, {5, 6, 7, 8, 12, 30}}));
}

const TensorData& compressed_find(const SafetensorsFile& file, const std::string& name) {
  INFO(name);
  const TensorData* found = file.find(name);
  REQUIRE(found);
  return *found;
}

}  // namespace

TEST_CASE("packed words and decoded weights are those of compressed-tensors", "[export][compressed][golden]") {
  const Json goldens = read_json(testing::source_folder() / "tests" / "goldens" / "compressed_tensors.json");
  const auto chars = [](const Json& json, at::IntArrayRef shape) {
    const auto values = json.get<std::vector<std::int64_t>>();
    return at::tensor(at::ArrayRef<std::int64_t>(values), at::kLong).to(at::kChar).reshape(shape);
  };
  for (const Json& row : goldens.at("packed")) {
    INFO(row.at("bits") << " bits along dimension " << row.at("dim"));
    const at::Tensor codes = chars(row.at("codes"), {row.at("rows").get<std::int64_t>(), row.at("columns").get<std::int64_t>()});
    const bool turned = row.at("dim") == 0;
    const TensorData packed = pack_compressed("words", turned ? codes.t() : codes, row.at("bits").get<int>());
    const at::Tensor words = turned ? as_tensor(packed).t() : as_tensor(packed);
    const auto expected = row.at("words").get<std::vector<std::int64_t>>();
    CHECK(at::equal(words.to(at::kLong).reshape({-1}), at::tensor(at::ArrayRef<std::int64_t>(expected), at::kLong)));
  }
  // A row of 4 bits by hand: -8 -7 0 1 7 -1 2 3.
  const TensorData word = pack_compressed("w", at::tensor({-8, -7, 0, 1, 7, -1, 2, 3}, at::kInt).to(at::kChar).reshape({1, 8}), 4);
  CHECK(as_tensor(word).item<std::int32_t>() == static_cast<std::int32_t>(0xBA7F9810u));

  // The library's own decoding of codes, scales and zero points is what our grid computes.
  for (const Json& row : goldens.at("weights")) {
    const bool symmetric = row.at("symmetric");
    const auto floats = [](const Json& json, at::IntArrayRef shape) {
      const auto values = json.get<std::vector<double>>();
      return at::tensor(at::ArrayRef<double>(values), at::kDouble).to(at::kFloat).reshape(shape);
    };
    const GridSpec spec{find_grid(symmetric ? "int4" : "int4_asym"), 8};
    CompressedWeights weights;
    std::string why;
    REQUIRE(compressed_weights(spec, 16, weights, why));
    Quantized q;
    q.codes = (chars(row.at("codes"), {4, 16}).to(at::kInt) + weights.shift).to(at::kChar);
    q.scales = floats(row.at("scale"), {4, 2});
    if (!symmetric) q.offsets = -(chars(row.at("zero"), {4, 2}).to(at::kFloat) + weights.shift) * q.scales;
    CHECK(at::equal(decode(spec, q), floats(row.at("weight"), {4, 16})));
  }
}

TEST_CASE("grids in the terms of the format", "[export][compressed]") {
  struct Row {
    const char* grid;
    std::int64_t group, columns;
    CompressedWeights expected;
  };
  for (const Row& row : {Row{"int8", 0, 64, {8, false, true, 0, 0}}, Row{"int4", 32, 64, {4, false, true, 32, 0}}, Row{"int4", 64, 64, {4, false, true, 0, 0}}, Row{"int4_asym", 16, 64, {4, false, false, 16, 8}},
                         Row{"int2_asym", 16, 64, {4, false, false, 16, 8}}, Row{"ternary", 32, 64, {4, false, true, 32, 0}}, Row{"four_level", 64, 128, {4, false, true, 64, 0}}, Row{"q8_0", 32, 64, {8, false, true, 32, 0}},
                         Row{"q5_0", 32, 64, {8, false, true, 32, 0}}, Row{"fp8_e4m3", 0, 64, {8, true, true, 0, 0}}}) {
    INFO(row.grid);
    CompressedWeights weights;
    std::string why;
    CHECK(compressed_weights({find_grid(row.grid), row.group}, row.columns, weights, why));
    CHECK(weights == row.expected);
  }
  const auto refused = [](const char* grid, std::int64_t group, std::int64_t columns) {
    CompressedWeights weights;
    std::string why;
    CHECK_FALSE(compressed_weights({find_grid(grid), group}, columns, weights, why));
    return why;
  };
  CHECK(contains_all(refused("q4_1", 32, 64), {"q4_1", "whole zero points"}));
  for (const char* grid : {"iq4_nl", "mxfp4"}) CHECK(contains_all(refused(grid, 32, 64), {grid, "uneven levels"}));
  CHECK(contains_all(refused("int4", 48, 64), {"64", "groups of 48"}));
}

TEST_CASE("every grid that the format holds comes back with equal weights", "[export][compressed]") {
  for (const char* grid : {"int8", "int4", "int4_signed", "int4_asym", "int3", "int3_asym", "int2_asym", "ternary", "fp8_e4m3"}) {
    INFO(grid);
    const CompressedFixture fixture = compressed_fixture(compressed_options(grid, std::string(grid) == "int8" || std::string(grid) == "fp8_e4m3" ? 0 : 8));
    CHECK(compressed_obstacles(fixture.model->config(), fixture.plan).empty());
    const TemporaryFolder folder, again;
    write_compressed(fixture.request(), folder.path());
    write_compressed(fixture.request(), again.path());
    for (const char* file : {"model.safetensors", "config.json"}) CHECK(read_text(folder.path() / file) == read_text(again.path() / file));
    CHECK(is_compressed(folder.path()));
    const auto reopened = open_any_model(folder.path());
    CHECK(testing::same_parameters(testing::copy_of(*fixture.model), testing::copy_of(*reopened)));
    CHECK(at::equal(compressed_logits(*reopened), compressed_logits(*fixture.model)));
  }
}

TEST_CASE("W8A8: names, shapes and equal logits", "[export][compressed]") {
  for (const char* mode : {"dynamic", "static"}) {
    for (const bool symmetric : {true, false}) {
      INFO(mode << " symmetric " << symmetric);
      QuantizeOptions options = compressed_options("int8");
      options.has_activations = true, options.activations.mode = mode, options.activations.symmetric = symmetric;
      options.has_kv_cache = true;
      const CompressedFixture fixture = compressed_fixture(options);
      const TemporaryFolder folder;
      write_compressed(fixture.request(), folder.path());
      const SafetensorsFile file = SafetensorsFile::open(folder.path());
      const std::string name = "model.layers.1.mlp.down_proj";
      const bool fixed = std::string(mode) == "static";
      CHECK(compressed_find(file, name + ".weight").dtype == DType::i8);
      CHECK(compressed_find(file, name + ".weight").shape == std::vector<std::int64_t>{24, 40});
      CHECK(compressed_find(file, name + ".weight_scale").shape == std::vector<std::int64_t>{24, 1});
      CHECK(file.find(name + ".weight_zero_point") == nullptr);
      CHECK((file.find(name + ".input_scale") != nullptr) == fixed);
      CHECK((file.find(name + ".input_zero_point") != nullptr) == (fixed && !symmetric));
      if (fixed) CHECK(compressed_find(file, name + ".input_scale").shape == std::vector<std::int64_t>{1});
      CHECK(compressed_find(file, "model.layers.2.self_attn.k_scale").shape == std::vector<std::int64_t>{1});
      CHECK(compressed_find(file, "model.layers.2.self_attn.v_scale").dtype == DType::f32);
      const Json config = read_json(folder.path() / "config.json"), settings = config.at("quantization_config");
      CHECK_FALSE(config.contains("kompakt"));
      CHECK(settings.at("quant_method") == "compressed-tensors");
      CHECK(settings.at("format") == "int-quantized");
      CHECK(settings.at("ignore") == Json::array({"lm_head"}));
      const Json& group = settings.at("config_groups").at("group_0");
      CHECK(group.at("targets") == Json::array({"Linear"}));
      CHECK(group.at("weights").at("strategy") == "channel");
      CHECK(group.at("weights").at("num_bits") == 8);
      CHECK(group.at("input_activations").at("strategy") == (fixed ? "tensor" : "token"));
      CHECK(group.at("input_activations").at("dynamic") == !fixed);
      CHECK(group.at("input_activations").at("symmetric") == symmetric);
      CHECK(settings.at("kv_cache_scheme").at("type") == "float");
      const auto reopened = open_any_model(folder.path());
      CHECK(reopened->blocks[0].attention.key_transform);
      CHECK(at::equal(compressed_logits(*reopened), compressed_logits(*fixture.model)));
      CHECK(rounding_of(reopened->config()).activations->scales.size() == (fixed ? 21u : 0u));
      CHECK_FALSE(reopened->config().source.contains("quantization_config"));
    }
  }
}

TEST_CASE("four bits in groups: packed words, zero points along the rows", "[export][compressed]") {
  const CompressedFixture fixture = compressed_fixture(compressed_options("int4_asym", 8));
  const TemporaryFolder folder;
  write_compressed(fixture.request(), folder.path());
  const SafetensorsFile file = SafetensorsFile::open(folder.path());
  const std::string name = "model.layers.0.self_attn.k_proj.weight";  // [12, 24]
  CHECK(compressed_find(file, name + "_packed").shape == std::vector<std::int64_t>{12, 3});
  CHECK(compressed_find(file, name + "_packed").dtype == DType::i32);
  CHECK(compressed_find(file, name + "_scale").shape == std::vector<std::int64_t>{12, 3});
  CHECK(compressed_find(file, name + "_zero_point").shape == std::vector<std::int64_t>{2, 3});
  CHECK(compressed_find(file, name + "_shape").dtype == DType::i64);
  const Json settings = read_json(folder.path() / "config.json").at("quantization_config");
  CHECK(settings.at("format") == "pack-quantized");
  CHECK(settings.at("config_groups").at("group_0").at("weights").at("group_size") == 8);
  CHECK(settings.at("config_groups").at("group_0").at("input_activations").is_null());
  CHECK(settings.at("kv_cache_scheme").is_null());
}

TEST_CASE("several schemes in one model, and layers in float", "[export][compressed]") {
  QuantizeOptions options = compressed_options("int4", 8);
  options.has_activations = true, options.head = "int8", options.keep_float = {"model.layers.1.*"};
  const CompressedFixture fixture = compressed_fixture(options);
  const TemporaryFolder folder;
  write_compressed(fixture.request(), folder.path());
  const Json settings = read_json(folder.path() / "config.json").at("quantization_config");
  CHECK(settings.at("format") == "mixed-precision");
  REQUIRE(settings.at("config_groups").size() == 2);
  CHECK(settings.at("config_groups").at("group_0").at("format") == "int-quantized");
  CHECK(settings.at("config_groups").at("group_0").at("targets").size() == 14);
  CHECK(settings.at("config_groups").at("group_1").at("targets") == Json::array({"lm_head"}));
  CHECK(settings.at("config_groups").at("group_1").at("format") == "pack-quantized");
  CHECK(settings.at("ignore").size() == 7);
  const auto reopened = open_any_model(folder.path());
  CHECK(at::equal(compressed_logits(*reopened), compressed_logits(*fixture.model)));
  CHECK_FALSE(reopened->blocks[1].mlp.up.input_transform);
}

TEST_CASE("encoders, and embeddings that have no scheme", "[export][compressed]") {
  QuantizeOptions options = compressed_options("int8");
  options.has_activations = true, options.embedding = "int8", options.head = "int8";
  const CompressedFixture fixture = compressed_fixture(options, testing::tiny_encoder(4));
  const TemporaryFolder folder;
  write_compressed(fixture.request(), folder.path());
  const auto reopened = open_any_model(folder.path());
  CHECK(testing::same_parameters(testing::copy_of(*fixture.model), testing::copy_of(*reopened)));
  CHECK(at::equal(compressed_logits(*reopened), compressed_logits(*fixture.model)));
  CHECK(compressed_find(SafetensorsFile::open(folder.path()), "embeddings.word_embeddings.weight").dtype == DType::f32);
}

TEST_CASE("formats without a place for rounding say so", "[export][compressed]") {
  QuantizeOptions options = compressed_options("int8");
  options.has_activations = options.has_kv_cache = true;
  const CompressedFixture fixture = compressed_fixture(options);
  const ModelConfig& config = fixture.model->config();
  CHECK(contains_all(join(find_exporter("gguf")->obstacles(config, fixture.plan), ";"), {"activations, keys and values", "GGUF", "compressed-tensors"}));
  CHECK(contains_all(join(find_exporter("safetensors")->obstacles(config, fixture.plan), ";"), {"quantize.activations", "safetensors"}));
  CHECK(find_exporter("compressed-tensors")->obstacles(config, fixture.plan).empty());
  CHECK(find_exporter("kompakt")->obstacles(config, fixture.plan).empty());
  const TemporaryFolder folder;
  find_exporter("kompakt")->write(fixture.request(), folder.path());
  CHECK(at::equal(compressed_logits(*open_any_model(folder.path())), compressed_logits(*fixture.model)));
  const GridSpec minima{find_grid("q4_1"), 32};
  CHECK(contains_all(join(compressed_obstacles(config, {{"model.layers.0.mlp.down_proj", minima}}), ";"), {"model.layers.0.mlp.down_proj", "40", "groups of 32"}));
}

TEST_CASE("damaged compressed-tensors folders are refused with the place named", "[export][compressed]") {
  QuantizeOptions options = compressed_options("int4", 8);
  options.has_kv_cache = true;
  const CompressedFixture fixture = compressed_fixture(options);
  const TemporaryFolder folder;
  const auto damaged = [&](const std::function<void(std::map<std::string, TensorData>&, Json&)>& change) {
    write_compressed(fixture.request(), folder.path());
    std::map<std::string, TensorData> tensors;
    Json config = read_json(folder.path() / "config.json");
    {
      const SafetensorsFile file = SafetensorsFile::open(folder.path());
      for (const TensorData& t : file.tensors()) tensors[t.name] = make_tensor(t.name, t.dtype, t.shape, {t.bytes.begin(), t.bytes.end()});
    }
    change(tensors, config);
    std::vector<TensorData> list;
    for (auto& [name, tensor] : tensors) list.push_back(tensor);
    write_safetensors(folder.path() / "model.safetensors", list);
    write_json(folder.path() / "config.json", config);
    return error_text([&] { open_any_model(folder.path()); });
  };
  const std::string name = "model.layers.1.mlp.up_proj.weight", scale = "model.layers.1.self_attn.k_scale";
  CHECK(contains_all(damaged([&](auto& tensors, Json&) { tensors.erase(name + "_packed"); }), {"up_proj.weight_packed", "missing"}));
  CHECK(contains_all(damaged([&](auto& tensors, Json&) { tensors[name + "_scale"] = make_tensor(name + "_scale", {2, 1}, {1, 1}); }), {"weight_scale", "wrong shape", "[40, 3]"}));
  CHECK(contains_all(damaged([&](auto& tensors, Json&) { tensors[name + "_packed"].dtype = DType::u32; }), {"weight_packed"}));
  CHECK(contains_all(damaged([&](auto& tensors, Json&) { tensors["stray"] = make_tensor("stray", {1}, {1}); }), {"unexpected", "stray"}));
  CHECK(contains_all(damaged([&](auto& tensors, Json&) { tensors.erase(scale); }), {"k_scale", "missing"}));
  CHECK(contains_all(damaged([&](auto& tensors, Json&) { tensors[scale] = make_tensor(scale, {1}, {0}); }), {"key_scales of layer 1", "positive"}));
  CHECK(contains_all(damaged([&](auto&, Json& config) { config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 40; }), {"40 bits"}));
  CHECK(contains_all(damaged([&](auto&, Json& config) { config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 7; }), {"groups", "7"}));
  CHECK(contains_all(damaged([&](auto&, Json& config) { config["quantization_config"]["format"] = "nvfp4-pack-quantized"; }), {"nvfp4-pack-quantized", "pack-quantized"}));
  CHECK(contains_all(damaged([&](auto&, Json& config) { config["quantization_config"]["kv_cache_scheme"]["dynamic"] = true; }), {"keys and values", "static"}));
}

}  // namespace kompakt
