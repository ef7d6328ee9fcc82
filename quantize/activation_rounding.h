// The part of the stage `quantize` that is not about weights: which inputs of linears and which keys and values are rounded, and
// the scales of those that are static, from the quantized model block by block.
#pragma once

#include <map>
#include <string>

#include "core/error.h"
#include "model/rounding.h"
#include "quantize/stage.h"
#include "train/context.h"

namespace kompakt {

// Combinations of activations, kv_cache and model that cannot be.
void check_activations(const ModelConfig& config, const QuantizeOptions& options, Problems& problems);

// The rounding of a model whose linears `plan` quantizes, before calibration: static scales are 1. For `plan` of the command line
// and for exporters, which ask what an artifact would have to hold.
RuntimeRounding planned_rounding(const ModelConfig& config, const QuantizeOptions& options, const std::map<std::string, GridSpec>& plan);

// Puts dynamic rounding of activations in place, so that what trains on the grid trains under it. Nothing without it.
void round_while_training(Transformer& model, const QuantizeOptions& options, const std::map<std::string, GridSpec>& plan);

// Rounding as it will be deployed, and context.details["activations"] and ["kv_cache"]. `model` holds its final weights. Static
// scales are found block by block on the calibration set: those of a block from what flows into its linears behind blocks that
// round already. Error for values that are not finite, and for a scale of zero.
void round_activations(Transformer& model, const QuantizeOptions& options, const std::map<std::string, GridSpec>& plan, StageContext& context);

}  // namespace kompakt
