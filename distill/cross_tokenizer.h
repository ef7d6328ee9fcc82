// Losses between models of different tokenizers, and the teacher that reads the student's batches in its own tokens.
//
// `uld`: universal logit distillation (Boizard et al. 2024, arXiv 2402.12030): both next-token distributions sorted, L1 distance. Compared
// wherever both have read the same text, not position by position.
// `shared`: KL between the distributions over the tokens that both vocabularies have, all others as one (left out, both renormalised, where one
// side has next to none, as a student with a part of the teacher's vocabulary). What is not compared: tokens of one vocabulary that begin
// like those of the other.
// `spans`: KL between "this span comes next" and "another text comes next" of both models, the span's probability by the chain rule over its
// tokens (approximate likelihood matching, Minixhofer et al. 2025, arXiv 2503.20083).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include "data/tokenizer.h"
#include "distill/losses.h"
#include "distill/span_alignment.h"
#include "train/teacher.h"

namespace kompakt {

struct HiddenAndHead {
  at::Tensor hidden, weight, bias;  // [n,d] of the flattened batch; [V,d]; [V] or undefined
};

// Rows of the kind `cross_tokenizer`. Mean over the spans of the alignment; zero with zero gradient where there is none. Zero where both models
// and tokenizers are the same. Nats, except `uld`: 0 to 2.
struct CrossLoss {
  std::string_view name, summary;
  at::Tensor (*evaluate)(const TextAlignment& alignment, const HiddenAndHead& student, const HiddenAndHead& teacher, double temperature);
};
std::span<const CrossLoss> cross_losses();
const CrossLoss* find_cross_loss(std::string_view name);

// [n] sum over k of |q_(k) - p_(k)|, both sorted downwards, the shorter padded with zeros, and its gradient. student [n,V], teacher [n,V_t].
Divergence universal_logit_distance(const at::Tensor& student, const at::Tensor& teacher, double temperature, bool gradient);
// [m] KL(Bernoulli(e^(t/T)) || Bernoulli(e^(s/T))) of log-probabilities of spans; differentiable in `student`.
at::Tensor span_divergence(const at::Tensor& student, const at::Tensor& teacher, double temperature);

// A live teacher for batches of the student's tokenizer: spells every document of a row, tokenizes it anew, packs and aligns. Gives `hidden`
// and head of its own tokens and `alignment`; no taps. Special tokens end a document on both sides and are aligned with each other.
// Tokenizers must outlive the source.
std::unique_ptr<TeacherSource> cross_tokenizer_teacher(FrozenTeacher teacher, const Tokenizer& student_tokenizer, const Tokenizer& teacher_tokenizer);

}  // namespace kompakt
