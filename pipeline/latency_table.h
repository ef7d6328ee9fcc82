// Times of matrix products on one device, by shape: what a search under a latency or energy budget reads.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "core/json.h"
#include "model/config.h"

namespace kompakt {

// Products are those of float32 weights, as kompakt computes them: formats of weights do not change them.
struct LatencyTable {
  std::string processor;
  int threads = 1;
  std::int64_t tokens = 1;                                     // of the forward pass
  std::map<std::pair<std::int64_t, std::int64_t>, double> us;  // (rows, columns) of a weight -> microseconds of its product
  double layer_us = 0;                                         // of everything else in a layer
  std::optional<double> watts;                                 // mean power while measuring, where the machine tells it

  // Of one forward pass of a shape, milliseconds. A matrix that was not measured: from its weights, by the least-squares line
  // through those that were.
  double milliseconds(const ModelConfig& config) const;
};

// Shapes are those of the model's layers at its widths and at eighths of them, and of its head at `tokens` tokens. Median of runs.
LatencyTable measure_latency_table(const ModelConfig& config, std::int64_t tokens);
Json to_json(const LatencyTable& table);
LatencyTable read_latency_table(const std::filesystem::path& file);

}  // namespace kompakt
