// The shape of a transformer, read from config.json (Hugging Face keys) or GGUF metadata. No torch.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

class GgufFile;
struct Family;

struct RopeConfig {
  double theta = 10000;
  std::string scaling = "none";  // none | linear | llama3 | yarn
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4, beta_fast = 32, beta_slow = 1, attention_factor = 1;
  std::int64_t original_max_positions = 0;
  double local_theta = 0;        // Gemma 3: base of the sliding-window layers; 0 = theta
};

struct ModelConfig {
  const Family* family = nullptr;  // row of the table of families
  std::int64_t layers = 0, hidden = 0, ffn = 0, heads = 0, kv_heads = 0, head_dim = 0;
  std::int64_t vocab = 0, max_positions = 0, type_vocab = 0;
  double norm_eps = 1e-5;
  bool tied = false;               // head shares the embedding (decoders)
  bool qkv_bias = false, out_bias = false, mlp_bias = false;
  bool sub_norms = false;          // SubLN: an RMSNorm in front of the output and the down projection of every block
  RopeConfig rope;
  std::vector<std::int64_t> sliding_window;  // [layers], 0 = full attention; empty = all full
  std::vector<std::int64_t> no_rope;         // [layers], 1 = no rotary embedding (SmolLM3); empty = all rotary
  double query_scale = 0;                    // attention scale; 0 = head_dim^-1/2
  double embedding_scale = 1;                // Gemma: sqrt(hidden)
  // Classifier on top of an encoder: pooling of the last hidden states, then one linear layer.
  std::vector<std::string> labels;           // empty = no classifier
  std::string pooling = "mean";              // mean | cls | pooler (dense + tanh on [CLS])
  std::int64_t bos = -1, eos = -1, pad = -1;
  Json source = Json::object();              // config.json as read: unknown keys survive a rewrite

  bool is_classifier() const { return !labels.empty(); }
};

// Errors: unknown family (with the known ones), missing key, sizes that do not fit each other.
ModelConfig config_from_json(const Json& json, const std::string& place);
ModelConfig config_from_gguf(const GgufFile& file);
// Hugging Face config.json; what has no standard key goes under "kompakt".
Json config_to_json(const ModelConfig& config);

// Parameter count of the shape: all, and embedding tables alone. Tied weights once.
struct ParameterCount {
  std::int64_t total = 0, embedding = 0;
};
ParameterCount count_parameters(const ModelConfig& config);
// The shape with so many layers; lists of what each layer is keep their first ones.
ModelConfig with_layers(ModelConfig config, std::int64_t layers);

}  // namespace kompakt
