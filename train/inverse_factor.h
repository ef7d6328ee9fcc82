// The Cholesky factor of the inverse of a second moment, on which GPTQ, SparseGPT and their relatives run.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace kompakt {

// U upper triangular with H^-1 = U^T U, [K,K] in the type of `hessian`; undefined when the factorization fails.
at::Tensor inverse_factor(const at::Tensor& hessian);

struct InverseFactor {
  at::Tensor upper;     // U [K,K]; undefined = only the diagonal of H is used
  at::Tensor diagonal;  // [K] of U
  double damping = 0;   // share of mean(diag H) that it needed
  std::string path;     // how it was found, for the report
};

// Of H + damping * mean(diag H). Damping is raised tenfold up to three times, then float64 is tried, then only the diagonal is used.
InverseFactor damped_inverse_factor(const at::Tensor& hessian, double damping, bool float64);

}  // namespace kompakt
