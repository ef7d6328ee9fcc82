// How much the model's predictions diverge when one matrix alone is stored in a format: estimated for every matrix and format
// from one backward pass, by token-wise Fisher information.
//
//   KL(l, format) ~ 1/2 mean over predictions of the sum over tokens of (g_t^T E x_t)^2        (decoders)
//   KL(l, format) ~ 1/2 mean over texts of (the sum over tokens of g_t^T E x_t)^2               (classifiers)
//
// x_t: input of the matrix at token t; g_t: gradient of -log p(label) with respect to its output, labels sampled from the
// model itself; E = W - decode(encode(W)). The second-order expansion of the divergence with the Fisher matrix in place of the
// Hessian; of decoders without the terms between different tokens. A token embedding contributes g_t . E[id_t], a head tied to it
// contributes too: one matrix, stored once, whose costs add up.
//
// Memory: the inputs of all blocks for the calibration tokens (tokens x hidden x layers floats) and what the backward pass
// through a single block needs; blocks are run again one by one from the last to the first.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "quantize/grids.h"
#include "train/calibration.h"

namespace kompakt {

// E [N,K] of `weight` in a format. `inputs` [n,K]: inputs of the matrix to fit it on; undefined for embeddings and heads, and then
// `weight` may be a part of the rows.
using ErrorOf = std::function<at::Tensor(const at::Tensor& weight, const GridSpec& spec, const at::Tensor& inputs)>;
// By the grid's own fit, weighted with the mean square of the inputs.
at::Tensor rounding_error(const at::Tensor& weight, const GridSpec& spec, const at::Tensor& inputs);

struct SensitivityRequest {
  std::map<std::string, std::vector<GridSpec>> formats;  // by matrix name; others are not looked at
  ErrorOf error = rounding_error;
  // Where given: what the method's own compensation makes of the output error of a matrix with these inputs [n,K] (compensation.h). Divergences
  // are multiplied by it; of a tied embedding the output's part alone.
  std::function<double(const std::string& name, const at::Tensor& inputs)> reduction;
  bool split = false;  // errors are fitted on the first half of the batches and scored on the second (for methods that use data)
  bool bf16 = false;   // passes through the blocks under autocast; the head stays float32. For visits: not with formats
  std::uint64_t seed = 0;
  std::function<void(std::int64_t done)> progress;  // matrices
  // Sees every linear of the blocks, from the last block to the first: inputs [n,K] and gradients of the outputs [n,N] of the real
  // tokens, a tensor a batch.
  std::function<void(const Linear& linear, const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& gradients)> visit;
  // Sees every block before its linears: gradients of its output [n,d] of the real tokens, a tensor a batch.
  std::function<void(std::int64_t layer, const std::vector<at::Tensor>& gradients)> visit_block;
};

struct TensorSensitivity {
  std::vector<double> divergence;      // nats a prediction, per format
  std::vector<double> relative_error;  // |E|^2 / |W|^2 (of an untied embedding: of the rows that occur)
  // [N] float64, CPU: mean over tokens of g_r^2 |x|^2, what noise in a row costs. Of linears alone: every token has a word about each of
  // their rows, while most rows of an embedding are never seen.
  at::Tensor row_importance;
};

// Decoders (a prediction is a token) and classifiers (a prediction is a text). The model's weights are read only; gradients of
// parameters are switched off. std::logic_error when `formats` names a matrix that the model does not have.
std::map<std::string, TensorSensitivity> measure_sensitivities(Transformer& model, const CalibrationSet& set, const SensitivityRequest& request);

// The set in batches of at most `tokens` tokens (at least one row each), for passes with gradients.
CalibrationSet smaller_batches(const CalibrationSet& set, std::int64_t tokens);

}  // namespace kompakt
