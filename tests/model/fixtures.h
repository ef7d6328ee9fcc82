// Shared by the tests of model/: tiny configs of every family and the golden models written by scripts/make_goldens_model.py.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/transformer.h"

namespace kompakt::testing {

// A small config of a family: 3 layers (4 for SmolLM3), hidden 32, 4 heads of 8, 2 key/value heads for decoders, vocabulary 67.
ModelConfig tiny_config(const std::string& family);

struct GoldenModel {
  Json config;
  at::Tensor ids, lengths, output;
};
// Splits tests/goldens/model_<name>.safetensors into a loadable folder and the values of transformers.
GoldenModel open_golden(const std::string& name, const std::filesystem::path& folder);
std::vector<std::string> golden_names();

// Fills every parameter with values that make each of them matter (also biases and norms).
void randomize(Transformer& model, std::uint64_t seed);
at::Tensor random_ids(std::int64_t rows, std::int64_t length, std::int64_t vocab, std::uint64_t seed);
// max |a - b| / max |b|
double relative_error(const at::Tensor& a, const at::Tensor& b);

}  // namespace kompakt::testing
