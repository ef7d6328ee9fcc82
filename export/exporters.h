// Table of exporters: how a model is written for deployment, and how the written files are read back to prove it.
//
// An exporter is lossless for the deploy grid: it repacks codes and scales that quantization has chosen, and never rounds.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/json.h"
#include "formats/gguf.h"
#include "model/transformer.h"
#include "quantize/grids.h"

namespace kompakt {

struct ExportRequest {
  const Transformer& model;           // decoded weights: what the artifact must reproduce
  const QuantizedTensors& quantized;  // codes and scales; tensors that are absent here stay in float
  std::string name;                   // of the run, for metadata
  std::vector<std::pair<std::string, GgufValue>> gguf_tokenizer;  // tokenizer.* keys, for GGUF
};

struct Exporter {
  std::string_view name;     // as in a recipe's formats
  std::string_view summary;
  bool needs_gguf_tokenizer;
  // Why this model cannot be written in this format; one Error-ready sentence per obstacle, empty when it can.
  std::vector<std::string> (*obstacles)(const ModelConfig& config, const std::map<std::string, GridSpec>& plan);
  // Writes into an existing empty folder. Deterministic: equal input, equal bytes.
  void (*write)(const ExportRequest& request, const std::filesystem::path& folder);
  // A reader of its own that shares no state with the writer. Weights come back as float32.
  std::unique_ptr<Transformer> (*reopen)(const std::filesystem::path& folder);
};

std::span<const Exporter> exporters();
const Exporter* find_exporter(std::string_view name);
std::vector<std::string> exporter_names();

// Reads whatever an exporter wrote, or a plain checkpoint: packed folder, Hugging Face folder, .gguf file.
std::unique_ptr<Transformer> open_any_model(const std::filesystem::path& path);
// Grid of every quantized tensor of a packed artifact; empty for others.
std::map<std::string, GridSpec> packed_grids(const std::filesystem::path& folder);
bool is_packed(const std::filesystem::path& folder);

// The rows' functions, one file each.
std::vector<std::string> packed_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>& plan);
void write_packed(const ExportRequest& request, const std::filesystem::path& folder);
std::unique_ptr<Transformer> reopen_packed(const std::filesystem::path& folder);
std::vector<std::string> plain_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>& plan);
void write_plain(const ExportRequest& request, const std::filesystem::path& folder);
std::unique_ptr<Transformer> reopen_plain(const std::filesystem::path& folder);
std::vector<std::string> gguf_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>& plan);
void write_gguf_model(const ExportRequest& request, const std::filesystem::path& folder);
std::unique_ptr<Transformer> reopen_gguf(const std::filesystem::path& folder);

}  // namespace kompakt
