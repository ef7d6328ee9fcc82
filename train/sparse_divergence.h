// KL from a teacher of which a cache knows the likeliest tokens and draws from the rest, with what is known of its error; forward passes
// only, for scores and reports. (The loss that a student learns from is distill/sparse_losses.h.)
//
// p: teacher, q: model, K: the kept tokens of a position, R: all others, P = p(R), Q = q(R); N draws j from R, j ~ p / P.
//
//   KL(p || q) = sum_K p log(p / q)  +  sum_R p log(p / q)
//                known                  estimated by  P / N sum_j log(p_j / q_j)
//
// - Sampling. The draws are unbiased, so is the estimate. They come in two halves that are independent of each other, with means m1 and m2
//   of the log-ratio: (P (m1 - m2) / 2)^2 is an unbiased estimate of the variance, whatever the distribution of a half. Draws of different
//   positions are independent: the variances of a mean's terms add up, and the mean of many positions is close to normal.
// - Without draws. sum_R p log(p / q) = P log(P / Q) + P KL(p / P || q / Q) is at least P log(P / Q) (log-sum inequality), and, as no token
//   of the rest is likelier than the last kept one, at most P (log min(p_last, P) - log min_R q): bounds that no draw is needed for. The upper
//   one is of use where P is small. A cache without draws gives the lower one as its value.
// - Codes. Log-probabilities are stored on a scale of 256 steps (sparse_codec.h), so that p is known up to factors exp(+-d). With p' the
//   stored values, |sum_K p log(p / q) - sum_K p' log(p' / q) + (p(R) - p'(R))| <= sum_K p' (exp(d) - 1) (|log(p' / q)| + d), because the
//   derivative of x log(x / q) is log(x / q) + 1 and all probabilities sum to one on both sides; the rest likewise. This is a worst case:
//   rounding goes both ways, and what is seen is a small part of it. Values at the end of a scale (20 nats between neighbours, 16 from the last
//   kept token to a drawn one) stand for all below; probabilities of exp(-16) of the last kept one are left out of the bound.
//
// Whether both models choose the same token is exact: the teacher's first choice is the first kept one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "evaluate/language.h"
#include "train/objective.h"

namespace kompakt {

// Of every position [n], float64, in nats.
struct SparseDivergence {
  at::Tensor kl;                 // estimate; the lower bound where the cache has no draws
  at::Tensor variance;           // of the estimate by its draws; zero without draws
  at::Tensor code_error;         // largest distance that the codes can add
  at::Tensor at_least, at_most;  // whatever the draws are, codes included
  at::Tensor same_top1;          // bool
};
// logits [n,V] of the model; columns behind the teacher's vocabulary are left out. teacher: ids [n,k] and so on.
SparseDivergence sparse_divergence(const at::Tensor& logits, const SparseTargets& teacher);

// score_language() against a cache: `scores.kl` holds estimates, `scores.teacher_window_nll` nothing.
struct SparseScores {
  LanguageScores scores;
  // Of the mean over all scored positions.
  double standard_error = 0, code_error = 0, at_least = 0, at_most = 0;
  bool sampled = false;  // there are draws; else scores.kl are lower bounds
};
// Window i is row i of the cache. Windows as score_language() takes them, of the length that the teacher takes.
SparseScores score_language(const Transformer& model, TeacherSource& teacher, const std::vector<std::vector<std::int64_t>>& windows, std::int64_t chunk = 128, const std::function<void(std::int64_t)>& progress = {});

}  // namespace kompakt
