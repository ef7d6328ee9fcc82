// SparseGPT (Frantar and Alistarh 2023): a matrix is pruned column by column, what is left of a row makes up for every weight
// that goes; and the least-squares refit of any mask, which the sweep approximates.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "prune/masks.h"
#include "train/inverse_factor.h"

namespace kompakt {

// What matrices with the same input share.
struct InputMetric {
  at::Tensor hessian;  // [K,K] float32 E[x x^T]; the diagonal of inputs that never fire is 1
  at::Tensor dead;     // [K] bool: inputs that never fire; their weights cost nothing and become zero
  std::int64_t dead_count = 0;
  InverseFactor factor;  // of H + damping * mean(diag H)
};
// Error when the second moments are not finite. `factorize` false: only for a refit.
InputMetric input_metric(const at::Tensor& hessian, double damping, bool factorize = true);

struct SparseMatrix {
  at::Tensor weight;      // [N,K] float32, exactly zero outside of the mask
  at::Tensor mask;        // [N,K] bool, true = stays
  double sweep_loss = 0;  // sum of squared errors of the sweep: tr(E H E^T) of the damped H
};

// Blocks of `block` columns. Unstructured: of every block the share `sparsity` of lowest w^2 / U_jj^2 goes, all rows together,
// chosen when the block begins, on the compensated weights. n:m: chosen row by row when a group begins (the block is rounded to
// whole groups). Weights that are zero already stay zero and count. Equal scores: the lower row, then the lower column stays.
SparseMatrix sparsegpt(const at::Tensor& weight, const InputMetric& metric, const SparsityPattern& pattern, std::int64_t block = 128);

// The best weights on a given support: for every row the minimum of (v - w)(H + lambda)(v - w)^T over v that are zero where
// the mask is false, lambda = damping * mean(diag H). Per row a Cholesky of |S|^3 / 3. A row whose matrix does not factorize
// keeps its masked weights.
at::Tensor refit_support(const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& hessian, double damping);

}  // namespace kompakt
