// Logit losses against a teacher of which only the likeliest tokens, the probability of the rest and draws from it are known.
//
// A loss on probabilities alone (LogitLoss::partition) compares the likeliest tokens and the rest as one symbol: never more than the
// loss on all tokens (data processing), and the student keeps its own shape inside the rest. Forward KL, linear in the teacher,
// uses the draws as well: value and gradient are unbiased estimates of those of the whole vocabulary (sparse logit sampling,
// Anshumann et al. 2025, arXiv 2503.16870, with the likeliest tokens exact and the student as control variate, so that the
// gradient is zero where student equals teacher).
#pragma once

#include <ATen/core/Tensor.h>

#include <span>

#include "distill/losses.h"
#include "train/objective.h"

namespace kompakt {

// As evaluate_terms, for n positions at temperature 1. student [n, V]; teacher [n, ..]. Draws (an even number) must be independent
// between the first and the second half: each half decides how far the other trusts the student.
// The logged reverse KL is that of the partition. std::logic_error for a loss without `partition`, or another temperature.
LogitSums evaluate_sparse_terms(std::span<const LogitTerm> terms, const at::Tensor& student, const SparseTargets& teacher, std::int64_t vocabulary, bool gradient);

}  // namespace kompakt
