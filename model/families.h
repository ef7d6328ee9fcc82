// Table of model families: everything that is particular to one is a field of its row.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kompakt {

struct ModelConfig;

// Maps a role of the transformer to the tensor names of the family; "{i}" is the layer number.
struct NameMap {
  std::string_view role;  // "tokens", "block.query", "block.mlp_norm", ...: see families.cpp
  std::string_view hf;    // "model.layers.{i}.self_attn.q_proj"
  std::string_view gguf;  // "blk.{i}.attn_q"
};

struct Family {
  std::string_view name;                           // "bert", "llama", "qwen3"
  std::string_view summary;
  std::vector<std::string_view> model_types;       // config.json model_type values
  std::string_view gguf_architecture;              // general.architecture
  bool encoder, post_norm, rms_norm, gated_mlp, learned_positions;
  bool rope_interleaved_in_gguf;                   // q/k rows are permuted in GGUF files
  bool qk_norm, norm_plus_one, sandwich_norms;
  std::string_view activation;                     // "gelu", "gelu_tanh", "silu"
  std::span<const NameMap> names;
  std::vector<std::string_view> ignored;           // tensor names that a checkpoint may hold and that are not needed
  std::vector<std::string_view> prefixes;          // optional prefixes of all names ("bert.")
};

std::span<const Family> families();
const Family* find_family(std::string_view name);  // by name or model_type
std::vector<std::string> family_names();
// Row of a role ("block.query"), or null when the family has none.
const NameMap* find_role(const Family& family, std::string_view role);
// "{i}" of a pattern replaced by the layer number.
std::string tensor_name(std::string_view pattern, std::int64_t layer);

}  // namespace kompakt
