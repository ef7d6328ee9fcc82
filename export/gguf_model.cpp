// A decoder as one GGUF v3 file, model.gguf. Quantized tensors are repacked, norms and other vectors are float32, remaining
// matrices float16 where that is exact, else float32. llama.cpp computes the same weights; its kernels round activations.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "export/exporters.h"
#include "export/gguf_blocks.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/rope.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

using Metadata = std::vector<std::pair<std::string, GgufValue>>;

struct GgufName {
  std::string name;       // with suffix
  std::string_view role;
};

// "model.layers.3.self_attn.q_proj.weight" -> "blk.3.attn_q.weight".
GgufName gguf_name(const Family& family, const std::string& parameter) {
  const std::size_t dot = parameter.rfind('.');
  const std::string module = parameter.substr(0, dot), suffix = parameter.substr(dot);
  for (const NameMap& row : family.names) {
    const std::string_view pattern = row.hf;
    const std::size_t mark = pattern.find("{i}");
    if (mark == std::string_view::npos) {
      if (module == pattern) return {std::string(row.gguf) + suffix, row.role};
      continue;
    }
    const std::string_view head = pattern.substr(0, mark), tail = pattern.substr(mark + 3);
    if (!starts_with(module, head) || !ends_with(module, tail) || module.size() <= head.size() + tail.size()) continue;
    const auto layer = parse_int(std::string_view(module).substr(head.size(), module.size() - head.size() - tail.size()));
    if (layer) return {tensor_name(row.gguf, *layer) + suffix, row.role};
  }
  throw std::logic_error("no GGUF name for " + parameter);
}

// general.file_type: informational, the type of most bytes.
std::uint32_t gguf_file_type(const std::vector<GgufTensor>& tensors) {
  struct Row {
    std::string_view type;
    std::uint32_t value;
  };
  constexpr Row rows[] = {{"F32", 0}, {"F16", 1}, {"Q4_0", 2}, {"Q4_1", 3}, {"Q8_0", 7}, {"Q5_0", 8}, {"Q5_1", 9}, {"Q2_K", 10}, {"Q3_K", 12}, {"Q4_K", 15}, {"Q5_K", 17}, {"Q6_K", 18}, {"IQ4_NL", 25}, {"IQ4_XS", 30}, {"TQ1_0", 36}, {"TQ2_0", 37}};
  std::map<std::string_view, std::size_t> bytes;
  for (const GgufTensor& tensor : tensors) bytes[tensor.type->name] += tensor.name == "token_embd.weight" ? 0 : tensor.bytes.size();
  const auto most = std::max_element(bytes.begin(), bytes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  for (const Row& row : rows)
    if (most != bytes.end() && row.type == most->first) return row.value;
  return 1;  // a type newer than the enumeration: read from the tensors themselves
}

Metadata gguf_metadata(const ModelConfig& config, const std::string& name) {
  const std::string arch(config.family->gguf_architecture);
  const auto key = [&](const char* rest) { return str(arch, ".", rest); };
  const auto number = [](std::int64_t value) { return GgufValue::uint32(static_cast<std::uint32_t>(value)); };
  Metadata out = {{"general.architecture", GgufValue::text(arch)}, {"general.name", GgufValue::text(name)}, {"general.quantization_version", GgufValue::uint32(2)},
      {key("context_length"), number(config.max_positions)}, {key("embedding_length"), number(config.hidden)}, {key("block_count"), number(config.layers)},
      {key("feed_forward_length"), number(config.ffn)}, {key("attention.head_count"), number(config.heads)}, {key("attention.head_count_kv"), number(config.kv_heads)},
      {key("attention.layer_norm_rms_epsilon"), GgufValue::float32(static_cast<float>(config.norm_eps))}, {key("rope.dimension_count"), number(config.head_dim)},
      {key("rope.freq_base"), GgufValue::float32(static_cast<float>(config.rope.theta))}, {key("vocab_size"), number(config.vocab)}};
  if (config.head_dim * config.heads != config.hidden || config.family->name == "qwen3" || config.family->name == "gemma3") {
    out.emplace_back(key("attention.key_length"), number(config.head_dim));
    out.emplace_back(key("attention.value_length"), number(config.head_dim));
  }
  if (config.rope.scaling == "linear") {
    out.emplace_back(key("rope.scaling.type"), GgufValue::text("linear"));
    out.emplace_back(key("rope.scaling.factor"), GgufValue::float32(static_cast<float>(config.rope.factor)));
  }
  for (const std::int64_t window : config.sliding_window)
    if (window > 0) {
      out.emplace_back(key("attention.sliding_window"), number(window));
      break;
    }
  return out;
}

struct RopeShape {
  std::int64_t heads = 0;  // 0 = rows stay in order
};

RopeShape rope_shape(const ModelConfig& config, std::string_view role) {
  if (!config.family->rope_interleaved_in_gguf) return {};
  if (role == "block.query") return {config.heads};
  if (role == "block.key") return {config.kv_heads};
  return {};
}

GgufTensor gguf_tensor(std::string name, const GgmlType* type, std::vector<std::int64_t> shape, std::vector<std::byte> bytes) {
  auto owner = std::make_shared<std::vector<std::byte>>(std::move(bytes));
  GgufTensor tensor;
  tensor.name = std::move(name);
  tensor.type = type;
  tensor.shape = std::move(shape);
  tensor.bytes = {owner->data(), owner->size()};
  tensor.owner = owner;
  return tensor;
}

bool gguf_fits_half(const at::Tensor& plain) { return plain.dim() > 1 && at::equal(plain.to(at::kHalf).to(at::kFloat), plain); }

GgufTensor gguf_float_tensor(const std::string& name, const at::Tensor& value) {
  const at::Tensor plain = value.detach().to(at::kCPU, at::kFloat).contiguous();
  const bool half = gguf_fits_half(plain);
  const at::Tensor stored = half ? plain.to(at::kHalf) : plain;
  std::vector<std::byte> bytes(static_cast<std::size_t>(stored.nbytes()));
  std::memcpy(bytes.data(), stored.const_data_ptr(), bytes.size());
  return gguf_tensor(name, find_ggml_type(half ? "F16" : "F32"), plain.sizes().vec(), std::move(bytes));
}

// llama.cpp divides the frequencies of Llama 3 scaling by these, [head_dim / 2].
GgufTensor gguf_rope_factors(const RopeConfig& rope, std::int64_t head_dim) {
  RopeConfig plain = rope;
  plain.scaling = "none";
  const std::vector<double> scaled = rope_frequencies(rope, head_dim), base = rope_frequencies(plain, head_dim);
  at::Tensor factors = at::empty({head_dim / 2}, at::kFloat);
  for (std::int64_t i = 0; i < head_dim / 2; ++i) factors.data_ptr<float>()[i] = static_cast<float>(base[static_cast<std::size_t>(i)] / scaled[static_cast<std::size_t>(i)]);
  return gguf_float_tensor("rope_freqs.weight", factors);
}

}  // namespace

std::vector<std::string> gguf_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>& plan) {
  std::vector<std::string> obstacles;
  if (config.family->encoder) obstacles.push_back("GGUF export is for decoders; this model is an encoder (take format kompakt)");
  if (config.rope.scaling == "yarn") obstacles.push_back("rotary scaling \"yarn\" is not written to GGUF");
  if (config.rope.local_theta > 0 && config.family->name != "gemma3") obstacles.push_back("two rotary bases have no keys in this architecture");
  if (config.sub_norms) obstacles.push_back("sub-norms (quantize.subln) have no place in this architecture's GGUF files (take format kompakt)");
  for (const std::string& sentence : rounding_obstacles(config, "GGUF")) obstacles.push_back(sentence);
  if (!obstacles.empty()) return obstacles;
  const Transformer shapes(config, 0, c10::Device(c10::kMeta));
  for (const auto& [name, value] : shapes.parameters()) {
    const auto found = plan.find(ends_with(name, ".weight") ? name.substr(0, name.size() - 7) : name);
    std::string why;
    if (found != plan.end() && !exact_ggml_type(found->second, value.size(1), why)) obstacles.push_back(str(name, ": ", why));
  }
  return obstacles;
}

bool gguf_holds(const GridSpec& spec, std::int64_t columns, std::string& why) { return exact_ggml_type(spec, columns, why) != nullptr; }

std::int64_t gguf_tensor_bytes(const GridSpec& spec, std::int64_t rows, std::int64_t columns) {
  std::string why;
  const GgmlType* type = exact_ggml_type(spec, columns, why);
  if (!type) throw std::logic_error("gguf_tensor_bytes: " + why);
  return (ggml_tensor_bytes(*type, columns, rows).value() + 31) / 32 * 32;  // tensors begin at multiples of 32
}

std::int64_t gguf_model_bytes(const ArtifactShape& shape) {
  const ModelConfig& config = shape.model.config();
  std::vector<GgufTensor> tensors;
  for (const auto& [parameter, value] : shape.model.parameters()) {
    GgufTensor tensor;
    tensor.name = gguf_name(*config.family, parameter).name;
    tensor.shape = value.sizes().vec();
    const auto found = shape.plan.find(ends_with(parameter, ".weight") ? parameter.substr(0, parameter.size() - 7) : parameter);
    std::string why;
    if (found != shape.plan.end())
      tensor.type = exact_ggml_type(found->second, value.size(1), why);
    else
      tensor.type = find_ggml_type(value.dim() > 1 && !shape.stays_whole(parameter) && (shape.halves || value.is_meta() || gguf_fits_half(value.detach().to(at::kCPU, at::kFloat))) ? "F16" : "F32");
    if (!tensor.type) throw std::logic_error("gguf_model_bytes: " + why);
    tensors.push_back(std::move(tensor));
  }
  if (config.rope.scaling == "llama3") tensors.push_back(gguf_rope_factors(config.rope, config.head_dim));
  Metadata metadata = gguf_metadata(config, shape.name);
  metadata.emplace_back("general.file_type", GgufValue::uint32(0));
  metadata.insert(metadata.end(), shape.gguf_tokenizer.begin(), shape.gguf_tokenizer.end());
  return gguf_file_bytes(metadata, tensors);
}

void write_gguf_model(const ExportRequest& request, const fs::path& folder) {
  const ModelConfig& config = request.model.config();
  std::vector<GgufTensor> tensors;
  for (const auto& [parameter, value] : request.model.parameters()) {
    const GgufName target = gguf_name(*config.family, parameter);
    const RopeShape rope = rope_shape(config, target.role);
    const auto found = request.quantized.find(ends_with(parameter, ".weight") ? parameter.substr(0, parameter.size() - 7) : parameter);
    if (found == request.quantized.end()) {
      at::Tensor plain = value.detach();
      if (rope.heads > 0) plain = permute_rope_rows(plain, rope.heads);
      if (config.family->norm_plus_one && target.role.find("norm") != std::string_view::npos) plain = plain + 1;
      tensors.push_back(gguf_float_tensor(target.name, plain));
      continue;
    }
    const auto& [spec, original] = found->second;
    Quantized values = original;
    if (rope.heads > 0) {  // groups run along the columns: codes and scales move with their rows
      values.codes = permute_rope_rows(values.codes, rope.heads);
      values.scales = permute_rope_rows(values.scales, rope.heads);
      if (values.offsets.defined()) values.offsets = permute_rope_rows(values.offsets, rope.heads);
    }
    std::string why;
    const GgmlType* type = exact_ggml_type(spec, values.codes.size(1), why);
    if (!type) throw std::logic_error("gguf export: " + why);
    tensors.push_back(gguf_tensor(target.name, type, values.codes.sizes().vec(), to_ggml_blocks(*type, spec, values)));
  }
  if (config.rope.scaling == "llama3") tensors.push_back(gguf_rope_factors(config.rope, config.head_dim));
  Metadata metadata = gguf_metadata(config, request.name);
  metadata.emplace_back("general.file_type", GgufValue::uint32(gguf_file_type(tensors)));
  metadata.insert(metadata.end(), request.gguf_tokenizer.begin(), request.gguf_tokenizer.end());
  write_gguf(folder / "model.gguf", metadata, tensors);
}

std::unique_ptr<Transformer> reopen_gguf(const fs::path& folder) { return load_model(folder / "model.gguf"); }

}  // namespace kompakt
