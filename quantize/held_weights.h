// Weights of a frozen model in fewer bits than float32, decoded when their layer runs: memory against a little time and precision.
// Only forward passes work on such a model: no training, no checkpoint.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/transformer.h"

namespace kompakt {

// How matrices are held; vectors (norms, biases) stay float32. Codes and scales are those of the grids in grids.h.
struct HeldPrecision {
  std::string_view name, summary;
  std::string_view linears;  // grid of the linears in blocks; empty: no grid
  std::string_view tables;   // grid of embedding and head; empty: no grid
  std::int64_t group;        // columns a scale of the linears; 0 = a row
  bool halves;               // without grids: bfloat16 instead of float32
};
std::span<const HeldPrecision> held_precisions();  // the first is float32
std::vector<std::string> held_precision_names();
// Error when there is none of that name.
const HeldPrecision& find_held_precision(std::string_view name);

// Bytes of weights, plus the largest matrix that is decoded at one time.
std::int64_t held_bytes(const ModelConfig& config, const HeldPrecision& precision);

// load_model on the CPU, matrix by matrix: the float32 model never exists as a whole. An embedding that is the head too is decoded as a
// whole where the head is asked for.
std::unique_ptr<Transformer> load_held_model(const std::filesystem::path& path, const HeldPrecision& precision);
// The same for a model that is in memory.
void hold_weights(Transformer& model, const HeldPrecision& precision);

}  // namespace kompakt
