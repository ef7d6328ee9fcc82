// GGUF files to a Transformer: names by the family's table, blocks dequantized to float32, rows of query and key put back into
// the order of Hugging Face. Files whose quantization we do not read are refused by formats/gguf.h.
#include <ATen/ATen.h>

#include "core/error.h"
#include "core/paging.h"
#include "core/text.h"
#include "formats/gguf.h"
#include "model/checkpoint_source.h"
#include "model/families.h"
#include "model/rope.h"

namespace kompakt {

namespace {

// "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight" and its role; empty when the family has no such name.
struct GgufNameMatch {
  std::string name, role;
};

GgufNameMatch gguf_match(const Family& family, const std::string& name, std::int64_t layers) {
  const auto dot = name.rfind('.');
  if (dot == std::string::npos) return {};
  const std::string base = name.substr(0, dot), suffix = name.substr(dot);
  for (const NameMap& row : family.names) {
    const auto hole = row.gguf.find("{i}");
    if (hole == std::string_view::npos) {
      if (base == row.gguf) return {std::string(row.hf) + suffix, std::string(row.role)};
      continue;
    }
    const std::string_view head = row.gguf.substr(0, hole), tail = row.gguf.substr(hole + 3);
    if (!starts_with(base, head) || !ends_with(base, tail) || base.size() < head.size() + tail.size()) continue;
    const auto layer = parse_int(std::string_view(base).substr(head.size(), base.size() - head.size() - tail.size()));
    if (layer && *layer >= 0 && *layer < layers) return {tensor_name(row.hf, *layer) + suffix, std::string(row.role)};
  }
  return {};
}

at::Tensor gguf_tensor(const GgufTensor& tensor) {
  const auto values = std::make_shared<std::vector<float>>(to_float32(tensor));
  release_mapped_pages(tensor.bytes.data(), tensor.bytes.size());
  return at::from_blob(values->data(), tensor.shape, [values](void*) {}, at::TensorOptions().dtype(at::kFloat));
}

}  // namespace

ModelConfig load_config_gguf(const std::filesystem::path& path) { return config_from_gguf(GgufFile::open(path)); }

std::pair<ModelConfig, CheckpointSource> open_checkpoint_gguf(const std::filesystem::path& path) {
  const auto file = std::make_shared<GgufFile>(GgufFile::open(path));
  ModelConfig config = config_from_gguf(*file);
  const Family& family = *config.family;
  CheckpointSource source;
  source.place = path.string();
  for (const GgufTensor& tensor : file->tensors()) {
    const GgufNameMatch match = gguf_match(family, tensor.name, config.layers);
    if (match.name.empty()) {
      // rope_freqs holds the divisors of a rotary scaling that the metadata do not name: config_from_gguf reads it.
      if (tensor.name != "rope_freqs.weight") source.tensors.emplace(tensor.name, [] { return at::Tensor(); });
      continue;
    }
    const std::int64_t heads = match.role == "block.query" ? config.heads : match.role == "block.key" ? config.kv_heads : 0;
    const bool permuted = family.rope_interleaved_in_gguf && heads > 0;
    // Gemma's converter stores 1 + weight.
    const bool plus_one = family.norm_plus_one && tensor.shape.size() == 1;
    source.tensors.emplace(match.name, [&tensor, file, heads, permuted, plus_one] {
      at::Tensor value = gguf_tensor(tensor);
      if (permuted) value = unpermute_rope_rows(value, heads);
      return plus_one ? value - 1 : value;
    });
  }
  return {std::move(config), std::move(source)};
}

}  // namespace kompakt
