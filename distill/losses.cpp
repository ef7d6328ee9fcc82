// Logit divergences in closed form (value and gradient), and the autograd function that carries them.
#include "distill/losses.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cmath>
#include <set>
#include <stdexcept>

#include "core/text.h"

namespace kompakt {
namespace {

using at::Tensor;

// Far below any logit, far above the float32 limit: exp() of it is exactly 0 and differences of it stay finite, so that
// removed columns contribute 0 to every sum without a NaN from inf - inf.
constexpr double losses_masked = -1e30;

Tensor losses_row_sum(const Tensor& x) { return x.sum(-1); }

at::ScalarType losses_precision(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// 1 where a column is real, 0 where it was removed.
Tensor losses_real(const Tensor& u) { return u.gt(losses_masked / 1e6).to(u.scalar_type()); }

// dL/du_i = q_i (g_i - sum_j q_j g_j) for g = dL/dq, in place of g.
Tensor losses_project(const Tensor& q, Tensor g) {
  const Tensor mean = (q * g).sum(-1, true);
  return g.sub_(mean).mul_(q);
}

Divergence losses_forward_kl(const LogitPair& pair, const LogitLossOptions&, bool gradient) {
  return {pair.forward_kl(), gradient ? pair.q() - pair.p() : Tensor()};
}

Divergence losses_reverse_kl(const LogitPair& pair, const LogitLossOptions&, bool gradient) {
  Divergence out{pair.reverse_kl(), {}};
  if (gradient) out.gradient = (pair.log_q() - pair.log_p()).sub_(out.value.unsqueeze(-1)).mul_(pair.q());
  return out;
}

// log(a p + (1-a) q), 0 < a < 1.
Tensor losses_log_mixture(const Tensor& log_p, const Tensor& log_q, double a) {
  Tensor out = log_p + std::log(a);
  return at::logaddexp_out(out, out, log_q + std::log1p(-a));
}

Divergence losses_jsd(const LogitPair& pair, const LogitLossOptions& options, bool gradient) {
  const double beta = options.beta;
  if (beta == 0) return losses_forward_kl(pair, options, gradient);
  if (beta == 1) return losses_reverse_kl(pair, options, gradient);
  const Tensor log_m = losses_log_mixture(pair.log_p(), pair.log_q(), beta);
  const Tensor b = pair.log_q() - log_m;
  const Tensor to_student = losses_row_sum(pair.q() * b);
  Divergence out{losses_row_sum(pair.p() * (pair.log_p() - log_m)) * beta + to_student * (1 - beta), {}};
  if (gradient) out.gradient = (b - to_student.unsqueeze(-1)).mul_(pair.q()).mul_(1 - beta);
  return out;
}

Divergence losses_skew_forward(const LogitPair& pair, const LogitLossOptions& options, bool gradient) {
  const double lambda = options.lambda;
  if (lambda == 0) return losses_forward_kl(pair, options, gradient);
  const Tensor ratio = pair.log_p() - losses_log_mixture(pair.log_p(), pair.log_q(), lambda);  // log(p / m)
  Divergence out{losses_row_sum(pair.p() * ratio), {}};
  if (gradient) out.gradient = losses_project(pair.q(), ratio.exp().mul_(-(1 - lambda)));
  return out;
}

Divergence losses_skew_reverse(const LogitPair& pair, const LogitLossOptions& options, bool gradient) {
  const double lambda = options.lambda;
  if (lambda == 0) return losses_reverse_kl(pair, options, gradient);
  const Tensor ratio = pair.log_q() - losses_log_mixture(pair.log_p(), pair.log_q(), 1 - lambda);  // log(q / m)
  Divergence out{losses_row_sum(pair.q() * ratio), {}};
  if (gradient) out.gradient = losses_project(pair.q(), ratio - ratio.exp() * lambda);
  return out;
}

// Wu et al. 2024: weights of forward and reverse KL from where the two distributions differ, head or tail of the teacher.
Divergence losses_adaptive(const LogitPair& pair, const LogitLossOptions& options, bool gradient) {
  const Divergence forward = losses_forward_kl(pair, options, gradient), reverse = losses_reverse_kl(pair, options, gradient);
  const Tensor gap = (pair.p() - pair.q()).abs_();
  const auto [sorted, order] = pair.p().sort(/*stable=*/true, /*dim=*/-1, /*descending=*/false);
  const Tensor tail_sorted = sorted.cumsum(-1).lt(0.5);
  const Tensor sorted_gap = gap.gather(-1, order);
  const Tensor tail = losses_row_sum(sorted_gap * tail_sorted), total = losses_row_sum(sorted_gap);
  const Tensor head_share = at::where(total > 0, (total - tail) / total, at::full_like(total, 0.5));  // equal distributions: 1/2 each
  Divergence out{forward.value * head_share + reverse.value * (1 - head_share), {}};
  if (gradient) out.gradient = forward.gradient * head_share.unsqueeze(-1) + reverse.gradient * (1 - head_share).unsqueeze(-1);
  return out;
}

Divergence losses_total_variation(const LogitPair& pair, const LogitLossOptions&, bool gradient) {
  const Tensor difference = pair.q() - pair.p();
  Divergence out{losses_row_sum(difference.abs()) * 0.5, {}};
  if (gradient) out.gradient = losses_project(pair.q(), difference.sign() * 0.5);
  return out;
}

Divergence losses_mse(const LogitPair& pair, const LogitLossOptions&, bool gradient) {
  Tensor difference = pair.student() - pair.teacher();
  const Tensor columns = losses_real(pair.student()).sum(-1, true).clamp_min(1).to(pair.student().scalar_type());
  Divergence out{(difference.square() / columns).sum(-1), {}};
  if (gradient) out.gradient = difference.mul_(2).div_(columns);
  return out;
}

// Mean over pairs of the teacher's `top` likeliest tokens of max(0, min(teacher's gap, margin) - student's gap): the order of the
// candidates and their distance up to the margin, whatever the rest of the vocabulary does.
Divergence losses_ranking(const LogitPair& pair, const LogitLossOptions& options, bool gradient) {
  const Tensor &us = pair.student(), &ut = pair.teacher();
  const std::int64_t top = std::min(options.top, ut.size(-1));
  const auto [best, columns] = ut.topk(top, -1);  // sorted: the first of a pair is never the less likely one
  const Tensor chosen = us.gather(-1, columns), real = losses_real(best);
  const auto gaps = [](const Tensor& u) { return u.unsqueeze(-1) - u.unsqueeze(-2); };  // [n, top, top], (i, j): u_i - u_j
  const Tensor counted = (real.unsqueeze(-1) * real.unsqueeze(-2)).triu(1);
  const Tensor pairs = counted.sum({-1, -2}).clamp_min(1).to(us.scalar_type());
  const Tensor lack = (gaps(best).clamp_max(options.margin) - gaps(chosen)).clamp_min(0).mul_(counted);
  Divergence out{lack.sum({-1, -2}) / pairs, {}};
  if (!gradient) return out;
  const Tensor short_of = lack.gt(0).to(us.scalar_type()).div_(pairs.unsqueeze(-1).unsqueeze(-1));
  out.gradient = at::zeros_like(us).scatter_add_(-1, columns, short_of.sum(-2) - short_of.sum(-1));  // as the second of a pair, as the first
  return out;
}

constexpr std::array<LogitLoss, 9> losses_table{{
    {.name = "forward_kl", .summary = "KL(teacher || student): the student must cover all that the teacher finds likely", .shift_invariant = true, .partition = true, .linear_in_teacher = true, .by_rows = true, .row = rows::RowLoss::forward_kl, .evaluate = losses_forward_kl},
    {.name = "reverse_kl", .summary = "KL(student || teacher): the student may drop modes but must not invent any", .shift_invariant = true, .partition = true, .row = rows::RowLoss::reverse_kl, .evaluate = losses_reverse_kl},
    {.name = "generalized_jsd", .summary = "generalized Jensen-Shannon divergence with weight beta (GKD)", .uses_beta = true, .shift_invariant = true, .partition = true, .row = rows::RowLoss::generalized_jsd, .evaluate = losses_jsd},
    {.name = "skew_forward_kl", .summary = "KL(teacher || mixture of both) with share lambda (DistiLLM)", .uses_lambda = true, .shift_invariant = true, .partition = true, .row = rows::RowLoss::skew_forward_kl, .evaluate = losses_skew_forward},
    {.name = "skew_reverse_kl", .summary = "KL(student || mixture of both) with share lambda (DistiLLM)", .uses_lambda = true, .shift_invariant = true, .partition = true, .row = rows::RowLoss::skew_reverse_kl, .evaluate = losses_skew_reverse},
    {.name = "adaptive_kl", .summary = "forward and reverse KL, weighted by where they differ: head or tail of the teacher", .shift_invariant = true, .partition = true, .evaluate = losses_adaptive},
    {.name = "total_variation", .summary = "half the L1 distance of the probabilities", .shift_invariant = true, .partition = true, .row = rows::RowLoss::total_variation, .evaluate = losses_total_variation},
    {.name = "logits_mse", .summary = "mean squared difference of the logits", .row = rows::RowLoss::logits_mse, .evaluate = losses_mse},
    {.name = "ranking", .summary = "hinge on pairs of the teacher's `top` likeliest tokens: their order, and their gaps up to `margin`", .uses_top = true, .shift_invariant = true, .evaluate = losses_ranking},
}};

// Saves only dL/dlogits: one tensor of the logits' size, however many intermediate values the losses need.
struct LossesFunction : torch::autograd::Function<LossesFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& student, const Tensor& teacher, const std::span<const LogitTerm>* terms, std::int64_t vocabulary,
                                                double divisor) {
    const bool gradient = student.requires_grad();
    LogitSums sums = evaluate_terms(*terms, student, teacher, vocabulary, gradient);
    if (gradient) context->save_for_backward({sums.gradient.div_(divisor).to(student.scalar_type())});
    const Tensor means = sums.values.div_(divisor);
    context->mark_non_differentiable({means});
    return {weighted_total(*terms, means).to(losses_precision(student)), means};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const Tensor saved = context->get_saved_variables().at(0);
    return {saved * gradients.at(0).to(saved.scalar_type()), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

std::span<const LogitLoss> logit_losses() { return losses_table; }

const LogitLoss* find_logit_loss(std::string_view name) {
  for (const LogitLoss& row : losses_table)
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> logit_loss_names() {
  std::vector<std::string> names;
  for (const LogitLoss& row : losses_table) names.emplace_back(row.name);
  return names;
}

const Tensor& LogitPair::log_q() const { return log_q_.defined() ? log_q_ : log_q_ = at::log_softmax(student_, -1); }
const Tensor& LogitPair::log_p() const { return log_p_.defined() ? log_p_ : log_p_ = at::log_softmax(teacher_, -1); }
const Tensor& LogitPair::q() const { return q_.defined() ? q_ : q_ = log_q().exp(); }
const Tensor& LogitPair::p() const { return p_.defined() ? p_ : p_ = log_p().exp(); }
const Tensor& LogitPair::forward_kl() const {
  compare();
  return forward_;
}
const Tensor& LogitPair::reverse_kl() const {
  compare();
  return reverse_;
}
void LogitPair::compare() const {
  if (forward_.defined()) return;
  Tensor gap = log_p() - log_q();
  forward_ = losses_row_sum(p() * gap);
  reverse_ = losses_row_sum(gap.mul_(q())).neg_();
}

Tensor weighted_total(std::span<const LogitTerm> terms, const Tensor& values) {
  Tensor total = at::zeros({}, values.options());
  for (std::size_t i = 0; i < terms.size(); ++i) total.add_(values[static_cast<std::int64_t>(i)], terms[i].weight);
  return total;
}

double gradient_factor(const LogitLossOptions& options) { return options.scale_gradient ? options.temperature * options.temperature : 1; }

LogitSums evaluate_terms(std::span<const LogitTerm> terms, const Tensor& student, const Tensor& teacher, std::int64_t vocabulary, bool gradient) {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = losses_precision(student);
  const std::int64_t columns = vocabulary > 0 ? vocabulary : student.size(-1), count = static_cast<std::int64_t>(terms.size());
  if (columns > student.size(-1) || columns > teacher.size(-1) || (vocabulary == 0 && student.size(-1) != teacher.size(-1)))
    throw std::logic_error(str("logit loss: student has ", student.size(-1), " columns, teacher ", teacher.size(-1), ", vocabulary ", vocabulary));
  Tensor us = student.narrow(-1, 0, columns).to(type), ut = teacher.narrow(-1, 0, columns).to(type);
  // One min() is cheaper than two isinf(): -inf is the smallest value there is.
  Tensor removed;
  if (us.numel() > 0 && (at::isneginf(us.min()).item<bool>() || at::isneginf(ut.min()).item<bool>())) {
    removed = at::isneginf(us).logical_or_(at::isneginf(ut));
    us = us.masked_fill(removed, losses_masked);
    ut = ut.masked_fill(removed, losses_masked);
  }
  LogitSums out{at::zeros({count + 2}, us.options().dtype(at::kDouble)), {}};
  std::set<double> temperatures{1.0};
  for (const LogitTerm& term : terms) temperatures.insert(term.options.temperature);
  for (const double t : temperatures) {
    const LogitPair pair(t == 1 ? us : us / t, t == 1 ? ut : ut / t);
    for (std::int64_t i = 0; i < count; ++i) {
      const LogitTerm& term = terms[static_cast<std::size_t>(i)];
      if (term.options.temperature != t) continue;
      Divergence part = term.loss->evaluate(pair, term.options, gradient && term.weight != 0);
      const double factor = gradient_factor(term.options);
      out.values[i].copy_(part.value.sum(at::kDouble) * factor);
      if (!part.gradient.defined()) continue;
      const double scale = term.weight * factor / t;
      if (out.gradient.defined()) out.gradient.add_(part.gradient, scale);
      else out.gradient = scale == 1 ? part.gradient : part.gradient.mul_(scale);
    }
    if (t != 1) continue;
    out.values[count].copy_(pair.forward_kl().sum(at::kDouble));
    out.values[count + 1].copy_(pair.reverse_kl().sum(at::kDouble));
  }
  if (!gradient) return out;
  if (!out.gradient.defined()) out.gradient = at::zeros_like(us);  // every weight is 0
  if (removed.defined()) out.gradient.masked_fill_(removed, 0);
  if (columns < student.size(-1)) out.gradient = at::constant_pad_nd(out.gradient, {0, student.size(-1) - columns});
  return out;
}

LogitMeans logit_terms(std::span<const LogitTerm> terms, const Tensor& student, const Tensor& teacher, const LogitLossOptions& frame) {
  for (const LogitTerm& term : terms)
    if (!(term.options.temperature > 0)) throw std::logic_error("logit loss: temperature must be above 0");
  if (student.sizes().slice(0, student.dim() - 1) != teacher.sizes().slice(0, teacher.dim() - 1)) throw std::logic_error("logit loss: student and teacher hold different positions");
  Tensor s = student.reshape({-1, student.size(-1)}), t = teacher.detach().reshape({-1, teacher.size(-1)});
  if (frame.mask.defined()) {
    const Tensor mask = frame.mask.reshape({-1});
    if (mask.numel() != s.size(0)) throw std::logic_error("logit loss: the mask does not fit the positions");
    const Tensor valid = mask.nonzero().squeeze(-1);
    if (valid.numel() < s.size(0)) s = s.index_select(0, valid), t = t.index_select(0, valid);
  }
  if (s.size(0) == 0)  // an empty sum: 0, and zero gradient whatever the logits hold
    return {s.sum().to(losses_precision(student)), at::zeros({static_cast<std::int64_t>(terms.size()) + 2}, s.options().dtype(at::kDouble).requires_grad(false))};
  const double divisor = frame.count > 0 ? frame.count : static_cast<double>(s.size(0));
  const torch::autograd::variable_list out = LossesFunction::apply(at::GradMode::is_enabled() ? s : s.detach(), t, &terms, frame.vocabulary, divisor);
  return {out[0], out[1]};
}

Tensor logit_loss(const LogitLoss& loss, const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) {
  const LogitTerm term{&loss, options, 1};
  return logit_terms({&term, 1}, student, teacher, options).total;
}

Tensor forward_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("forward_kl"), student, teacher, options); }
Tensor reverse_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("reverse_kl"), student, teacher, options); }
Tensor generalized_jsd(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("generalized_jsd"), student, teacher, options); }
Tensor skew_forward_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("skew_forward_kl"), student, teacher, options); }
Tensor skew_reverse_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("skew_reverse_kl"), student, teacher, options); }
Tensor adaptive_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("adaptive_kl"), student, teacher, options); }
Tensor total_variation(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("total_variation"), student, teacher, options); }
Tensor logits_mse(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("logits_mse"), student, teacher, options); }
Tensor ranking_hinge(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("ranking"), student, teacher, options); }

}  // namespace kompakt
