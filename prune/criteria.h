// Importance of feed-forward neurons and attention heads: a table of criteria, each one function of model and data.
//
// A criterion only measures. What is removed, and how, is structured.h's.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "train/context.h"

namespace kompakt {

// One score per unit, float64 on the CPU; larger = more important. Scores of different layers are comparable only where the
// criterion says so.
struct UnitScores {
  std::vector<at::Tensor> ffn;    // [layers] of [f]
  std::vector<at::Tensor> heads;  // [layers] of [H] query heads
};

// Batches that importance and second moments are measured on, of the training examples or calibration windows. At most `batch_size` rows;
// of long windows fewer, so that the logits of a batch over a large vocabulary stay a few hundred megabytes. Every example counts by itself.
std::vector<TokenBatch> measuring_batches(const TaskData& data, std::int64_t samples, std::uint64_t seed, std::int64_t batch_size = 16);

struct Criterion {
  std::string_view name;
  std::string_view summary;
  bool needs_data;       // forward passes over `batches`
  bool needs_gradients;  // a model without weight transforms
  UnitScores (*measure)(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);
  // Of the channels of a decoder's residual stream, float64 [d] on the CPU (prune/channels.h); null: the criterion has none.
  at::Tensor (*channels)(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);
};
std::span<const Criterion> criteria();
const Criterion* find_criterion(std::string_view name);
std::vector<std::string> criterion_names();
std::vector<std::string> channel_criterion_names();  // those that measure channels

// Error where the criterion needs the loss of predictions that a model of this shape does not make.
void check_criterion_loss(const Criterion& criterion, const ModelConfig& config);

// Runs a row after checking what it needs: Error where the model has weight transforms or there is no data.
UnitScores measure_units(const Criterion& criterion, Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);

// Importance of every channel of the residual stream [d], after the same checks.
at::Tensor measure_channels(const Criterion& criterion, Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);

// Loss of every sequence on its own [B]: cross entropy with the class, or the mean over its next tokens.
at::Tensor example_losses(const at::Tensor& logits, const TokenBatch& batch);
// [B,T] true where a token is no padding.
at::Tensor valid_tokens(const ModelInput& input);

// Block influence (ShortGPT): 1 - mean over valid tokens of the cosine between a layer's input and output.
std::vector<double> block_influence(const Transformer& model, const std::vector<TokenBatch>& batches);

}  // namespace kompakt
