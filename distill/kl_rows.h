// Forward KL of whole rows of logits in one pass of the processor's caches: no log-probabilities of all positions, no temporaries.
#pragma once

#include <ATen/core/Tensor.h>

#include "distill/losses.h"

namespace kompakt {

// One term, forward KL at temperature 1, on float32 or float64 of the CPU: what evaluate_kl_rows() computes.
bool fits_kl_rows(std::span<const LogitTerm> terms, const at::Tensor& logits);
// Equal to evaluate_terms() but for rounding. student, teacher [n, V], contiguous, are overwritten: with `gradient` the student's logits by
// the gradient times `scale`, which the result holds too.
LogitSums evaluate_kl_rows(const LogitTerm& term, at::Tensor student, at::Tensor teacher, std::int64_t vocabulary, bool gradient, double scale);

}  // namespace kompakt
