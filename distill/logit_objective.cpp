// The sum of logit losses as one objective: from full logits, in chunks from hidden states, or against a teacher's cache.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cstdlib>

#include "core/error.h"
#include "core/text.h"
#include "distill/fused_linear.h"
#include "distill/objective_item.h"
#include "train/chunked_loss.h"

namespace kompakt {
namespace {

using at::Tensor;

Tensor logit_rows(const Tensor& x) { return x.defined() ? x.flatten(0, 1) : x; }

std::int64_t logit_columns(const TeacherTargets& teacher) {
  if (teacher.logits.defined()) return teacher.logits.size(-1);
  return teacher.hidden.defined() ? teacher.head_weight.size(0) : teacher.sparse.vocabulary;
}

}  // namespace

std::int64_t shared_logits(std::int64_t student, std::int64_t teacher, std::int64_t tokens) {
  const std::int64_t rows = std::min(student, teacher), shared = tokens > 0 ? std::min(rows, tokens) : rows;
  if (student == teacher) return shared < rows ? shared : 0;
  if (std::abs(student - teacher) < 512 && rows > 1024) return shared;
  throw Error(str("student and teacher do not share a vocabulary or label set: ", student, " and ", teacher, " logits")).hint("use hidden or relation losses and labels, or a teacher with the same tokenizer and labels");
}

Tensor LogitObjective::loss(const ObjectiveInput& input, std::vector<LossPart>& parts) {
  const at::AutoGradMode gradient(at::GradMode::is_enabled() && !terms_.empty());  // without terms it only measures
  const TeacherTargets& teacher = objective_teacher(input);
  LogitLossOptions frame;
  if (input.batch.labels.empty()) frame.mask = objective_token_mask(input).reshape({-1});
  LogitMeans means;
  if (input.logits.defined() && teacher.logits.defined()) {
    frame.vocabulary = shared_logits(input.logits.size(-1), teacher.logits.size(-1), tokens_);
    means = logit_terms(terms_, input.logits, teacher.logits, frame);
  } else {
    const InputTransform& transform = input.student.lm_head.input_transform;
    const HeadWeights head = head_weights(input.student);
    const Tensor hidden = transform ? transform(input.hidden) : input.hidden;
    const SparseTargets& s = teacher.sparse;
    const std::int64_t rows_of_head = head.weight.size(0), columns = logit_columns(teacher);
    const bool real = s.ids.defined() && columns == tokens_ && columns < rows_of_head;  // the cache has left the padding out
    frame.vocabulary = real ? columns : shared_logits(rows_of_head, columns, tokens_);
    const SparseTargets rows{logit_rows(s.ids), logit_rows(s.log_p), logit_rows(s.log_rest), logit_rows(s.draws), logit_rows(s.draw_log_p), s.vocabulary};
    const FusedTeacher source{logit_rows(teacher.logits), logit_rows(teacher.hidden), teacher.head_weight, teacher.head_bias, s.ids.defined() ? &rows : nullptr};
    means = fused_linear_terms(terms_, hidden.flatten(0, 1), head.weight, head.bias, source, frame);
  }
  const auto count = static_cast<std::int64_t>(terms_.size());
  for (std::int64_t i = 0; i < count; ++i) parts.push_back({std::string(terms_[static_cast<std::size_t>(i)].loss->name), means.values[i]});
  parts.push_back({"teacher_forward_kl", means.values[count], true});
  parts.push_back({"teacher_reverse_kl", means.values[count + 1]});
  return means.total;
}

}  // namespace kompakt
