// Output projection and logit losses in one: hidden states x head weight -> loss, in chunks of tokens, so that the logits of
// all tokens never exist at once, on neither side, and no tensor of tokens x vocabulary outlives its chunk.
//
// Gradients are computed in the forward pass (the loss is a scalar: backward only multiplies), as Liger's fused losses do.
// Works with every row of logit_losses(); a sum of several shares the products and the log-probabilities. Extra memory: up
// to 11 chunk x V floats (adaptive_kl, which sorts: 17) plus one gradient of the head weight; 2 chunk x V where rows are computed in place
// (forward KL at temperature 1 on the CPU; on CUDA devices, with the kernels compiled in, every sum of losses that row_terms() takes).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "distill/losses.h"
#include "distill/sparse_losses.h"

namespace kompakt {

// Where the teacher's distribution comes from: logits that are there already, hidden states and head like the student's, or the
// likeliest tokens of a cache.
struct FusedTeacher {
  at::Tensor logits;                // [n, V]; when defined the rest is ignored
  at::Tensor hidden, weight, bias;  // [n, d_t], [V, d_t], [V] or undefined
  const SparseTargets* sparse = nullptr;  // [n, ..]; used when the others are undefined
};

// hidden [n, d], weight [V, d], bias [V] or undefined; frame.mask [n]. Equal to logit_terms(terms, linear(hidden, weight, bias), ...).
// Differentiable (first order) in hidden, weight and bias. Under autocast the products run in the autocast type, the loss and
// the accumulated weight gradient in float32. chunk = 0: as many tokens as logit_chunk() says.
LogitMeans fused_linear_terms(std::span<const LogitTerm> terms, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const FusedTeacher& teacher,
                              const LogitLossOptions& frame = {}, std::int64_t chunk = 0);
at::Tensor fused_linear_loss(const LogitLoss& loss, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const FusedTeacher& teacher,
                             const LogitLossOptions& options = {}, std::int64_t chunk = 0);
// The same frame around a loss that is no row of the table: sums over n positions from logits of the student [n, V] and of the teacher
// [n, V_t], whose vocabularies may differ. `values` [2]: the loss, and whatever else is to be averaged. `total` is values[0].
using PositionLoss = std::function<LogitSums(const at::Tensor& student, const at::Tensor& teacher, bool gradient)>;
LogitMeans fused_position_loss(const PositionLoss& loss, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const FusedTeacher& teacher);
// The type of the matrix products: what autocast would choose, else the type of the hidden states.
at::ScalarType fused_product_type(const at::Tensor& hidden);

}  // namespace kompakt
