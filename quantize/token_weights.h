// How much a calibration token counts for a linear layer. All the same is what GPTQ minimises: the error of the outputs, summed
// over tokens. Weighted by the squared norm of the loss's gradient with respect to the layer's outputs there (Fisher information;
// GuidedQuant, Kim et al. 2025, with one group of outputs a layer), tokens whose outputs hardly change the predictions, such as
// the first of a text with its enormous activations, no longer decide about the codes. But these squares have heavy tails: 16,384
// tokens of a 135M-parameter decoder were worth as few as 33 for one of its layers. The norm itself lies between.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "train/calibration.h"
#include "train/context.h"

namespace kompakt {

struct TokenWeightRow {
  std::string_view name, summary;
  double exponent;  // of the squared norm; 0 = needs no gradient
};
const TokenWeightRow* find_token_weights(std::string_view name);
std::vector<std::string> token_weight_names();

// Of every linear in blocks by name: per batch of the set, [real tokens] float32, with mean 1 over all tokens (all 1 where no
// gradient arrives).
using TokenWeights = std::map<std::string, std::vector<at::Tensor>>;

// Of every block: [d,d] float32, the second moment of the gradient's directions at the block's output, tokens counted as in the weights
// (sum of |g|^2p u u^T for the exponent p and directions u = g / |g|), scaled to the trace d. A squared error e of a token costs the
// predictions about e^T M e: the factor of the outputs in a Kronecker-factored Fisher matrix (Martens and Grosse 2015), which does not
// depend on the basis of the residual stream. Directions that later layers do not read cost nothing.
using OutputMetrics = std::vector<at::Tensor>;

// Of a pass that takes long: what it has so far, on disk, so that a killed run goes on behind the last batches that were saved, to the same bits.
struct WeighingRecord {
  const StageContext& context;     // the title of the progress bar; an earlier part is taken over where the stage resumes
  std::filesystem::path file;
  std::string identity;            // what the numbers depend on: another one's part is left alone
  std::chrono::seconds interval{30};  // between two times that it is written
};

// For labels drawn from the model's own predictions. One forward and one backward pass through every block, batches beside each
// other; memory: tokens of a batch x hidden x layers floats a thread. The same bits for any number of threads. `model` holds its
// float weights; a decoder or a classifier. `bf16`: passes through the blocks under autocast, with 2 bytes a weight more. Error where a gradient
// is not finite. `metrics`, where given, are made by the same pass: five times their memory while it runs, and at most four batches beside
// each other. `record`: null = no bar, and a kill costs the pass.
TokenWeights token_weights(Transformer& model, const CalibrationSet& set, const TokenWeightRow& row, std::uint64_t seed, OutputMetrics* metrics = nullptr, bool bf16 = false,
                           const WeighingRecord* record = nullptr);

// The same, kept for runs that go on or have other options (train/measurement.h). 4 bytes a token and linear on disk.
TokenWeights kept_token_weights(Transformer& model, const CalibrationSet& set, const TokenWeightRow& row, const StageContext& context, OutputMetrics* metrics = nullptr, bool bf16 = false);

// Tokens that would have the same sampling error with equal weights: (sum w)^2 / sum w^2.
double effective_tokens(const std::vector<at::Tensor>& weights);

}  // namespace kompakt
