// Log-probabilities of given tokens straight from hidden states: no tensor of tokens x vocabulary outlives its chunk.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace kompakt {

// log softmax(hidden weight' + bias)[token] of each row. hidden [n,d], weight [V,d], bias [V] or undefined, tokens [n] int64 -> [n] float32
// (float64 stays). Differentiable (first order) in hidden, weight and bias; the backward pass computes the logits of each chunk again.
// Under autocast the products run in its type. chunk = 0: as for the fused losses.
at::Tensor token_log_probs(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& tokens, std::int64_t chunk = 0);

}  // namespace kompakt
