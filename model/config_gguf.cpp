// GGUF metadata to ModelConfig. What metadata leave out (biases, a head of its own) is read off the tensor list.
#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/text.h"
#include "formats/gguf.h"
#include "model/config.h"
#include "model/families.h"

namespace kompakt {

namespace {

std::int64_t gguf_size(const GgufFile& file, const std::string& key) {
  const std::int64_t value = file.integer(key);
  if (value < 1) throw Error(str("'", key, "' is ", value)).at(file.path().string()).allowed("a positive integer");
  return value;
}

// llama3 scaling stands in GGUF as a tensor of divisors, one a pair; factor, low and high are found back from it, since the
// divisors are 1, then a blend, then `factor`. low_freq_factor 1 and high_freq_factor 4 are what every published model uses;
// the original context is the one whose divisors equal the file's.
void gguf_read_rope_divisors(const GgufFile& file, ModelConfig& c) {
  const GgufTensor* tensor = file.find("rope_freqs.weight");
  if (!tensor) return;
  const std::vector<float> divisors = to_float32(*tensor);
  if (divisors.size() != static_cast<std::size_t>(c.head_dim / 2)) {
    throw Error(str("rope_freqs.weight has ", divisors.size(), " values for ", c.head_dim / 2, " pairs")).at(file.path().string());
  }
  const float factor = *std::max_element(divisors.begin(), divisors.end());
  if (factor == 1.0F) return;
  for (std::int64_t original = 1024; original <= 131072; original *= 2) {
    RopeConfig trial = c.rope;
    trial.scaling = "llama3";
    trial.factor = factor;
    trial.original_max_positions = original;
    bool equal = true;
    for (std::size_t i = 0; i < divisors.size(); ++i) {
      const double frequency = std::pow(trial.theta, -2.0 * static_cast<double>(i) / static_cast<double>(c.head_dim));
      const double wavelength = 2 * 3.14159265358979323846 / frequency, length = static_cast<double>(original);
      double divisor = 1;
      if (wavelength > length / trial.low_freq_factor) {
        divisor = factor;
      } else if (wavelength >= length / trial.high_freq_factor) {
        const double smooth = (length / wavelength - trial.low_freq_factor) / (trial.high_freq_factor - trial.low_freq_factor);
        divisor = 1 / ((1 - smooth) / factor + smooth);
      }
      equal = equal && std::abs(divisor - divisors[i]) <= 1e-4 * divisor;
    }
    if (equal) {
      c.rope = trial;
      return;
    }
  }
  throw Error("rope_freqs.weight is not the scaling of Llama 3").at(file.path().string()).hint("convert from the Hugging Face checkpoint instead");
}

}  // namespace

ModelConfig config_from_gguf(const GgufFile& file) {
  const std::string place = file.path().string();
  const std::string arch = file.text("general.architecture");
  ModelConfig c;
  for (const Family& row : families()) {
    if (row.gguf_architecture == arch && !row.encoder) {
      c.family = &row;  // several families share "llama": the first row stands for all
      break;
    }
  }
  if (!c.family) {
    std::vector<std::string> known;
    for (const Family& row : families()) {
      if (!row.encoder && std::find(known.begin(), known.end(), row.gguf_architecture) == known.end()) known.emplace_back(row.gguf_architecture);
    }
    throw Error("the architecture of the GGUF file is not supported" + did_you_mean(arch, known)).at(place).given(arch).allowed(join(known, ", "));
  }
  const auto key = [&](const char* name) { return arch + "." + name; };
  c.layers = gguf_size(file, key("block_count"));
  c.hidden = gguf_size(file, key("embedding_length"));
  c.ffn = gguf_size(file, key("feed_forward_length"));
  c.heads = gguf_size(file, key("attention.head_count"));
  c.kv_heads = file.integer_or(key("attention.head_count_kv"), c.heads);
  c.head_dim = file.integer_or(key("attention.key_length"), c.hidden / c.heads);
  if (file.integer_or(key("attention.value_length"), c.head_dim) != c.head_dim) throw Error("keys and values of different sizes are not supported").at(place);
  if (c.kv_heads < 1 || c.heads % c.kv_heads != 0) {
    throw Error(str("head_count ", c.heads, " is not a multiple of head_count_kv ", c.kv_heads)).at(place);
  }
  if (c.head_dim < 2 || c.head_dim % 2 != 0) throw Error(str("the head size is ", c.head_dim)).at(place).allowed("an even number");
  if (file.integer_or(key("rope.dimension_count"), c.head_dim) != c.head_dim) throw Error("partial rotary embedding is not supported").at(place);
  c.max_positions = file.integer_or(key("context_length"), 2048);
  c.norm_eps = file.number_or(key("attention.layer_norm_rms_epsilon"), 1e-6);
  const GgufTensor* embedding = file.find("token_embd.weight");
  if (!embedding || embedding->shape.size() != 2) throw Error("token_embd.weight is missing or not a matrix").at(place);
  c.vocab = embedding->shape[0];
  c.tied = file.find("output.weight") == nullptr;
  c.qkv_bias = file.find("blk.0.attn_q.bias") != nullptr;
  c.out_bias = file.find("blk.0.attn_output.bias") != nullptr;
  c.mlp_bias = file.find("blk.0.ffn_up.bias") != nullptr;
  for (const char* unsupported : {"expert_count", "attention.q_lora_rank"}) {
    if (file.integer_or(key(unsupported), 0) > 0) throw Error(str("'", key(unsupported), "' is not supported")).at(place);
  }

  const bool gemma = c.family->norm_plus_one;
  c.rope.theta = file.number_or(key("rope.freq_base"), 10000.0);
  c.rope.original_max_positions = file.integer_or(key("rope.scaling.original_context_length"), c.max_positions);
  if (gemma) c.rope.local_theta = file.number_or(key("rope.freq_base_swa"), 10000.0);
  const std::string scaling = file.text_or(key("rope.scaling.type"), "none");
  if (scaling != "none" && scaling != "linear" && scaling != "yarn") {
    throw Error("the rotary scaling is not supported").at(place).given(scaling).allowed("none, linear, yarn");
  }
  c.rope.scaling = scaling;
  c.rope.factor = file.number_or(key("rope.scaling.factor"), 1.0);
  if (scaling == "yarn") {
    c.rope.beta_fast = file.number_or(key("rope.scaling.yarn_beta_fast"), 32);
    c.rope.beta_slow = file.number_or(key("rope.scaling.yarn_beta_slow"), 1);
    c.rope.attention_factor = file.number_or(key("rope.scaling.attn_factor"), 1.0) * (0.1 * std::log(c.rope.factor) + 1.0);
  }
  gguf_read_rope_divisors(file, c);

  const std::int64_t window = file.integer_or(key("attention.sliding_window"), 0);
  if (window > 0) {
    c.sliding_window.assign(static_cast<std::size_t>(c.layers), window);
    for (std::int64_t i = 5; gemma && i < c.layers; i += 6) c.sliding_window[static_cast<std::size_t>(i)] = 0;
    if (c.family->name == "llama") c.family = find_family("mistral");
  }
  if (c.family->name == "smollm3") {
    for (std::int64_t i = 0; i < c.layers; ++i) c.no_rope.push_back((i + 1) % 4 == 0 ? 1 : 0);
  }
  if (gemma) {
    c.embedding_scale = std::sqrt(static_cast<double>(c.hidden));
    c.query_scale = 1.0 / std::sqrt(static_cast<double>(c.layers == 62 ? c.hidden / c.heads : c.head_dim));  // the 27B model scales by hidden/heads
  }
  c.bos = file.integer_or("tokenizer.ggml.bos_token_id", -1);
  c.eos = file.integer_or("tokenizer.ggml.eos_token_id", -1);
  c.pad = file.integer_or("tokenizer.ggml.padding_token_id", -1);
  return c;
}

}  // namespace kompakt
