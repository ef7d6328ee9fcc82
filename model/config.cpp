// config.json of Hugging Face to ModelConfig and back, and the parameter count of a shape. GGUF metadata: config_gguf.cpp.
#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "core/error.h"
#include "core/text.h"
#include "model/families.h"

namespace kompakt {

namespace {

constexpr const char* config_own_type = "kompakt_";  // in front of model_type where the family alone does not describe the model

// Reads one config.json; collects what is missing or wrong into one Error.
class ConfigReader {
 public:
  ConfigReader(const Json& json, const std::string& place) : json_(json), place_(place) {}

  std::int64_t size(const std::string& key, std::int64_t fallback = 0) {
    if (!has(key)) {
      if (fallback == 0) problems_.add(Error("the key '" + key + "' is missing").at(place_));
      return fallback;
    }
    const auto value = json_get<std::int64_t>(json_, key, place_);
    if (value < 1) problems_.add(Error(str("the key '", key, "' is ", value)).at(place_).allowed("a positive integer"));
    return value;
  }
  bool has(const std::string& key) const { return json_.contains(key) && !json_.at(key).is_null(); }
  template <class T>
  T get(const std::string& key, T fallback) const {
    return json_get_or<T>(json_, key, place_, fallback);
  }
  std::int64_t token(const std::string& key) const {  // eos_token_id may be a list: the first counts
    if (!has(key)) return -1;
    const Json& value = json_.at(key);
    if (value.is_array()) return value.empty() ? -1 : value.at(0).get<std::int64_t>();
    return json_get<std::int64_t>(json_, key, place_);
  }
  Problems& problems() { return problems_; }
  const Json& json() const { return json_; }
  const std::string& place() const { return place_; }

 private:
  const Json& json_;
  std::string place_;
  Problems problems_;
};

void config_read_scaling(const Json& scaling, const std::string& place, RopeConfig& rope, Problems& problems) {
  std::string type = json_get_or<std::string>(scaling, "rope_type", place, json_get_or<std::string>(scaling, "type", place, "default"));
  if (type == "default") type = "none";
  static const std::vector<std::string> known = {"none", "linear", "llama3", "yarn"};
  if (std::find(known.begin(), known.end(), type) == known.end()) {
    problems.add(Error("the rotary scaling is not supported").at(place).given(type).allowed(join(known, ", ")));
    return;
  }
  rope.scaling = type;
  const auto number = [&](const char* key, double fallback) { return json_get_or<double>(scaling, key, place, fallback); };
  rope.factor = number("factor", 1);
  rope.low_freq_factor = number("low_freq_factor", 1);
  rope.high_freq_factor = number("high_freq_factor", 4);
  rope.beta_fast = number("beta_fast", 32);
  rope.beta_slow = number("beta_slow", 1);
  rope.original_max_positions = json_get_or<std::int64_t>(scaling, "original_max_position_embeddings", place, rope.original_max_positions);
  if (type == "yarn") {
    const auto scale = [&](double m) { return rope.factor <= 1 ? 1.0 : 0.1 * m * std::log(rope.factor) + 1.0; };
    const double m = number("mscale", 0), m_all = number("mscale_all_dim", 0);
    rope.attention_factor = number("attention_factor", m > 0 && m_all > 0 ? scale(m) / scale(m_all) : scale(1));
  }
}

void config_read_rope(ConfigReader& in, ModelConfig& c) {
  RopeConfig& rope = c.rope;
  rope.original_max_positions = c.max_positions;
  rope.theta = in.get<double>("rope_theta", c.family->name == "gemma3" ? 1e6 : 10000.0);
  if (c.family->name == "gemma3") rope.local_theta = in.get<double>("rope_local_base_freq", 10000.0);
  if (in.has("rope_scaling")) config_read_scaling(in.json().at("rope_scaling"), in.place(), rope, in.problems());
  if (!in.has("rope_parameters")) return;  // newer writers of config.json keep all of it here
  const Json& all = in.json().at("rope_parameters");
  const bool per_type = all.contains("full_attention");
  const Json& main = per_type ? all.at("full_attention") : all;
  rope.theta = json_get_or<double>(main, "rope_theta", in.place(), rope.theta);
  config_read_scaling(main, in.place(), rope, in.problems());
  if (per_type && all.contains("sliding_attention")) {
    rope.local_theta = json_get_or<double>(all.at("sliding_attention"), "rope_theta", in.place(), rope.local_theta);
  }
}

// Which layers see a window only. `layer_types` is the newer form; older files follow a rule of the family.
void config_read_windows(ConfigReader& in, ModelConfig& c) {
  const std::int64_t window = in.get<std::int64_t>("sliding_window", 0);
  if (window <= 0) return;
  const std::string_view family = c.family->name;
  if ((family == "qwen2" || family == "qwen3" || family == "smollm3") && !in.get<bool>("use_sliding_window", false)) return;
  const auto layers = static_cast<std::size_t>(c.layers);
  if (in.has("layer_types")) {
    const auto types = json_get<std::vector<std::string>>(in.json(), "layer_types", in.place());
    if (types.size() != layers) {
      in.problems().add(Error(str("layer_types has ", types.size(), " entries for ", layers, " layers")).at(in.place()));
      return;
    }
    std::vector<std::int64_t> windows;
    for (const std::string& type : types) windows.push_back(type == "sliding_attention" ? window : 0);
    if (std::any_of(windows.begin(), windows.end(), [](std::int64_t w) { return w > 0; })) c.sliding_window = windows;
    return;
  }
  c.sliding_window.assign(layers, 0);
  const std::int64_t pattern = in.get<std::int64_t>("sliding_window_pattern", 6);
  const std::int64_t full_below = in.get<std::int64_t>("max_window_layers", 28);
  for (std::size_t i = 0; i < layers; ++i) {
    const auto layer = static_cast<std::int64_t>(i);
    bool local = family == "llama" ? false : true;
    if (family == "gemma3") local = (layer + 1) % pattern != 0;
    if (family == "qwen2" || family == "qwen3") local = layer >= full_below;
    if (local) c.sliding_window[i] = window;
  }
}

void config_read_no_rope(ConfigReader& in, ModelConfig& c) {
  if (c.family->name != "smollm3") return;
  const auto layers = static_cast<std::size_t>(c.layers);
  if (in.has("no_rope_layers")) {  // 1 = rotary, 0 = none: the opposite of what the key says
    const auto list = json_get<std::vector<std::int64_t>>(in.json(), "no_rope_layers", in.place());
    if (list.size() != layers) {
      in.problems().add(Error(str("no_rope_layers has ", list.size(), " entries for ", layers, " layers")).at(in.place()));
      return;
    }
    for (std::int64_t rotary : list) c.no_rope.push_back(rotary ? 0 : 1);
    return;
  }
  const std::int64_t interval = in.get<std::int64_t>("no_rope_layer_interval", 4);
  for (std::size_t i = 0; i < layers; ++i) c.no_rope.push_back((static_cast<std::int64_t>(i) + 1) % interval == 0 ? 1 : 0);
}

void config_read_classifier(ConfigReader& in, ModelConfig& c) {
  const Json own = in.has("kompakt") ? in.json().at("kompakt") : Json::object();
  bool sequence_classifier = false;
  for (const std::string& name : in.get<std::vector<std::string>>("architectures", {})) {
    sequence_classifier |= ends_with(name, "ForSequenceClassification");
  }
  if (!sequence_classifier && !own.contains("pooling")) return;
  c.pooling = json_get_or<std::string>(own, "pooling", in.place(), "pooler");
  if (c.pooling != "mean" && c.pooling != "cls" && c.pooling != "pooler") {
    in.problems().add(Error("unknown pooling").at(in.place()).given(c.pooling).allowed("mean, cls, pooler"));
  }
  std::map<std::int64_t, std::string> names;
  if (in.has("id2label")) {
    for (const auto& [key, value] : in.json().at("id2label").items()) {
      const auto id = parse_int(key);
      if (id && value.is_string()) names[*id] = value.get<std::string>();
    }
  } else {
    for (std::int64_t i = 0; i < in.get<std::int64_t>("num_labels", 2); ++i) names[i] = str("LABEL_", i);
  }
  for (const auto& [id, name] : names) {
    if (id != static_cast<std::int64_t>(c.labels.size())) {
      in.problems().add(Error(str("id2label jumps to ", id)).at(in.place()).allowed("0, 1, 2, ... without a gap"));
      return;
    }
    c.labels.push_back(name);
  }
}

void config_check_activation(ConfigReader& in, const ModelConfig& c) {
  const char* key = in.has("hidden_activation") ? "hidden_activation" : "hidden_act";
  const std::string given = in.get<std::string>(key, "");
  static const std::map<std::string, std::string> meaning = {
      {"gelu", "gelu"}, {"silu", "silu"}, {"swish", "silu"}, {"gelu_pytorch_tanh", "gelu_tanh"}, {"gelu_new", "gelu_tanh"}};
  const auto found = meaning.find(given);
  if (given.empty() || (found != meaning.end() && found->second == c.family->activation)) return;
  in.problems().add(Error(str("'", key, "' does not fit the family ", c.family->name)).at(in.place()).given(given).allowed(std::string(c.family->activation)));
}

// Keys of a family's weights that have another default than false.
void config_read_biases(ConfigReader& in, ModelConfig& c) {
  if (c.family->encoder) {
    c.qkv_bias = c.out_bias = c.mlp_bias = true;
    return;
  }
  if (c.family->name == "qwen2") {
    c.qkv_bias = true;
    return;
  }
  c.qkv_bias = c.out_bias = in.get<bool>("attention_bias", false);
  if (c.family->name == "llama" || c.family->name == "smollm3") c.mlp_bias = in.get<bool>("mlp_bias", false);
}

}  // namespace

ModelConfig config_from_json(const Json& json, const std::string& place) {
  if (!json.is_object()) throw Error("config.json must hold an object").at(place);
  auto type = json_get<std::string>(json, "model_type", place);
  if (starts_with(type, config_own_type)) type = type.substr(std::string_view(config_own_type).size());
  ModelConfig c;
  c.family = find_family(type);
  if (!c.family) {
    const auto names = family_names();
    throw Error("the model family '" + type + "' is unknown" + did_you_mean(type, names)).at(place).given(type).allowed(join(names, ", "));
  }
  c.source = json;
  ConfigReader in(json, place);
  const Family& family = *c.family;
  c.layers = in.size("num_hidden_layers");
  c.hidden = in.size("hidden_size");
  c.ffn = in.size("intermediate_size");
  c.heads = in.size("num_attention_heads");
  c.vocab = in.size("vocab_size");
  c.max_positions = in.size("max_position_embeddings", family.encoder ? 512 : 2048);
  c.kv_heads = family.encoder ? c.heads : in.size("num_key_value_heads", family.name == "qwen2" || family.name == "qwen3" ? 32 : std::max<std::int64_t>(c.heads, 1));
  in.problems().throw_if_any("the config does not describe a model that can be built");
  if (c.kv_heads > c.heads && !in.has("num_key_value_heads")) c.kv_heads = c.heads;
  if (in.has("head_dim")) {
    c.head_dim = in.size("head_dim");
  } else {
    c.head_dim = c.hidden / c.heads;
    if (c.hidden % c.heads != 0) {
      in.problems().add(Error(str("hidden_size ", c.hidden, " is not a multiple of num_attention_heads ", c.heads)).at(place).hint("give head_dim where they differ"));
    }
  }
  if (c.heads % c.kv_heads != 0) {
    in.problems().add(Error(str("num_attention_heads ", c.heads, " is not a multiple of num_key_value_heads ", c.kv_heads)).at(place));
  }
  if (!family.encoder && c.head_dim % 2 != 0) in.problems().add(Error(str("head_dim ", c.head_dim, " is odd; rotary embedding needs pairs")).at(place));
  if (family.encoder) {
    c.type_vocab = in.size("type_vocab_size", 2);
    c.norm_eps = in.get<double>("layer_norm_eps", 1e-12);
    const auto kind = in.get<std::string>("position_embedding_type", "absolute");
    if (kind != "absolute") in.problems().add(Error("position_embedding_type is not supported").at(place).given(kind).allowed("absolute"));
    config_read_classifier(in, c);
  } else {
    c.norm_eps = in.get<double>("rms_norm_eps", 1e-6);
    c.tied = in.get<bool>("tie_word_embeddings", family.name == "gemma3" || family.name == "smollm3");
    config_read_rope(in, c);
    config_read_windows(in, c);
    config_read_no_rope(in, c);
  }
  config_read_biases(in, c);
  if (in.has("kompakt")) c.sub_norms = json_get_or<bool>(json.at("kompakt"), "sub_norms", place, false);
  config_check_activation(in, c);
  if (family.name == "gemma3") {
    c.embedding_scale = std::sqrt(static_cast<double>(c.hidden));
    c.query_scale = 1.0 / std::sqrt(in.get<double>("query_pre_attn_scalar", 256.0));
    for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping"}) {
      if (in.has(key)) in.problems().add(Error(str("'", key, "' is not supported")).at(place).allowed("null"));
    }
    if (in.get<bool>("use_bidirectional_attention", false)) in.problems().add(Error("bidirectional attention of Gemma 3 is not supported").at(place));
  }
  c.bos = in.token("bos_token_id");
  c.eos = in.token("eos_token_id");
  c.pad = in.token("pad_token_id");
  in.problems().throw_if_any("the config does not describe a model that can be built");
  return c;
}

Json config_to_json(const ModelConfig& c) {
  const Family& family = *c.family;
  Json out = c.source.is_object() ? c.source : Json::object();
  const bool classifier = c.is_classifier();
  static const std::map<std::string_view, std::string> architectures = {
      {"bert", "BertModel"}, {"llama", "LlamaForCausalLM"}, {"mistral", "MistralForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"},
      {"qwen3", "Qwen3ForCausalLM"}, {"smollm3", "SmolLM3ForCausalLM"}, {"gemma3", "Gemma3ForCausalLM"}};
  // Only a pooler classifier is what transformers means by BertForSequenceClassification.
  const std::string plain = architectures.at(family.name);
  out["architectures"] = Json::array({classifier && c.pooling == "pooler" ? "BertForSequenceClassification" : plain});
  out["model_type"] = family.model_types.front();
  if (c.sub_norms) {  // under the family's own name other programs would load the rest and compute something else
    out["architectures"] = Json::array({str("Kompakt", out["architectures"][0].get<std::string>())});
    out["model_type"] = str(config_own_type, family.model_types.front());
    out["kompakt"]["sub_norms"] = true;
  }
  out["num_hidden_layers"] = c.layers;
  out["hidden_size"] = c.hidden;
  out["intermediate_size"] = c.ffn;
  out["num_attention_heads"] = c.heads;
  out["vocab_size"] = c.vocab;
  out["max_position_embeddings"] = c.max_positions;
  if (out.contains("head_dim") || c.head_dim * c.heads != c.hidden || family.name == "gemma3" || family.name == "qwen3") out["head_dim"] = c.head_dim;
  const char* act_key = family.name == "gemma3" ? "hidden_activation" : "hidden_act";
  if (!out.contains("hidden_act") && !out.contains("hidden_activation")) out[act_key] = family.activation == "gelu_tanh" ? "gelu_pytorch_tanh" : std::string(family.activation);
  if (family.encoder) {
    out["type_vocab_size"] = c.type_vocab;
    out["layer_norm_eps"] = c.norm_eps;
  } else {
    out["num_key_value_heads"] = c.kv_heads;
    out["rms_norm_eps"] = c.norm_eps;
    out["tie_word_embeddings"] = c.tied;
    if (family.name == "llama" || family.name == "mistral" || family.name == "qwen3" || family.name == "smollm3" || family.name == "gemma3") {
      if (out.contains("attention_bias") || c.qkv_bias) out["attention_bias"] = c.qkv_bias;
    }
    if (out.contains("mlp_bias") || c.mlp_bias) out["mlp_bias"] = c.mlp_bias;
    if (!out.contains("rope_theta") && !out.contains("rope_parameters")) {
      out["rope_theta"] = c.rope.theta;
      if (c.rope.local_theta > 0) out["rope_local_base_freq"] = c.rope.local_theta;
      if (c.rope.scaling != "none" && !out.contains("rope_scaling")) {
        Json scaling = {{"rope_type", c.rope.scaling}, {"factor", c.rope.factor}, {"original_max_position_embeddings", c.rope.original_max_positions}};
        if (c.rope.scaling == "llama3") {
          scaling["low_freq_factor"] = c.rope.low_freq_factor;
          scaling["high_freq_factor"] = c.rope.high_freq_factor;
        }
        if (c.rope.scaling == "yarn") {
          scaling["beta_fast"] = c.rope.beta_fast;
          scaling["beta_slow"] = c.rope.beta_slow;
          scaling["attention_factor"] = c.rope.attention_factor;
        }
        out["rope_scaling"] = scaling;
      }
    }
    if (!c.sliding_window.empty()) {
      const auto window = *std::max_element(c.sliding_window.begin(), c.sliding_window.end());
      if (window > 0) out["sliding_window"] = window;
      if (family.name != "mistral" || out.contains("layer_types")) {
        Json types = Json::array();
        for (std::int64_t w : c.sliding_window) types.push_back(w > 0 ? "sliding_attention" : "full_attention");
        out["layer_types"] = types;
      }
    } else if (out.contains("layer_types")) {
      out["layer_types"] = std::vector<std::string>(static_cast<std::size_t>(c.layers), "full_attention");
    }
    if (!c.no_rope.empty()) {
      Json list = Json::array();
      for (std::int64_t without : c.no_rope) list.push_back(without ? 0 : 1);
      out["no_rope_layers"] = list;
    }
    if (family.name == "gemma3" && !out.contains("query_pre_attn_scalar")) out["query_pre_attn_scalar"] = 1.0 / (c.query_scale * c.query_scale);
  }
  const auto token = [&](const char* key, std::int64_t id) {
    if (id >= 0 && !out.contains(key)) out[key] = id;
  };
  token("bos_token_id", c.bos);
  token("eos_token_id", c.eos);
  token("pad_token_id", c.pad);
  if (classifier) {
    Json id2label = Json::object(), label2id = Json::object();
    for (std::size_t i = 0; i < c.labels.size(); ++i) {
      id2label[std::to_string(i)] = c.labels[i];
      label2id[c.labels[i]] = i;
    }
    out["id2label"] = id2label;
    out["label2id"] = label2id;
    out["kompakt"]["pooling"] = c.pooling;
  }
  return out;
}

ParameterCount count_parameters(const ModelConfig& c) {
  const Family& family = *c.family;
  const std::int64_t inner = c.heads * c.head_dim, inner_kv = c.kv_heads * c.head_dim;
  const std::int64_t norm = family.rms_norm ? c.hidden : 2 * c.hidden;
  const std::int64_t mlps = family.gated_mlp ? 2 : 1;
  std::int64_t block = c.hidden * (inner + 2 * inner_kv) + inner * c.hidden + (mlps + 1) * c.hidden * c.ffn + 2 * norm;
  if (c.qkv_bias) block += inner + 2 * inner_kv;
  if (c.out_bias) block += c.hidden;
  if (c.mlp_bias) block += mlps * c.ffn + c.hidden;
  if (family.qk_norm) block += 2 * c.head_dim;
  if (family.sandwich_norms) block += 2 * norm;
  if (c.sub_norms) block += inner + c.ffn;
  ParameterCount count;
  count.embedding = c.vocab * c.hidden + c.type_vocab * c.hidden + (family.learned_positions ? c.max_positions * c.hidden : 0);
  count.total = count.embedding + c.layers * block + norm;  // one norm after the embedding (encoder) or at the end (decoder)
  if (!family.encoder && !c.tied) count.total += c.vocab * c.hidden;
  if (c.is_classifier()) {
    const auto classes = static_cast<std::int64_t>(c.labels.size());
    count.total += classes * (c.hidden + 1);
    if (c.pooling == "pooler") count.total += c.hidden * (c.hidden + 1);
  }
  return count;
}

ModelConfig with_layers(ModelConfig config, std::int64_t layers) {
  config.layers = layers;
  for (std::vector<std::int64_t>* list : {&config.sliding_window, &config.no_rope})
    if (!list->empty()) list->resize(static_cast<std::size_t>(layers));
  return config;
}

}  // namespace kompakt
