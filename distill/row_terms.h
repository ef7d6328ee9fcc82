// A sum of logit losses as the kernels of train/row_losses.h take it.
#pragma once

#include <optional>

#include "distill/losses.h"

namespace kompakt {

// Nothing where a loss of the sum has no such form (adaptive_kl and ranking sort), or where there are more than rows::most_terms. `scale`:
// factor of the gradient.
std::optional<rows::RowTerms> row_terms(std::span<const LogitTerm> terms, double scale);
// Equal to evaluate_terms() but for rounding. student, teacher [n, V] of one type as divergence_rows() takes them; with `gradient`
// the student's logits are overwritten by the gradient times `scale`, in their type, and the result holds them too.
LogitSums evaluate_row_terms(const rows::RowTerms& terms, at::Tensor student, const at::Tensor& teacher, std::int64_t vocabulary, bool gradient);

}  // namespace kompakt
