// Tuning of one block by gradients (SignRound, Cheng et al. 2024, carried over to every grid): the roundings and scales of all
// linears of a block are changed together so that the block's output comes closer to that of the float model.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "core/fields.h"
#include "quantize/stage.h"
#include "train/calibration.h"

namespace kompakt {

// What flows into one block and what should come out, by the number of a batch of the calibration set: [B,T,d]. Asked for batch
// by batch, since they may lie on disk.
struct BlockActivations {
  std::function<at::Tensor(std::size_t)> input;   // behind the quantized blocks before
  std::function<at::Tensor(std::size_t)> target;  // output of the float block for the float model's input
  // How much a token's squared error counts: by batch, [real tokens], mean 1 (quantize/token_weights.h); null = all the same.
  const std::vector<at::Tensor>* weights = nullptr;
  // [d,d], symmetric: a token's error e counts as e^T M e instead of e^T e (quantize/token_weights.h); undefined = the identity.
  at::Tensor metric;
};

struct BlockTuneResult {
  double before = 0, after = 0;  // mean squared error of the block's output over the whole calibration set; after <= before
  std::int64_t best_iteration = 0;
  bool bf16 = false;  // whether the passes that learned ran under autocast
};

// `quantized`: codes and scales of the block's linears by name, replaced by better ones; linears without an entry, or on a grid of
// uneven levels, stay as they are. `original`: the float block's parameters by name (block_parameters). Afterwards the model's block holds the decoded weights. Latents lie within 0.5 of where
// they start; sign descent with a rate that falls to zero; the best codes by the loss over all of `set` are kept, the start
// included. The same bytes for every number of threads. Memory: about six times the weights of the block.
BlockTuneResult tune_block(Transformer& model, std::int64_t layer, const CalibrationSet& set, const BlockActivations& activations, const std::map<std::string, at::Tensor>& original,
                           const QuantizationPlan& plan, const BlockTuneOptions& options, std::uint64_t seed, std::map<std::string, Quantized>& quantized);

}  // namespace kompakt
