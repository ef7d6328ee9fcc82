// The state of a training run on disk: everything that a killed run needs to go on as if nothing had happened.
// One safetensors file with the JSON part in its metadata, so that tensors and counters can never be of different steps.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"

namespace kompakt {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// Writes tensors (borrowed, any device) and `json` atomically.
void save_state(const std::filesystem::path& file, const NamedTensors& tensors, const Json& json);

// The JSON part alone; null when the file does not exist.
Json read_state_json(const std::filesystem::path& file);

// Copies the file's tensors into `tensors` (in place). Names, shapes and types must agree exactly, else Error.
void load_state(const std::filesystem::path& file, const NamedTensors& tensors);

// `identity` describes what a state belongs to (options, data, model, seed). Throws Error that lists every difference by key.
void check_identity(const Json& saved, const Json& wanted, const std::filesystem::path& file);

}  // namespace kompakt
