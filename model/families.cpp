// The table of model families. Everything particular to a family is data here; the transformer has no family names in it.
// A row stands here only when its logits are proven against an independent implementation (tests/model/families_test.cpp).
#include "model/families.h"

namespace kompakt {

namespace {

// Roles without "block." exist once. A role names a module: ".weight" and ".bias" are added where the module has them.
constexpr NameMap kBertNames[] = {
    {"tokens", "embeddings.word_embeddings", "token_embd"},
    {"positions", "embeddings.position_embeddings", "position_embd"},
    {"token_types", "embeddings.token_type_embeddings", "token_types"},
    {"embedding_norm", "embeddings.LayerNorm", "token_embd_norm"},
    {"block.query", "encoder.layer.{i}.attention.self.query", "blk.{i}.attn_q"},
    {"block.key", "encoder.layer.{i}.attention.self.key", "blk.{i}.attn_k"},
    {"block.value", "encoder.layer.{i}.attention.self.value", "blk.{i}.attn_v"},
    {"block.output", "encoder.layer.{i}.attention.output.dense", "blk.{i}.attn_output"},
    {"block.attention_sub_norm", "encoder.layer.{i}.attention.output.sub_norm", "blk.{i}.attn_sub_norm"},
    {"block.attention_norm", "encoder.layer.{i}.attention.output.LayerNorm", "blk.{i}.attn_output_norm"},
    {"block.up", "encoder.layer.{i}.intermediate.dense", "blk.{i}.ffn_up"},
    {"block.down", "encoder.layer.{i}.output.dense", "blk.{i}.ffn_down"},
    {"block.mlp_sub_norm", "encoder.layer.{i}.output.sub_norm", "blk.{i}.ffn_sub_norm"},
    {"block.mlp_norm", "encoder.layer.{i}.output.LayerNorm", "blk.{i}.layer_output_norm"},
    {"pooler", "pooler.dense", "cls"},
    {"classifier", "classifier", "cls.output"},
};

constexpr NameMap kLlamaNames[] = {
    {"tokens", "model.embed_tokens", "token_embd"},
    {"block.attention_norm", "model.layers.{i}.input_layernorm", "blk.{i}.attn_norm"},
    {"block.query", "model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"},
    {"block.key", "model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"},
    {"block.value", "model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"},
    {"block.output", "model.layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"},
    {"block.attention_sub_norm", "model.layers.{i}.self_attn.attn_sub_norm", "blk.{i}.attn_sub_norm"},
    {"block.query_norm", "model.layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"},
    {"block.key_norm", "model.layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"},
    {"block.mlp_norm", "model.layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"},
    {"block.gate", "model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"},
    {"block.up", "model.layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"},
    {"block.down", "model.layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"},
    {"block.mlp_sub_norm", "model.layers.{i}.mlp.ffn_sub_norm", "blk.{i}.ffn_sub_norm"},
    {"final_norm", "model.norm", "output_norm"},
    {"lm_head", "lm_head", "output"},
};

// Gemma 3 has four norms a block, and its "post_attention_layernorm" is not the one before the MLP.
constexpr NameMap kGemmaNames[] = {
    {"tokens", "model.embed_tokens", "token_embd"},
    {"block.attention_norm", "model.layers.{i}.input_layernorm", "blk.{i}.attn_norm"},
    {"block.query", "model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"},
    {"block.key", "model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"},
    {"block.value", "model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"},
    {"block.output", "model.layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"},
    {"block.attention_sub_norm", "model.layers.{i}.self_attn.attn_sub_norm", "blk.{i}.attn_sub_norm"},
    {"block.query_norm", "model.layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"},
    {"block.key_norm", "model.layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"},
    {"block.post_attention_norm", "model.layers.{i}.post_attention_layernorm", "blk.{i}.post_attention_norm"},
    {"block.mlp_norm", "model.layers.{i}.pre_feedforward_layernorm", "blk.{i}.ffn_norm"},
    {"block.gate", "model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"},
    {"block.up", "model.layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"},
    {"block.down", "model.layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"},
    {"block.mlp_sub_norm", "model.layers.{i}.mlp.ffn_sub_norm", "blk.{i}.ffn_sub_norm"},
    {"block.post_mlp_norm", "model.layers.{i}.post_feedforward_layernorm", "blk.{i}.post_ffw_norm"},
    {"final_norm", "model.norm", "output_norm"},
    {"lm_head", "lm_head", "output"},
};

Family family_decoder(std::string_view name, std::string_view summary, std::vector<std::string_view> model_types, std::string_view gguf,
                      bool interleaved) {
  Family row{};
  row.name = name;
  row.summary = summary;
  row.model_types = std::move(model_types);
  row.gguf_architecture = gguf;
  row.rms_norm = row.gated_mlp = true;
  row.rope_interleaved_in_gguf = interleaved;
  row.activation = "silu";
  row.names = kLlamaNames;
  row.ignored = {"model.layers.{i}.self_attn.rotary_emb.inv_freq", "rope_freqs"};
  return row;
}

std::vector<Family> family_rows() {
  std::vector<Family> rows;
  {
    Family bert{};
    bert.name = "bert";
    bert.summary = "BERT encoders: MiniLM, FinBERT and other uncased or cased models with learned positions";
    bert.model_types = {"bert"};
    bert.gguf_architecture = "bert";
    bert.encoder = bert.post_norm = bert.learned_positions = true;
    bert.activation = "gelu";
    bert.names = kBertNames;
    // The pooler and the heads of pre-training: not part of an encoder with mean pooling.
    bert.ignored = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias", "cls.predictions.bias",
                    "cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.bias",
                    "cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias",
                    "cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.seq_relationship.weight",
                    "cls.seq_relationship.bias"};
    bert.prefixes = {"bert."};
    rows.push_back(bert);
  }
  rows.push_back(family_decoder("llama", "Llama 1-3, TinyLlama, SmolLM and SmolLM2, Yi", {"llama"}, "llama", true));
  rows.push_back(family_decoder("mistral", "Mistral: Llama with a sliding window", {"mistral"}, "llama", true));
  rows.push_back(family_decoder("qwen2", "Qwen2 and Qwen2.5: biases on query, key and value", {"qwen2"}, "qwen2", false));
  {
    Family qwen3 = family_decoder("qwen3", "Qwen3 (dense): RMSNorm on every query and key head", {"qwen3"}, "qwen3", false);
    qwen3.qk_norm = true;
    rows.push_back(qwen3);
  }
  rows.push_back(family_decoder("smollm3", "SmolLM3: layers without rotary embedding", {"smollm3"}, "smollm3", true));
  {
    Family gemma = family_decoder("gemma3", "Gemma 3 text models: sandwich norms, local and global layers", {"gemma3_text"}, "gemma3", false);
    gemma.qk_norm = gemma.norm_plus_one = gemma.sandwich_norms = true;
    gemma.activation = "gelu_tanh";
    gemma.names = kGemmaNames;
    rows.push_back(gemma);
  }
  return rows;
}

}  // namespace

std::span<const Family> families() {
  static const std::vector<Family> rows = family_rows();
  return rows;
}

const Family* find_family(std::string_view name) {
  for (const Family& row : families()) {
    if (row.name == name) return &row;
    for (std::string_view type : row.model_types) {
      if (type == name) return &row;
    }
  }
  return nullptr;
}

std::vector<std::string> family_names() {
  std::vector<std::string> names;
  for (const Family& row : families()) names.emplace_back(row.name);
  return names;
}

std::string tensor_name(std::string_view pattern, std::int64_t layer) {
  std::string name(pattern);
  const auto at = name.find("{i}");
  if (at != std::string::npos) name.replace(at, 3, std::to_string(layer));
  return name;
}

const NameMap* find_role(const Family& family, std::string_view role) {
  for (const NameMap& row : family.names) {
    if (row.role == role) return &row;
  }
  return nullptr;
}

}  // namespace kompakt
