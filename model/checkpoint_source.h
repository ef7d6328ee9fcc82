// What a checkpoint file offers to the strict builder: for readers of further layouts (export/). Others use checkpoint.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "model/transformer.h"

namespace kompakt {

struct CheckpointSource {
  std::string place;
  // Hugging Face tensor name (without optional prefixes) -> reads the tensor, in the file's type.
  std::map<std::string, std::function<at::Tensor()>> tensors;
};

// Throws one Error that lists missing and unexpected names and wrong shapes; another that names weights with NaN or infinity.
// `place` gives every float32 parameter, by name and in the order of parameters(), the tensor that stands in its slot; empty = private memory.
std::unique_ptr<Transformer> build_from_source(ModelConfig config, const CheckpointSource& source, c10::Device device, const std::function<at::Tensor(const std::string& name, const at::Tensor& value)>& place = {});
std::pair<ModelConfig, CheckpointSource> open_checkpoint(const std::filesystem::path& path);
bool checkpoint_ignored(const Family& family, const std::string& name);
ModelConfig load_config_gguf(const std::filesystem::path& path);
std::pair<ModelConfig, CheckpointSource> open_checkpoint_gguf(const std::filesystem::path& path);

}  // namespace kompakt
