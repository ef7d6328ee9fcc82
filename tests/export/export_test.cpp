// Exporters: what was written is read back bit for bit by a reader of its own, for every grid; damaged artifacts are refused.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/text.h"
#include "export/exporters.h"
#include "export/gguf_blocks.h"
#include "formats/ggml_blocks.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "quantize/stage.h"
#include "tests/support.h"

#include <utility>

using namespace kompakt;
using namespace kompakt::testing;
namespace fs = std::filesystem;

namespace {

Json export_config(const std::string& type) {
  if (type == "bert")
    return {{"architectures", {"BertModel"}}, {"model_type", "bert"}, {"vocab_size", 50}, {"hidden_size", 64}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"intermediate_size", 128},
            {"hidden_act", "gelu"}, {"max_position_embeddings", 32}, {"type_vocab_size", 2}, {"layer_norm_eps", 1e-12}, {"pad_token_id", 0}};
  return {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", 48}, {"hidden_size", 256}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2},
          {"intermediate_size", 256}, {"hidden_act", "silu"}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"rope_theta", 10000.0}, {"tie_word_embeddings", true}};
}

struct ExportFixture {
  Transformer model;
  QuantizedTensors quantized;
  explicit ExportFixture(const std::string& type, const std::string& grid, std::int64_t group = -1) : model(config_from_json(export_config(type), type), 11) {
    const GridSpec spec{find_grid(grid), group < 0 ? find_grid(grid)->default_group : group};
    for (Linear* linear : model.linears()) {
      quantized[linear->name] = {spec, encode(spec, linear->weight)};
      linear->weight = decode(spec, quantized[linear->name].values);
    }
  }
  ExportRequest request() const { return {model, quantized, "test", {}}; }
};

void check_equal(const Transformer& a, const Transformer& b) {
  const auto left = a.parameters(), right = b.parameters();
  REQUIRE(left.size() == right.size());
  for (std::size_t i = 0; i < left.size(); ++i) {
    INFO(left[i].first);
    CHECK(left[i].first == right[i].first);
    CHECK(at::equal(left[i].second, right[i].second));
  }
}

}  // namespace

TEST_CASE("packed artifacts hold every grid without loss", "[export]") {
  for (const Grid& grid : grids()) {
    INFO(std::string(grid.name));
    const ExportFixture fixture("llama", std::string(grid.name));
    const TemporaryFolder folder;
    write_packed(fixture.request(), folder.path());
    check_equal(fixture.model, *reopen_packed(folder.path()));
    CHECK(is_packed(folder.path()));
    CHECK(packed_grids(folder.path()).size() == fixture.quantized.size());
    // The same input gives the same bytes.
    const TemporaryFolder again;
    write_packed(fixture.request(), again.path());
    CHECK(read_text(folder.path() / "model.safetensors") == read_text(again.path() / "model.safetensors"));
    CHECK(read_text(folder.path() / "config.json") == read_text(again.path() / "config.json"));
  }
}

TEST_CASE("a model without quantized tensors is packed as floats", "[export]") {
  const Transformer model(config_from_json(export_config("bert"), "bert"), 4);
  const TemporaryFolder folder;
  write_packed({model, {}, "test", {}}, folder.path());
  check_equal(model, *open_any_model(folder.path()));
}

TEST_CASE("damaged packed artifacts are refused with the tensor named", "[export]") {
  const ExportFixture fixture("bert", "ternary", 0);
  const TemporaryFolder folder;
  const auto rewrite = [&](const std::function<void(std::vector<TensorData>&, Json&)>& change) {
    write_packed(fixture.request(), folder.path());
    std::vector<TensorData> tensors;
    Json config = read_json(folder.path() / "config.json");
    {
      const SafetensorsFile file = SafetensorsFile::open(folder.path() / "model.safetensors");
      for (const TensorData& t : file.tensors()) tensors.push_back(make_tensor(t.name, t.dtype, t.shape, {t.bytes.begin(), t.bytes.end()}));
    }
    change(tensors, config);
    write_safetensors(folder.path() / "model.safetensors", tensors);
    write_json(folder.path() / "config.json", config);
    return error_text([&] { reopen_packed(folder.path()); });
  };
  const std::string name = "encoder.layer.1.output.dense";
  const auto index = [&](const std::vector<TensorData>& tensors, const std::string& wanted) {
    for (std::size_t i = 0; i < tensors.size(); ++i)
      if (tensors[i].name == wanted) return i;
    throw std::logic_error("no tensor " + wanted);
  };
  CHECK(contains_all(rewrite([&](auto& tensors, Json&) { tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(index(tensors, name + ".codes"))); }), {"missing", "output.dense.codes"}));
  CHECK(contains_all(rewrite([&](auto& tensors, Json&) { tensors[index(tensors, name + ".codes")] = make_tensor(name + ".codes", DType::u8, {3}, std::vector<std::byte>(3)); }), {"wrong size", "3 bytes"}));
  CHECK(contains_all(rewrite([&](auto& tensors, Json&) { tensors[index(tensors, name + ".scales")] = make_tensor(name + ".scales", {2, 1}, {1.0f, 1.0f}); }), {"scales", "wrong shape"}));
  CHECK(contains_all(rewrite([&](auto& tensors, Json&) { tensors.push_back(make_tensor("stray", {1}, {1.0f})); }), {"unexpected", "stray"}));
  CHECK(contains_all(rewrite([&](auto&, Json& config) { config["kompakt"]["packed"]["tensors"][name]["grid"] = "ternery"; }), {"unknown grid", "did you mean \"ternary\""}));
  CHECK(contains_all(rewrite([&](auto&, Json& config) { config["kompakt"]["packed"]["version"] = 99; }), {"version", "99"}));
  CHECK(contains_all(rewrite([&](auto&, Json& config) { config["kompakt"]["packed"]["tensors"][name]["rows"] = -1; }), {"impossible sizes"}));
}

TEST_CASE("damaged entropy-coded artifacts are refused with the tensor named", "[export]") {
  const ExportFixture fixture("llama", "ecq3", 0);
  const TemporaryFolder folder;
  const std::string name = "model.layers.0.mlp.down_proj";
  const auto rewrite = [&](const std::function<std::vector<std::byte>(std::vector<std::byte>)>& change) {
    write_packed(fixture.request(), folder.path());
    std::vector<TensorData> tensors;
    {
      const SafetensorsFile file = SafetensorsFile::open(folder.path() / "model.safetensors");
      for (const TensorData& t : file.tensors()) {
        std::vector<std::byte> bytes(t.bytes.begin(), t.bytes.end());
        if (t.name == name + ".codes") bytes = change(std::move(bytes));
        const std::vector<std::int64_t> shape = t.name == name + ".codes" ? std::vector<std::int64_t>{static_cast<std::int64_t>(bytes.size())} : t.shape;
        tensors.push_back(make_tensor(t.name, t.dtype, shape, std::move(bytes)));
      }
    }
    write_safetensors(folder.path() / "model.safetensors", tensors);
    return error_text([&] { reopen_packed(folder.path()); });
  };
  CHECK(contains_all(rewrite([](auto) { return std::vector<std::byte>(); }), {"first byte", "down_proj"}));
  CHECK(contains_all(rewrite([](auto bytes) { bytes[0] = std::byte{9}; return bytes; }), {"first byte", "9", "down_proj"}));
  CHECK(contains_all(rewrite([](auto bytes) { bytes.resize(bytes.size() / 2); return bytes; }), {"down_proj", "damaged"}));
  CHECK(contains_all(rewrite([](auto bytes) { bytes.push_back(std::byte{0}); return bytes; }), {"down_proj", "damaged"}));
  // Any single damaged byte ends in an error or in codes of the grid, never in a crash.
  for (std::size_t at = 1; at < 200; at += 7) {
    write_packed(fixture.request(), folder.path());
    std::string text = read_text(folder.path() / "model.safetensors");
    text[text.size() - at] = static_cast<char>(text[text.size() - at] ^ 0x5a);
    write_text(folder.path() / "model.safetensors", text);
    try {
      reopen_packed(folder.path());
    } catch (const Error&) {
    }
  }
}

TEST_CASE("GGUF holds the grids that have a block type, and reads back bit for bit", "[export]") {
  struct Row {
    const char* grid;
    std::int64_t group;
    const char* type;
  };
  const Row rows[] = {{"q8_0", 32, "Q8_0"}, {"q4_0", 32, "Q4_0"}, {"q4_1", 32, "Q4_1"}, {"q5_0", 32, "Q5_0"}, {"q5_1", 32, "Q5_1"}, {"four_level", 64, "Q2_0"}, {"q2_0", 64, "Q2_0"}, {"ternary", 64, "Q2_0"},
                      {"ternary", 0, "TQ1_0"}, {"tq1_0", 256, "TQ1_0"}, {"tq2_0", 256, "TQ2_0"}, {"iq4_nl", 32, "IQ4_NL"}, {"q6_k", 16, "Q6_K"}, {"q5_k", 32, "Q5_K"}, {"q4_k", 32, "Q4_K"}, {"q3_k", 16, "Q3_K"}, {"q2_k", 16, "Q2_K"}, {"iq4_xs", 32, "IQ4_XS"}, {"mxfp4", 32, "MXFP4"}, {"int4", 64, "Q4_0"}, {"int8", 0, "Q8_0"}, {"int3", 32, "Q4_0"}};
  for (const Row& row : rows) {
    INFO(row.grid << " " << row.group);
    const ExportFixture fixture("llama", row.grid, row.group);
    std::map<std::string, GridSpec> plan;
    for (const auto& [name, tensor] : fixture.quantized) plan[name] = tensor.spec;
    CHECK(gguf_obstacles(fixture.model.config(), plan).empty());
    const TemporaryFolder folder;
    write_gguf_model(fixture.request(), folder.path());
    const GgufFile file = GgufFile::open(folder.path() / "model.gguf");
    REQUIRE(file.find("blk.1.ffn_down.weight"));
    CHECK(file.find("blk.1.ffn_down.weight")->type->name == row.type);
    CHECK(file.find("output.weight") == nullptr);  // tied: once
    check_equal(fixture.model, *reopen_gguf(folder.path()));
  }
}

TEST_CASE("a million random blocks of every type that GGUF shares with a grid decode to the same weights", "[export]") {
  for (const Grid& grid : grids()) {
    if (grid.ggml_type.empty() || !grid.group_fixed || grid.kquant) continue;  // super-blocks: tests/quantize/kquant_test.cpp
    INFO(std::string(grid.name));
    const GridSpec spec{&grid, grid.default_group};
    const std::int64_t columns = 256 * 64;
    std::string why;
    const GgmlType* type = exact_ggml_type(spec, columns, why);
    REQUIRE(type);
    CHECK(type->name == grid.ggml_type);
    const std::int64_t rows = 40, blocks = rows * columns / type->block, passes = std::max<std::int64_t>(1, 1000000 / blocks / 8);
    for (std::int64_t pass = 0; pass < passes; ++pass) {
      at::manual_seed(static_cast<std::uint64_t>(pass));
      Quantized q;
      q.codes = at::randint(grid.code_min, grid.code_max + 1, {rows, columns}, at::TensorOptions().dtype(at::kChar));
      q.scales = (at::randn({rows, columns / spec.group}) * 0.1);
      if (!grid.signed_scale) q.scales = q.scales.abs();
      for (std::int64_t i = 0; i < q.scales.numel(); ++i) q.scales.data_ptr<float>()[i] = grid.store_scale(q.scales.data_ptr<float>()[i]);
      if (grid.asymmetric) q.offsets = at::randn(q.scales.sizes()).to(at::kHalf).to(at::kFloat);
      const std::vector<std::byte> bytes = to_ggml_blocks(*type, spec, q);
      REQUIRE(static_cast<std::int64_t>(bytes.size()) == blocks * type->bytes);
      at::Tensor decoded = at::empty({rows, columns});
      for (std::int64_t b = 0; b < blocks; ++b) type->decode(bytes.data() + b * type->bytes, decoded.data_ptr<float>() + b * type->block);
      CHECK(at::equal(decoded, decode(spec, q)));
      CHECK(at::equal(grid.unpack(grid.pack(q.codes), rows, columns), q.codes));
    }
  }
}

TEST_CASE("the size of an artifact is known to the byte before it is written", "[export]") {
  for (const char* grid : {"q4_0", "q4_1", "q2_0", "iq4_nl", "q4_k", "iq4_xs", "int4_asym", "int8"})
    for (const Exporter& exporter : exporters()) {
      const ExportFixture fixture("llama", grid);
      std::map<std::string, GridSpec> plan;
      for (const auto& [name, tensor] : fixture.quantized) plan[name] = tensor.spec;
      if (!exporter.file_bytes || !exporter.obstacles(fixture.model.config(), plan).empty()) continue;
      INFO(grid << " " << std::string(exporter.name));
      const TemporaryFolder folder;
      exporter.write(fixture.request(), folder.path());
      CHECK(exporter.file_bytes({fixture.model, plan, "test", false, {}}) == static_cast<std::int64_t>(bytes_on_disk(folder.path())));
      // One tensor less on the grid: the difference is that tensor, give or take the digits of offsets in a header.
      std::string why;
      const auto name = plan.begin()->first;
      const GridSpec other{find_grid("q8_0"), 32};
      const std::int64_t before = exporter.file_bytes({fixture.model, plan, "test", false, {}}), rows = fixture.quantized.at(name).values.codes.size(0), columns = fixture.quantized.at(name).values.codes.size(1);
      const std::int64_t step = exporter.tensor_bytes(other, rows, columns) - exporter.tensor_bytes(plan.at(name), rows, columns);
      CHECK(exporter.holds(other, columns, why));
      plan[name] = other;
      CHECK(std::abs(exporter.file_bytes({fixture.model, plan, "test", false, {}}) - before - step) <= 256);
    }
}

TEST_CASE("what GGUF cannot hold is said before anything is written", "[export]") {
  const Transformer encoder(config_from_json(export_config("bert"), "bert"), 1);
  CHECK(contains_all(join(gguf_obstacles(encoder.config(), {}), ";"), {"encoder", "format kompakt"}));
  const Transformer decoder(config_from_json(export_config("llama"), "llama"), 1);
  const GridSpec odd{find_grid("int4"), 48};
  CHECK(contains_all(join(gguf_obstacles(decoder.config(), {{"model.layers.0.mlp.down_proj", odd}}), ";"), {"model.layers.0.mlp.down_proj", "48", "do not divide"}));
  std::string why;
  CHECK(exact_ggml_type({find_grid("int4_asym"), 64}, 64, why) == nullptr);
  CHECK(contains_all(why, {"int4_asym", "q4_1"}));
}

TEST_CASE("every exporter says why or writes something that its own reader opens", "[export]") {
  const ExportFixture fixture("llama", "q8_0");
  std::map<std::string, GridSpec> plan;
  for (const auto& [name, tensor] : fixture.quantized) plan[name] = tensor.spec;
  for (const Exporter& exporter : exporters()) {
    INFO(std::string(exporter.name));
    CHECK_FALSE(exporter.summary.empty());
    REQUIRE(exporter.obstacles(fixture.model.config(), plan).empty());
    const TemporaryFolder folder;
    exporter.write(fixture.request(), folder.path());
    check_equal(fixture.model, *exporter.reopen(folder.path()));
  }
}

TEST_CASE("a model in another basis is a plain model of its family in every format", "[export][basis]") {
  struct Row {
    const char *family, *basis;
    bool untie;
  };
  for (const Row& row : {Row{"llama", "fold", false}, Row{"llama", "hadamard", true}, Row{"gemma3_text", "hadamard", false}, Row{"qwen3", "fold", false}}) {
    INFO(row.family << " " << row.basis);
    Json json = export_config("llama");
    json["model_type"] = row.family, json["head_dim"] = 64;
    json.erase("hidden_act");  // the family's own
    Transformer model(config_from_json(json, row.family), 11);
    for (const NamedParameter& parameter : model.parameters())
      if (parameter.value->dim() == 1) *parameter.value = *parameter.value + 0.1 * at::sin(at::arange(parameter.value->numel(), at::kFloat));
    QuantizeOptions options;
    options.weights = "q8_0", options.embedding = "q8_0", options.head = row.untie ? "q8_0" : "none", options.basis.basis = row.basis, options.basis.untie = row.untie;
    StageContext context;
    const QuantizedModel quantized = quantize(model, options, {}, context);
    QuantizedTensors tensors;
    for (const auto& [name, values] : quantized.tensors) tensors[name] = {quantized.plan.tensors.at(name), values};
    CHECK(model.blocks[1].mlp_norm.weight.eq(model.config().family->norm_plus_one ? 0 : 1).all().item<bool>());
    for (const Exporter& exporter : exporters()) {
      INFO(std::string(exporter.name));
      REQUIRE(exporter.obstacles(model.config(), quantized.plan.tensors).empty());
      const TemporaryFolder folder;
      exporter.write({model, tensors, "test", {}}, folder.path());
      const auto reopened = exporter.reopen(folder.path());
      if (model.config().family->norm_plus_one) {  // GGUF holds 1 + w in float32, which rounds w
        const auto left = std::as_const(model).parameters(), right = std::as_const(*reopened).parameters();
        REQUIRE(left.size() == right.size());
        for (std::size_t i = 0; i < left.size(); ++i) CHECK((left[i].second - right[i].second).abs().max().item<float>() < 1.2e-7f);
      } else {
        check_equal(model, *reopened);
      }
      CHECK(reopened->config().tied == !row.untie);
    }
  }
}

TEST_CASE("sub-norms are packed without loss, and formats that cannot hold them say so", "[export][subln]") {
  for (const char* type : {"bert", "llama"}) {
    ExportFixture fixture(type, "ternary", 0);
    const std::int64_t plain = packed_file_bytes({fixture.model, {}, "test", false, {}});
    fixture.model.add_sub_norms();
    for (Block& block : fixture.model.blocks) block.mlp.sub_norm.weight = at::linspace(0.1, 3, block.mlp.sub_norm.weight.size(0));
    const TemporaryFolder folder;
    write_packed(fixture.request(), folder.path());
    const auto reopened = reopen_packed(folder.path());
    CHECK(reopened->config().sub_norms);
    check_equal(fixture.model, *reopened);
    ModelInput input;
    input.ids = at::arange(12, at::kLong).unsqueeze(0);
    const at::NoGradGuard no_grad;
    CHECK(at::equal(reopened->forward(input), fixture.model.forward(input)));
    CHECK(packed_file_bytes({fixture.model, {}, "test", false, {}}) > plain);
    CHECK(packed_obstacles(fixture.model.config(), {}).empty());
    CHECK(contains_all(join(plain_obstacles(fixture.model.config(), {}), ";"), {"sub-norms", "kompakt"}));
    CHECK(contains_all(join(gguf_obstacles(fixture.model.config(), {}), ";"), {"sub-norms", "kompakt"}));
  }
}
