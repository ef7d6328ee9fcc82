// What the report says of every quantized matrix.
#pragma once

#include <set>
#include <string>

#include "core/json.h"
#include "quantize/methods.h"
#include "train/calibration.h"

namespace kompakt {

// Name, format, shape, bits and relative squared error of the weights.
Json describe_layer(const std::string& name, const GridSpec& spec, const at::Tensor& weight, const Quantized& quantized);

// Adds to `row` what the calibration inputs tell. All errors are relative squared errors of the layer's outputs,
// tr(E H E^T) / tr(W H W^T), on a sample of rows:
//   output_error    of the result,
//   rounding_error  of rounding to nearest: what the method started from,
//   halves          |difference| of output_error on the two halves of the calibration set; absent with a single batch,
// and damping, path, dead_inputs, polish_gain as in LayerResult.
void describe_output(Json& row, const GridSpec& spec, const at::Tensor& weight, const LayerResult& result, const SecondMoments& moments);

// The halves differ by more than the method gained over rounding.
bool halves_disagree(const Json& row);

// What became zero in the sweep, in the form of the stage prune: pattern, weights, zeros, layers with their sparsity, dense ones.
Json sparsity_json(const Json& rows, const SparsityPattern& pattern, const std::set<std::string>& dense);

// Rows as lines for people: layer, format, errors, damping, seconds.
std::string layer_table(const Json& rows);

}  // namespace kompakt
