#include "fixtures.h"

#include "../catch_torch.h"

#include "core/files.h"
#include "core/random.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "../support.h"

namespace kompakt::testing {

ModelConfig tiny_config(const std::string& family) {
  Json json = {{"model_type", std::string(find_family(family)->model_types.front())}, {"vocab_size", 67}, {"hidden_size", 32}, {"intermediate_size", 44},
               {"num_hidden_layers", family == "smollm3" ? 4 : 3}, {"num_attention_heads", 4}, {"max_position_embeddings", 64}};
  if (!find_family(family)->encoder) {
    json["num_key_value_heads"] = 2;
    json["head_dim"] = 8;
  }
  if (family == "mistral" || family == "gemma3") json["sliding_window"] = 5;
  if (family == "gemma3") json["sliding_window_pattern"] = 3;
  if (family == "llama") json["tie_word_embeddings"] = true;
  return config_from_json(json, "tiny");
}

std::vector<std::string> golden_names() {
  return {"bert", "bert_classifier", "llama", "llama_scaled", "llama_yarn", "llama_linear", "mistral", "qwen2", "qwen2_window", "qwen3", "smollm3", "gemma3"};
}

GoldenModel open_golden(const std::string& name, const std::filesystem::path& folder) {
  const SafetensorsFile file = SafetensorsFile::open(source_folder() / "tests" / "goldens" / ("model_" + name + ".safetensors"));
  GoldenModel golden;
  golden.config = parse_json(file.metadata().at("config"), name);
  std::vector<TensorData> weights;
  for (const TensorData& tensor : file.tensors()) {
    if (tensor.name == "golden.ids") {
      golden.ids = as_tensor(tensor).clone();
    } else if (tensor.name == "golden.lengths") {
      golden.lengths = as_tensor(tensor).clone();
    } else if (tensor.name == "golden.output") {
      golden.output = as_tensor(tensor).clone();
    } else {
      weights.push_back(tensor);
    }
  }
  write_json(folder / "config.json", golden.config);
  write_safetensors(folder / "model.safetensors", weights, {{"format", "pt"}});
  return golden;
}

void randomize(Transformer& model, std::uint64_t seed) {
  for (NamedParameter& parameter : model.parameters()) {
    const CounterRandom random(seed, parameter.name);
    at::Tensor values = at::empty(parameter.value->sizes(), at::kFloat);
    const bool norm = values.dim() == 1 && parameter.name.find(".bias") == std::string::npos && !model.config().family->norm_plus_one;
    for (std::int64_t i = 0; i < values.numel(); ++i) {
      values.mutable_data_ptr<float>()[i] = static_cast<float>((norm ? 1.0 : 0.0) + 0.2 * random.normal(static_cast<std::uint64_t>(i)));
    }
    *parameter.value = values;
  }
}

at::Tensor random_ids(std::int64_t rows, std::int64_t length, std::int64_t vocab, std::uint64_t seed) {
  const CounterRandom random(seed, "ids");
  at::Tensor ids = at::empty({rows, length}, at::kLong);
  for (std::int64_t i = 0; i < ids.numel(); ++i) {
    ids.mutable_data_ptr<std::int64_t>()[i] = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(vocab)));
  }
  return ids;
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  REQUIRE(a.sizes() == b.sizes());
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>() / b.abs().max().item<double>();
}

}  // namespace kompakt::testing
