// Table of exporters: how a model is written for deployment, and how the written files are read back to prove it.
//
// An exporter is lossless for the deploy grid: it repacks codes and scales that quantization has chosen, and never rounds.
#pragma once

#include <filesystem>
#include <functional>
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

// What decides the size of an artifact before its weights are known.
struct ArtifactShape {
  const Transformer& model;  // weights as they are now, or shapes alone (meta)
  const std::map<std::string, GridSpec>& plan;
  std::string name;
  bool halves;               // what has no grid will be half-precision values
  const std::vector<std::pair<std::string, GgufValue>>& gguf_tokenizer;
  // Parameters without a grid that will have values which half precision does not hold, whatever they have now; empty = none.
  std::function<bool(const std::string& parameter)> whole = {};
  bool stays_whole(const std::string& parameter) const { return whole && whole(parameter); }
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
  // Whether rows of a length can be stored on a grid; `why` says why not.
  bool (*holds)(const GridSpec& spec, std::int64_t columns, std::string& why);
  // Sizes, for allocation under a byte budget; null where a grid saves no bytes. The file's does not count tokenizer files that
  // lie beside it; the sum over tensors differs from it by a constant, give or take a few bytes of offsets in a header.
  std::int64_t (*tensor_bytes)(const GridSpec& spec, std::int64_t rows, std::int64_t columns);
  std::int64_t (*file_bytes)(const ArtifactShape& shape);
  std::span<const std::string_view> budget_formats;  // grids to choose among when the recipe names none
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
std::int64_t packed_tensor_bytes(const GridSpec& spec, std::int64_t rows, std::int64_t columns);
std::int64_t packed_file_bytes(const ArtifactShape& shape);
void write_packed(const ExportRequest& request, const std::filesystem::path& folder);
std::unique_ptr<Transformer> reopen_packed(const std::filesystem::path& folder);
std::vector<std::string> plain_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>& plan);
void write_plain(const ExportRequest& request, const std::filesystem::path& folder);
std::unique_ptr<Transformer> reopen_plain(const std::filesystem::path& folder);
std::vector<std::string> gguf_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>& plan);
bool gguf_holds(const GridSpec& spec, std::int64_t columns, std::string& why);
std::int64_t gguf_tensor_bytes(const GridSpec& spec, std::int64_t rows, std::int64_t columns);
std::int64_t gguf_model_bytes(const ArtifactShape& shape);
void write_gguf_model(const ExportRequest& request, const std::filesystem::path& folder);
std::unique_ptr<Transformer> reopen_gguf(const std::filesystem::path& folder);
std::vector<std::string> compressed_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>& plan);
bool compressed_holds(const GridSpec& spec, std::int64_t columns, std::string& why);
bool is_compressed(const std::filesystem::path& folder);
void write_compressed(const ExportRequest& request, const std::filesystem::path& folder);
std::unique_ptr<Transformer> reopen_compressed(const std::filesystem::path& folder);
// One sentence where activations, keys or values are rounded: other programs read `format` and would compute without it.
std::vector<std::string> rounding_obstacles(const ModelConfig& config, std::string_view format);

}  // namespace kompakt
