#include "export/exporters.h"

#include <array>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "model/rounding.h"

namespace kompakt {
namespace fs = std::filesystem;

namespace {

constexpr std::string_view packed_formats[] = {"ecq1_5", "ecq2", "ecq2_5", "ecq3", "ecq3_5", "ecq4", "ecq5", "ecq6", "int8"};
constexpr std::string_view gguf_formats[] = {"tq1_0", "tq2_0", "q2_0", "q2_k", "q3_k", "iq4_xs", "q4_0", "q4_k", "iq4_nl", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0"};

bool holds_anything(const GridSpec&, std::int64_t, std::string&) { return true; }

}  // namespace

std::span<const Exporter> exporters() {
  static constexpr std::array<Exporter, 4> rows = {{
      {"kompakt", "packed folder: codes and scales of every grid in one safetensors file, read by kompakt itself", false, packed_obstacles, write_packed, reopen_packed, holds_anything,
       packed_tensor_bytes, packed_file_bytes, packed_formats},
      {"gguf", "GGUF v3 file for llama.cpp and its relatives (decoders)", true, gguf_obstacles, write_gguf_model, reopen_gguf, gguf_holds, gguf_tensor_bytes, gguf_model_bytes, gguf_formats},
      {"safetensors", "plain Hugging Face folder with the decoded weights: loads everywhere, saves no bytes", false, plain_obstacles, write_plain, reopen_plain, holds_anything, nullptr, nullptr, {}},
      {"compressed-tensors", "Hugging Face folder for vLLM and transformers: weights as integers or FP8, with the scales of activations and of the key/value cache", false, compressed_obstacles, write_compressed,
       reopen_compressed, compressed_holds, nullptr, nullptr, {}},
  }};
  return rows;
}

const Exporter* find_exporter(std::string_view name) {
  for (const Exporter& row : exporters())
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> exporter_names() {
  std::vector<std::string> names;
  for (const Exporter& row : exporters()) names.emplace_back(row.name);
  return names;
}

bool is_packed(const fs::path& folder) {
  if (!fs::is_directory(folder) || !fs::exists(folder / "config.json")) return false;
  const Json config = read_json(folder / "config.json");
  return config.contains("kompakt") && config.at("kompakt").contains("packed");
}

std::unique_ptr<Transformer> open_any_model(const fs::path& path) {
  if (!fs::exists(path)) throw Error("there is no model").at(path.string()).hint("give a folder with config.json and safetensors, an artifact, or a .gguf file");
  if (is_packed(path)) return reopen_packed(path);
  if (is_compressed(path)) return reopen_compressed(path);
  if (fs::is_directory(path) && !fs::exists(path / "config.json") && fs::exists(path / "model.gguf")) return load_model(path / "model.gguf");
  return load_model(path);
}

std::vector<std::string> rounding_obstacles(const ModelConfig& config, std::string_view format) {
  const RuntimeRounding rounding = rounding_of(config);
  if (rounding.empty()) return {};
  return {str("the format has no place for rounded ", rounding.activations ? rounding.kv_cache ? "activations, keys and values (quantize.activations, quantize.kv_cache)" : "activations (quantize.activations)" : "keys and values (quantize.kv_cache)",
              ", and whoever reads ", format, " would compute without; formats compressed-tensors and kompakt have one")};
}

std::vector<std::string> plain_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>&) {
  if (config.sub_norms) return {"no other program knows the model's sub-norms (quantize.subln), and would compute without them (take format kompakt)"};
  return rounding_obstacles(config, "safetensors");
}

void write_plain(const ExportRequest& request, const fs::path& folder) { save_model(request.model, folder); }

std::unique_ptr<Transformer> reopen_plain(const fs::path& folder) { return load_model(folder); }

}  // namespace kompakt
