// Taking neurons and heads out of a model, with an optional refit of the weights that read what is left.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "data/batches.h"
#include "model/transformer.h"
#include "prune/criteria.h"

namespace kompakt {

// Units that stay in one layer, rising. Heads are query heads; key/value heads must serve equally many of them.
struct KeptUnits {
  std::vector<std::int64_t> ffn, heads, kv_heads;
};

// How many heads stay. Whole key/value groups go when that meets the share, else equally many query heads of every group.
struct HeadPlan {
  std::int64_t heads = 0, kv_heads = 0;
};
// Error with the nearest valid shares when `share` stands for no whole number of heads (a share is met within 0.005, so
// that 0.67 means two thirds).
HeadPlan plan_heads(std::int64_t heads, std::int64_t kv_heads, double share);
// What a width counts, for messages.
struct WidthWords {
  const char *key, *unit, *plural;
};
constexpr WidthWords ffn_words = {"structured.ffn", "feed-forward neuron", "neurons"}, hidden_words = {"structured.hidden", "channel of the residual stream", "channels"};
// round(share * width / multiple) * multiple. Error when that leaves nothing or removes nothing.
std::int64_t plan_width(std::int64_t width, double share, std::int64_t multiple, const WidthWords& words = ffn_words);

// The best `width` neurons and the heads of the plan by score; a key/value group's score is the sum over its heads.
// Ties: the lower number stays. Equal counts in every layer, so that the result has a standard shape.
std::vector<KeptUnits> choose_units(const Transformer& model, const UnitScores& scores, std::int64_t width, const HeadPlan& heads);

// Removes everything but `kept` (one entry a layer) and updates the config. Keeping all units changes no byte.
// std::logic_error while a weight transform is attached or when layers would differ in shape.
void cut_units(Transformer& model, const std::vector<KeptUnits>& kept);

// Removes everything but the channels `kept` (rising) of the residual stream: columns of the embedding and of all that reads the
// stream, rows of all that writes it, places of the norms; the config follows. Where the family scales its embedding by
// sqrt(hidden), embedding and final norm make up for the other factor. Gains stay: prune/stream_refit.h fits them to the mean over
// fewer channels. Keeping all changes no byte. std::logic_error for an encoder or while a weight transform is attached.
void cut_hidden(Transformer& model, const std::vector<std::int64_t>& kept);

// Least-squares refit of one linear whose inputs are cut to `kept`: minimises over W' and b'
//   E|W x + b - W' x_S - b'|^2 + lambda |W' - W_S|^2,   lambda = ridge * mean diag Cov(x_S),
// with the second moment in place of the covariance when there is no bias. W' = W_S + W_P C_PS (C_SS + lambda)^-1.
// `second` [K,K] mean of x x', `mean` [K]; float64. Returns W' [N,|S|] and b' (undefined without bias), float32.
struct Refit {
  at::Tensor weight, bias;
};
Refit refit_linear(const Linear& linear, const std::vector<std::int64_t>& kept, const at::Tensor& second, const at::Tensor& mean, double ridge = 1e-2);

// Refits down and output projections of every layer to `kept` from activations of the uncut model, then cuts.
void cut_units_with_refit(Transformer& model, const std::vector<KeptUnits>& kept, const std::vector<TokenBatch>& batches, double ridge = 1e-2);

}  // namespace kompakt
