// Predicted arithmetic and memory of the methods that look at calibration text layer by layer, from shape and options alone. Trainings on
// the grid are predicted like any other (train/loop.h).
#pragma once

#include <cstdint>

#include "model/config.h"
#include "quantize/stage.h"

namespace kompakt {

struct QuantizeCost {
  double flops = 0;               // forward passes, moments, sweeps, token weights, block tuning, a budget's sensitivities
  std::int64_t memory_bytes = 0;  // model, codes, activations of the calibration set; without the teacher
};

// `windows` of calibration text (or training examples), `sequence` tokens each; as many of them as the options look at. 0 for methods
// without calibration. Fits of grids, which are no products, are not counted.
QuantizeCost predict_quantize_cost(const ModelConfig& config, const QuantizeOptions& options, std::int64_t windows, double sequence);

}  // namespace kompakt
