// Checkpoints on disk to a Transformer and back. Strict both ways: missing and unexpected names are listed together.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "formats/tensor_data.h"
#include "model/transformer.h"

namespace kompakt {

// `path`: a folder (config.json + safetensors) or a .gguf file. Weights become float32. NaN or infinity in a weight is an
// Error that names the tensor. A vocabulary that does not fit the tokenizer is checked by the caller.
std::unique_ptr<Transformer> load_model(const std::filesystem::path& path, c10::Device device = c10::Device(c10::kCPU));
ModelConfig load_config(const std::filesystem::path& path);  // the shape alone; reads no weights
// config.json + model.safetensors (float32, or bf16/f16 when asked), deterministic. Tokenizer files are the caller's.
void save_model(const Transformer& model, const std::filesystem::path& folder, c10::ScalarType dtype = c10::ScalarType::Float);

// Torch tensor <-> bytes. `as_tensor` borrows the memory (keeps owner alive) when the type fits, else converts.
at::Tensor as_tensor(const TensorData& data);
TensorData as_data(std::string name, const at::Tensor& tensor);  // contiguous CPU copy

// SHA-256 over names, shapes and float32 bytes of all parameters: equal for equal weights, whatever file they came from.
std::string fingerprint(const Transformer& model);
// The same of load_model(path), with one tensor in memory at a time.
std::string fingerprint(const std::filesystem::path& path);

}  // namespace kompakt
