// The losses; the teacher is in cross_tokenizer_teacher.cpp.
#include "distill/cross_tokenizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>

#include "core/error.h"
#include "core/text.h"
#include "distill/fused_linear.h"
#include "distill/objective_item.h"
#include "distill/token_log_probs.h"
#include "train/chunked_loss.h"

namespace kompakt {
namespace {

using at::Tensor;

constexpr double cross_masked = -1e30;

at::ScalarType cross_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Sum over positions as the fused frame wants it; the gradient is one of logits.
LogitSums cross_sums(const Divergence& part, double temperature) {
  LogitSums out{at::zeros({2}, part.value.options().dtype(at::kDouble)), {}};
  out.values[0].copy_(part.value.sum(at::kDouble));
  if (part.gradient.defined()) out.gradient = part.gradient / temperature;
  return out;
}

Tensor cross_at_starts(const TextAlignment& alignment, const HiddenAndHead& student, const HiddenAndHead& teacher, const PositionLoss& loss) {
  FusedTeacher source;
  source.hidden = teacher.hidden.index_select(0, alignment.teacher_starts), source.weight = teacher.weight, source.bias = teacher.bias;
  return fused_position_loss(loss, student.hidden.index_select(0, alignment.student_starts), student.weight, student.bias, source).total;
}

Tensor cross_uld(const TextAlignment& alignment, const HiddenAndHead& student, const HiddenAndHead& teacher, double temperature) {
  return cross_at_starts(alignment, student, teacher,
                         [&](const Tensor& s, const Tensor& t, bool gradient) { return cross_sums(universal_logit_distance(s, t, temperature, gradient), temperature); });
}

// Fewer others than one of so many columns (special tokens) are no place for what the other side's own tokens weigh.
constexpr std::int64_t cross_others = 64;

// Logits of the shared tokens and, with `rest`, behind them the logsumexp of all others.
Tensor cross_partition(const Tensor& logits, const Tensor& shared, bool rest) {
  const Tensor known = logits.index_select(1, shared);
  return rest ? at::cat({known, at::logsumexp(logits.index_fill(1, shared, cross_masked), 1, true)}, 1) : known;
}

Tensor cross_shared(const TextAlignment& alignment, const HiddenAndHead& student, const HiddenAndHead& teacher, double temperature) {
  const LogitLoss& kl = *find_logit_loss("forward_kl");
  const Tensor &mine = alignment.student_shared, &other = alignment.teacher_shared;
  const auto has_others = [&](const Tensor& shared, std::int64_t columns) { return (columns - shared.numel()) * cross_others >= columns; };
  return cross_at_starts(alignment, student, teacher, [&](const Tensor& s, const Tensor& t, bool gradient) {
    const at::NoGradGuard no_grad;
    const at::ScalarType type = cross_type(s);
    const bool rest = has_others(mine, s.size(1)) && has_others(other, t.size(1));
    const Tensor logits = s.to(type) / temperature;
    const LogitPair pair(cross_partition(logits, mine, rest), cross_partition(t.to(type) / temperature, other, rest));
    Divergence part = kl.evaluate(pair, {}, gradient);
    if (gradient) {
      Tensor whole = at::zeros_like(logits);
      if (rest) {  // a logit of the others moves their logsumexp by its share there
        const Tensor known = at::zeros({logits.size(1)}, logits.options().dtype(at::kBool)).index_fill_(0, mine, true);
        whole = at::softmax(logits.masked_fill(known, cross_masked), 1).mul_(part.gradient.narrow(1, mine.numel(), 1));
      }
      part.gradient = whole.index_copy_(1, mine, part.gradient.narrow(1, 0, mine.numel()).contiguous());
    }
    return cross_sums(part, temperature);
  });
}

Tensor cross_spans(const TextAlignment& alignment, const HiddenAndHead& student, const HiddenAndHead& teacher, double temperature) {
  const auto log_probs = [&](const HiddenAndHead& side, const Tensor& positions, const Tensor& tokens, const Tensor& spans) {
    const Tensor each = token_log_probs(side.hidden.index_select(0, positions), side.weight, side.bias, tokens);
    return at::zeros({alignment.spans}, each.options()).index_add(0, spans, each);
  };
  Tensor wanted;
  {
    const at::NoGradGuard no_grad;
    wanted = log_probs(teacher, alignment.teacher_positions, alignment.teacher_tokens, alignment.teacher_spans);
  }
  return span_divergence(log_probs(student, alignment.student_positions, alignment.student_tokens, alignment.student_spans), wanted, temperature).mean();
}

constexpr std::array<CrossLoss, 3> cross_table{{
    {"uld", "L1 distance of the sorted next-token probabilities (universal logit distillation)", cross_uld},
    {"shared", "KL over the tokens that both vocabularies have, all others as one", cross_shared},
    {"spans", "KL of the probabilities of text spans that both tokenizers end at the same byte", cross_spans},
}};

// Without the rows of a head that no token belongs to: they take no probability on either side and learn nothing.
HiddenAndHead cross_tokens(HiddenAndHead side, std::int64_t ids) {
  if (ids <= 0 || ids >= side.weight.size(0)) return side;
  side.weight = side.weight.narrow(0, 0, ids);
  if (side.bias.defined()) side.bias = side.bias.narrow(0, 0, ids);
  return side;
}

}  // namespace

std::span<const CrossLoss> cross_losses() { return cross_table; }

const CrossLoss* find_cross_loss(std::string_view name) {
  for (const CrossLoss& row : cross_table)
    if (row.name == name) return &row;
  return nullptr;
}

Divergence universal_logit_distance(const Tensor& student, const Tensor& teacher, double temperature, bool gradient) {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = cross_type(student);
  const Tensor q = at::softmax(student.to(type) / temperature, -1), p = at::softmax(teacher.to(type) / temperature, -1);
  auto [q_sorted, order] = at::sort(q, /*stable=*/true, -1, /*descending=*/true);
  Tensor p_sorted = std::get<0>(at::sort(p, /*stable=*/true, -1, /*descending=*/true));
  const std::int64_t more = q.size(1) - p.size(1), common = std::min(q.size(1), p.size(1));
  Tensor difference = q_sorted;  // not needed sorted any more
  difference.narrow(1, 0, common).sub_(p_sorted.narrow(1, 0, common));
  Divergence out{difference.abs().sum(1), {}};
  if (more < 0) out.value = out.value + p_sorted.narrow(1, common, -more).sum(1);
  if (!gradient) return out;
  const Tensor slope = at::zeros_like(q).scatter_(1, order, difference.sign());
  out.gradient = q * (slope - (q * slope).sum(1, true));
  return out;
}

Tensor span_divergence(const Tensor& student, const Tensor& teacher, double temperature) {
  // The complement of a probability within 1e-6 of one is rounding.
  const auto complement = [](const Tensor& log_p) { return at::log(-at::expm1(log_p.clamp_max(-1e-6))); };
  const Tensor s = student / temperature, t = teacher.detach() / temperature, p = t.exp();
  return p * (t - s) + (1 - p) * (complement(t) - complement(s));
}

CrossTokenizerObjective::CrossTokenizerObjective(const ObjectiveItem& item) : row_(find_cross_loss(item.name)), temperature_(item.logits.temperature), weight_(item.weight) {}

Tensor CrossTokenizerObjective::loss(const ObjectiveInput& input, std::vector<LossPart>& parts) {
  const TeacherTargets& teacher = objective_teacher(input);
  if (!teacher.alignment) throw Error("an objective between different tokenizers needs a teacher that reads the text in its own tokens").given(str("cross_tokenizer: ", row_->name)).hint("use it in the stage distill of text");
  const TextAlignment& alignment = *teacher.alignment;
  const InputTransform& transform = input.student.lm_head.input_transform;
  const HeadWeights head = head_weights(input.student);
  const Tensor hidden = (transform ? transform(input.hidden) : input.hidden).flatten(0, 1);
  const Tensor mean = alignment.spans == 0 ? hidden.sum() * 0
                                           : row_->evaluate(alignment, cross_tokens({hidden, head.weight, head.bias}, alignment.student_ids),
                                                            cross_tokens({teacher.hidden.flatten(0, 1), teacher.head_weight, teacher.head_bias}, alignment.teacher_ids), temperature_);
  const Tensor value = input.weight == 1 ? mean : mean * input.weight;
  const Tensor mask = objective_token_mask(input);
  parts.push_back({std::string("cross_") + std::string(row_->name), value});
  parts.push_back({"aligned_spans", at::full({}, static_cast<double>(alignment.spans), hidden.options().dtype(at::kFloat)) / mask.sum().clamp_min(1)});
  return value * weight_;
}

}  // namespace kompakt
