// safetensors: strict memory-mapped reader and deterministic writer (docs: github.com/huggingface/safetensors).
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "formats/tensor_data.h"

namespace kompakt {

// One file, or a folder with model.safetensors or model.safetensors.index.json and its shards.
class SafetensorsFile {
 public:
  // Refuses, with file and tensor named: short or oversized header, bad JSON, unknown dtype, offsets reversed, overlapping,
  // with holes or past the end, size overflow, duplicate names, trailing bytes, a tensor in two shards, one that the index misses.
  static SafetensorsFile open(const std::filesystem::path& file_or_folder);
  const std::vector<TensorData>& tensors() const { return tensors_; }  // sorted by name; bytes lie in the memory map
  const TensorData* find(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  std::vector<TensorData> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Sorted by dtype alignment (descending), then name; header padded so that data starts 8-aligned. Equal input, equal bytes.
void write_safetensors(const std::filesystem::path& file, std::vector<TensorData> tensors, const std::map<std::string, std::string>& metadata = {});
// Size of the file that write_safetensors would write; only the sizes of `bytes` count, not what they point to.
std::int64_t safetensors_file_bytes(std::vector<TensorData> tensors, const std::map<std::string, std::string>& metadata = {});
// model.safetensors, or model-0000i-of-0000n.safetensors with model.safetensors.index.json when larger than `shard_bytes`.
void write_safetensors_sharded(const std::filesystem::path& folder, std::vector<TensorData> tensors, std::int64_t shard_bytes,
                               const std::map<std::string, std::string>& metadata = {});

}  // namespace kompakt
