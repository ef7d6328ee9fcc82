// Output projection and logit loss in one: hidden states x head weight -> loss, in chunks of tokens, so that the logits of
// all tokens never exist at once and no tensor of tokens x vocabulary outlives its chunk.
//
// Gradients are computed in the forward pass (the loss is a scalar: backward only multiplies), as Liger's fused losses do.
// Works with every row of logit_losses(). Extra memory: about 5 chunk x V floats plus one gradient of the head weight.
#pragma once

#include <ATen/core/Tensor.h>

#include "distill/losses.h"

namespace kompakt {

// Where the teacher's logits come from: given [n, V], or hidden states and head like the student's.
struct FusedTeacher {
  at::Tensor logits;                // [n, V]; when defined the rest is ignored
  at::Tensor hidden, weight, bias;  // [n, d_t], [V, d_t], [V] or undefined
};

// hidden [n, d], weight [V, d], bias [V] or undefined; options.mask [n]. Equal to logit_loss(linear(hidden, weight, bias), ...).
// Differentiable (first order) in hidden, weight and bias. Under autocast the products run in the autocast type, the loss and
// the accumulated weight gradient in float32. chunk = 0: chosen so that chunk x V x 4 bytes stay near 32 MiB.
at::Tensor fused_linear_loss(const LogitLoss& loss, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const FusedTeacher& teacher,
                             const LogitLossOptions& options = {}, std::int64_t chunk = 0);
std::int64_t fused_chunk(std::int64_t vocabulary);  // the automatic choice

}  // namespace kompakt
