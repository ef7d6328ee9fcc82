// Checkpoints: strictness of names, shapes and values; variants that writers produce; GGUF; the real models where present.
#include "../catch_torch.h"

#include <ATen/core/grad_mode.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <utility>

#include "../support.h"
#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "fixtures.h"
#include "formats/gguf.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/generate.h"
#include "model/rope.h"
#include "model/transformer.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// A saved tiny model whose tensors can be edited before loading.
struct CheckpointBench {
  TemporaryFolder folder;
  std::vector<TensorData> tensors;
  Json config;

  explicit CheckpointBench(const std::string& family, ModelConfig shape = {}) {
    Transformer model(shape.family ? shape : tiny_config(family));
    randomize(model, 1);
    save_model(model, folder.path());
    tensors = SafetensorsFile::open(folder.path()).tensors();
    config = read_json(folder.path() / "config.json");
    mark = fingerprint(model);
  }
  TensorData& find(const std::string& name) {
    for (TensorData& tensor : tensors) {
      if (tensor.name == name) return tensor;
    }
    throw std::out_of_range(name);
  }
  void drop(const std::string& name) {
    std::erase_if(tensors, [&](const TensorData& t) { return t.name == name; });
  }
  std::unique_ptr<Transformer> load() {
    TemporaryFolder other;
    write_json(other.path() / "config.json", config);
    write_safetensors(other.path() / "model.safetensors", tensors);
    return load_model(other.path());
  }
  std::string mark;
};

GgufTensor checkpoint_gguf_tensor(const std::string& name, const at::Tensor& value) {
  const TensorData data = as_data(name, value);
  return {name, find_ggml_type("F32"), data.shape, data.bytes, data.owner};
}

}  // namespace

TEST_CASE("names, shapes and values of a checkpoint are checked together", "[model]") {
  CheckpointBench bench("llama");
  CHECK(fingerprint(*bench.load()) == bench.mark);
  bench.drop("model.norm.weight");
  bench.find("model.layers.0.mlp.up_proj.weight").name = "model.layers.0.mlp.upp_proj.weight";
  bench.drop("model.layers.1.self_attn.q_proj.weight");
  bench.tensors.push_back(make_tensor("model.layers.1.self_attn.q_proj.weight", {2, 3}, std::vector<float>(6)));
  CHECK(contains_all(error_text([&] { bench.load(); }), {"2 missing", "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "1 unexpected", "upp_proj",
                                                         "1 of another shape", "[2, 3]", "[32, 32]"}));
}

TEST_CASE("NaN and infinity are named", "[model]") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    CheckpointBench bench("bert");
    const std::string name = "encoder.layer.1.output.dense.bias";
    std::vector<float> values = to_float32(bench.find(name));
    values[3] = bad;
    bench.drop(name);
    bench.tensors.push_back(make_tensor(name, {32}, values));
    CHECK(contains_all(error_text([&] { bench.load(); }), {"NaN or infinity", "encoder.layer.1.output.dense.bias"}));
  }
}

TEST_CASE("a tied head may be absent or equal", "[model]") {
  CheckpointBench bench("llama");
  CHECK_THROWS(bench.find("lm_head.weight"));
  TensorData head = bench.find("model.embed_tokens.weight");
  head.name = "lm_head.weight";
  bench.tensors.push_back(head);
  CHECK(fingerprint(*bench.load()) == bench.mark);
  bench.drop("lm_head.weight");
  std::vector<float> other = to_float32(head);
  other[0] += 1;
  bench.tensors.push_back(make_tensor("lm_head.weight", head.shape, other));
  CHECK(contains_all(error_text([&] { bench.load(); }), {"lm_head.weight", "tie_word_embeddings"}));
  bench.config["tie_word_embeddings"] = false;
  CHECK(bench.load()->lm_head.weight.defined());
}

TEST_CASE("BERT checkpoints with prefix, old names and leftovers of pre-training", "[model]") {
  CheckpointBench bench("bert");
  for (TensorData& tensor : bench.tensors) {
    tensor.name = "bert." + replace_all(replace_all(tensor.name, "LayerNorm.weight", "LayerNorm.gamma"), "LayerNorm.bias", "LayerNorm.beta");
  }
  bench.tensors.push_back(make_tensor("bert.pooler.dense.bias", {32}, std::vector<float>(32)));
  bench.tensors.push_back(make_tensor("cls.predictions.bias", {67}, std::vector<float>(67)));
  bench.tensors.push_back(make_tensor("bert.embeddings.position_ids", DType::i64, {1, 2}, std::vector<std::byte>(16)));
  CHECK(fingerprint(*bench.load()) == bench.mark);
}

TEST_CASE("types other than float32 are written and read", "[model]") {
  Transformer model(tiny_config("bert"));
  randomize(model, 1);
  const TemporaryFolder folder;
  save_model(model, folder.path(), at::kBFloat16);
  CHECK(read_json(folder.path() / "config.json")["torch_dtype"] == "bfloat16");
  const auto again = load_model(folder.path());
  CHECK(again->tokens.weight.scalar_type() == at::kFloat);
  CHECK(again->tokens.weight.equal(model.tokens.weight.to(at::kBFloat16).to(at::kFloat)));
}

TEST_CASE("loaded weights can be written to", "[model]") {
  CheckpointBench bench("bert");
  const auto model = bench.load();
  for (NamedParameter& parameter : model->parameters()) parameter.value->add_(1);  // a read-only memory map would fault
  CHECK(fingerprint(*model) != bench.mark);
}

TEST_CASE("a model whose inner width differs from hidden survives saving", "[model]") {
  for (const char* family : {"bert", "llama"}) {
    DYNAMIC_SECTION(family) {
      ModelConfig config = tiny_config(family);
      config.heads = 3;
      config.kv_heads = config.family->encoder ? 3 : 1;
      CheckpointBench bench(family, config);
      CHECK(bench.config["head_dim"] == 8);
      const auto model = bench.load();
      CHECK(fingerprint(*model) == bench.mark);
      CHECK(model->blocks[0].attention.query.weight.sizes() == at::IntArrayRef({24, 32}));
    }
  }
}

TEST_CASE("unknown keys of config.json survive", "[model]") {
  CheckpointBench bench("bert");
  bench.config["hidden_dropout_prob"] = 0.1;
  bench.config["my_own_key"] = {{"a", 1}};
  const auto model = bench.load();
  const Json out = config_to_json(model->config());
  CHECK(out["hidden_dropout_prob"] == 0.1);
  CHECK(out["my_own_key"]["a"] == 1);
}

TEST_CASE("configs that describe no model are refused", "[model]") {
  Json json = {{"model_type", "llama"}, {"vocab_size", 10}, {"hidden_size", 16}, {"intermediate_size", 8}, {"num_hidden_layers", 1}, {"num_attention_heads", 4}};
  CHECK(config_from_json(json, "x").head_dim == 4);
  const auto fails = [&](const char* key, const Json& value, std::initializer_list<const char*> parts) {
    Json changed = json;
    changed[key] = value;
    INFO(key);
    CHECK(contains_all(error_text([&] { config_from_json(changed, "some/config.json"); }), parts));
  };
  fails("model_type", "lama", {"lama", "llama", "some/config.json", "bert"});
  fails("hidden_size", 18, {"18", "4", "head_dim"});
  fails("num_key_value_heads", 3, {"num_key_value_heads 3"});
  fails("intermediate_size", nullptr, {"intermediate_size", "missing"});
  fails("hidden_size", -2, {"hidden_size", "-2"});
  fails("hidden_size", "wide", {"hidden_size"});
  fails("hidden_act", "relu", {"relu", "silu"});
  fails("rope_scaling", {{"type", "dynamic"}, {"factor", 2}}, {"dynamic", "llama3"});
  json["model_type"] = "bert";
  fails("position_embedding_type", "relative_key", {"relative_key", "absolute"});
  json["architectures"] = {"BertForSequenceClassification"};
  fails("id2label", {{"0", "a"}, {"2", "b"}}, {"jumps to 2", "without a gap"});
}

TEST_CASE("older spellings of config.json mean the same", "[model]") {
  Json json = {{"model_type", "llama"}, {"vocab_size", 10}, {"hidden_size", 16}, {"intermediate_size", 8}, {"num_hidden_layers", 2}, {"num_attention_heads", 4},
               {"max_position_embeddings", 64}};
  Json old = json, fresh = json;
  old["rope_theta"] = 5e5;
  old["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 32}};
  fresh["rope_parameters"] = old["rope_scaling"];
  fresh["rope_parameters"]["rope_theta"] = 5e5;
  const ModelConfig a = config_from_json(old, "a"), b = config_from_json(fresh, "b");
  CHECK(rope_frequencies(a.rope, 4) == rope_frequencies(b.rope, 4));
  CHECK(a.rope.scaling == "llama3");
  // What a config made from nothing writes reads back to the same shape.
  ModelConfig bare = a;
  bare.source = Json::object();
  const ModelConfig back = config_from_json(config_to_json(bare), "c");
  CHECK(rope_frequencies(back.rope, 4) == rope_frequencies(a.rope, 4));
  CHECK(count_parameters(back).total == count_parameters(a).total);
}

TEST_CASE("GGUF files give the logits of the checkpoint they come from", "[model]") {
  for (const char* family : {"llama", "qwen2", "qwen3", "smollm3", "gemma3"}) {
    DYNAMIC_SECTION(family) {
      const at::NoGradGuard no_grad;
      ModelConfig config = tiny_config(family);
      if (config.family->norm_plus_one) {  // GGUF keeps no pattern of windows: local but every sixth
        config.sliding_window = {5, 5, 5};
        config.query_scale = 1 / std::sqrt(8.0);
      }
      Transformer model(config);
      randomize(model, 6);
      const std::string arch(config.family->gguf_architecture);
      const auto key = [&](const char* name) { return arch + "." + name; };
      std::vector<std::pair<std::string, GgufValue>> metadata = {
          {"general.architecture", GgufValue::text(arch)},
          {key("block_count"), GgufValue::uint32(static_cast<std::uint32_t>(config.layers))},
          {key("embedding_length"), GgufValue::uint32(32)},
          {key("feed_forward_length"), GgufValue::uint32(44)},
          {key("attention.head_count"), GgufValue::uint32(4)},
          {key("attention.head_count_kv"), GgufValue::uint32(2)},
          {key("attention.key_length"), GgufValue::uint32(8)},
          {key("attention.value_length"), GgufValue::uint32(8)},
          {key("context_length"), GgufValue::uint32(64)},
          {key("rope.freq_base"), GgufValue::float32(static_cast<float>(config.rope.theta))},
          {key("attention.layer_norm_rms_epsilon"), GgufValue::float32(1e-6F)}};
      if (!config.sliding_window.empty()) metadata.emplace_back(key("attention.sliding_window"), GgufValue::uint32(5));
      std::vector<GgufTensor> tensors;
      for (const auto& [name, value] : std::as_const(model).parameters()) {
        const auto dot = name.rfind('.');
        for (const NameMap& row : config.family->names) {
          for (std::int64_t layer = 0; layer < config.layers; ++layer) {
            if (tensor_name(row.hf, layer) != name.substr(0, dot)) continue;
            at::Tensor stored = value;
            if (config.family->rope_interleaved_in_gguf && row.role == "block.query") stored = permute_rope_rows(value, 4);
            if (config.family->rope_interleaved_in_gguf && row.role == "block.key") stored = permute_rope_rows(value, 2);
            if (config.family->norm_plus_one && value.dim() == 1) stored = value + 1;
            tensors.push_back(checkpoint_gguf_tensor(tensor_name(row.gguf, layer) + name.substr(dot), stored));
            layer = config.layers;
          }
        }
      }
      const TemporaryFolder folder;
      const auto path = folder.path() / "tiny.gguf";
      write_gguf(path, metadata, tensors);
      const auto again = load_model(path);
      ModelInput input;
      input.ids = random_ids(2, 12, 67, 5);
      CHECK(relative_error(again->forward(input), model.forward(input)) < 1e-5);
      CHECK(again->config().tied == config.tied);
      // A model that came from GGUF is saved as a Hugging Face folder that means the same.
      save_model(*again, folder.path() / "hf");
      CHECK(load_model(folder.path() / "hf")->forward(input).equal(again->forward(input)));

      tensors.erase(tensors.begin() + 2);
      tensors.push_back(checkpoint_gguf_tensor("blk.0.strange.weight", at::ones({2, 2})));
      write_gguf(path, metadata, tensors);
      CHECK(contains_all(error_text([&] { load_model(path); }), {"1 missing", "1 unexpected", "blk.0.strange.weight"}));
    }
  }
}

TEST_CASE("paths that hold no model", "[model]") {
  const TemporaryFolder folder;
  CHECK(contains_all(error_text([&] { load_model(folder.path()); }), {"config.json"}));
  CHECK(contains_all(error_text([&] { load_model(folder.path() / "none"); }), {"not found"}));
}

// $KOMPAKT_MINILM: folder of all-MiniLM-L6-v2.
TEST_CASE("all-MiniLM-L6-v2 gives the vectors of transformers", "[model]") {
  const char* folder = std::getenv("KOMPAKT_MINILM");
  if (!folder) return skip("KOMPAKT_MINILM is not set");
  const at::NoGradGuard no_grad;
  const SafetensorsFile golden = SafetensorsFile::open(source_folder() / "tests/goldens/model_minilm.safetensors");
  const auto value = [&](const char* name) { return as_tensor(*golden.find(name)); };
  const auto model = load_model(folder);
  CHECK(count_parameters(model->config()).total == 22713216 - 384 * 385);  // without the pooler
  ModelInput input;
  input.ids = value("ids");
  input.lengths = value("lengths");
  const at::Tensor hidden = model->hidden(input);
  const std::int64_t first = input.lengths[0].item<std::int64_t>();
  CHECK(relative_error(hidden[0].narrow(0, 0, first), value("hidden_first").narrow(0, 0, first)) < 1e-5);
  CHECK(relative_error(model->pooled(hidden, input), value("pooled")) < 1e-5);
}

// $KOMPAKT_SMOLLM2: SmolLM2-135M-Instruct.Q4_1.gguf.
TEST_CASE("SmolLM2-135M from GGUF gives the logits and the text of transformers", "[model]") {
  const char* path = std::getenv("KOMPAKT_SMOLLM2");
  if (!path) return skip("KOMPAKT_SMOLLM2 is not set");
  const at::NoGradGuard no_grad;
  const SafetensorsFile golden = SafetensorsFile::open(source_folder() / "tests/goldens/model_smollm2.safetensors");
  const auto value = [&](const char* name) { return as_tensor(*golden.find(name)); };
  const auto model = load_model(path);
  ModelInput input;
  input.ids = value("prompt").unsqueeze(0);
  const at::Tensor logits = model->forward(input)[0];
  const double error = relative_error(logits[logits.size(0) - 1], value("last_logits"));
  WARN("SmolLM2-135M: largest relative error of the logits " << error);
  CHECK(error < 1e-4);
  CHECK(relative_error(logits.gather(-1, value("top_ids")), value("top_values")) < 1e-4);
  const at::Tensor prompt = value("prompt"), greedy = value("greedy");
  GenerateOptions options;
  options.max_new_tokens = greedy.numel();
  const auto text = generate(*model, {prompt.const_data_ptr<std::int64_t>(), prompt.const_data_ptr<std::int64_t>() + prompt.numel()}, options);
  CHECK(at::tensor(text, at::kLong).equal(greedy));
}
