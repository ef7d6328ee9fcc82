// Logit divergences in closed form (value and gradient), and the autograd function that carries them.
#include "distill/losses.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cmath>
#include <stdexcept>

#include "core/text.h"

namespace kompakt {
namespace {

using at::Tensor;

// Far below any logit, far above the float32 limit: exp() of it is exactly 0 and differences of it stay finite, so that
// removed columns contribute 0 to every sum without a NaN from inf - inf.
constexpr double losses_masked = -1e30;

Tensor losses_row_sum(const Tensor& x) { return x.sum(-1); }

// dL/du_i = q_i (g_i - sum_j q_j g_j) for g = dL/dq.
Tensor losses_project(const Tensor& q, const Tensor& g) { return q * (g - (q * g).sum(-1, true)); }

Divergence losses_forward_kl(const Tensor& us, const Tensor& ut, const LogitLossOptions&, bool gradient) {
  const Tensor log_p = at::log_softmax(ut, -1), log_q = at::log_softmax(us, -1);
  const Tensor p = log_p.exp();
  Divergence out{losses_row_sum((log_p - log_q).mul_(p)), {}};
  if (gradient) out.gradient = log_q.exp().sub_(p);
  return out;
}

Divergence losses_reverse_kl(const Tensor& us, const Tensor& ut, const LogitLossOptions&, bool gradient) {
  const Tensor log_q = at::log_softmax(us, -1);
  const Tensor ratio = log_q - at::log_softmax(ut, -1);
  Tensor q = log_q.exp();
  Divergence out{losses_row_sum(q * ratio), {}};
  if (gradient) out.gradient = q.mul_(ratio - out.value.unsqueeze(-1));
  return out;
}

// log(a p + (1-a) q), 0 < a < 1.
Tensor losses_log_mixture(const Tensor& log_p, const Tensor& log_q, double a) { return at::logaddexp(log_p + std::log(a), log_q + std::log1p(-a)); }

Divergence losses_jsd(const Tensor& us, const Tensor& ut, const LogitLossOptions& options, bool gradient) {
  const double beta = options.beta;
  if (beta == 0) return losses_forward_kl(us, ut, options, gradient);
  if (beta == 1) return losses_reverse_kl(us, ut, options, gradient);
  const Tensor log_p = at::log_softmax(ut, -1), log_q = at::log_softmax(us, -1);
  const Tensor log_m = losses_log_mixture(log_p, log_q, beta);
  const Tensor q = log_q.exp();
  const Tensor b = log_q - log_m;
  const Tensor to_student = losses_row_sum(q * b);
  Divergence out{losses_row_sum(log_p.exp() * (log_p - log_m)) * beta + to_student * (1 - beta), {}};
  if (gradient) out.gradient = (b - to_student.unsqueeze(-1)).mul_(q).mul_(1 - beta);
  return out;
}

Divergence losses_skew_forward(const Tensor& us, const Tensor& ut, const LogitLossOptions& options, bool gradient) {
  const double lambda = options.lambda;
  if (lambda == 0) return losses_forward_kl(us, ut, options, gradient);
  const Tensor log_p = at::log_softmax(ut, -1), log_q = at::log_softmax(us, -1);
  const Tensor ratio = log_p - losses_log_mixture(log_p, log_q, lambda);  // log(p / m)
  Divergence out{losses_row_sum(log_p.exp() * ratio), {}};
  if (gradient) out.gradient = losses_project(log_q.exp(), ratio.exp().mul_(-(1 - lambda)));
  return out;
}

Divergence losses_skew_reverse(const Tensor& us, const Tensor& ut, const LogitLossOptions& options, bool gradient) {
  const double lambda = options.lambda;
  if (lambda == 0) return losses_reverse_kl(us, ut, options, gradient);
  const Tensor log_p = at::log_softmax(ut, -1), log_q = at::log_softmax(us, -1);
  const Tensor ratio = log_q - losses_log_mixture(log_p, log_q, 1 - lambda);  // log(q / m)
  const Tensor q = log_q.exp();
  Divergence out{losses_row_sum(q * ratio), {}};
  if (gradient) out.gradient = losses_project(q, ratio - ratio.exp() * lambda);
  return out;
}

// Wu et al. 2024: weights of forward and reverse KL from where the two distributions differ, head or tail of the teacher.
Divergence losses_adaptive(const Tensor& us, const Tensor& ut, const LogitLossOptions& options, bool gradient) {
  const Divergence forward = losses_forward_kl(us, ut, options, gradient), reverse = losses_reverse_kl(us, ut, options, gradient);
  const Tensor p = at::softmax(ut, -1);
  const Tensor gap = (p - at::softmax(us, -1)).abs_();
  const auto [sorted, order] = p.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/false);
  const Tensor tail_sorted = sorted.cumsum(-1).lt(0.5);
  const Tensor sorted_gap = gap.gather(-1, order);
  const Tensor tail = losses_row_sum(sorted_gap * tail_sorted), total = losses_row_sum(sorted_gap);
  const Tensor head_share = at::where(total > 0, (total - tail) / total, at::full_like(total, 0.5));  // equal distributions: 1/2 each
  Divergence out{forward.value * head_share + reverse.value * (1 - head_share), {}};
  if (gradient) out.gradient = forward.gradient * head_share.unsqueeze(-1) + reverse.gradient * (1 - head_share).unsqueeze(-1);
  return out;
}

Divergence losses_total_variation(const Tensor& us, const Tensor& ut, const LogitLossOptions&, bool gradient) {
  const Tensor q = at::softmax(us, -1);
  const Tensor difference = q - at::softmax(ut, -1);
  Divergence out{losses_row_sum(difference.abs()) * 0.5, {}};
  if (gradient) out.gradient = losses_project(q, difference.sign() * 0.5);
  return out;
}

Divergence losses_mse(const Tensor& us, const Tensor& ut, const LogitLossOptions&, bool gradient) {
  Tensor difference = us - ut;
  const Tensor columns = us.gt(losses_masked / 1e6).sum(-1, true).clamp_min(1).to(us.scalar_type());
  Divergence out{(difference.square() / columns).sum(-1), {}};
  if (gradient) out.gradient = difference.mul_(2).div_(columns);
  return out;
}

constexpr std::array<LogitLoss, 8> losses_table{{
    {"forward_kl", "KL(teacher || student): the student must cover all that the teacher finds likely", false, false, true, losses_forward_kl},
    {"reverse_kl", "KL(student || teacher): the student may drop modes but must not invent any", false, false, true, losses_reverse_kl},
    {"generalized_jsd", "generalized Jensen-Shannon divergence with weight beta (GKD)", true, false, true, losses_jsd},
    {"skew_forward_kl", "KL(teacher || mixture of both) with share lambda (DistiLLM)", false, true, true, losses_skew_forward},
    {"skew_reverse_kl", "KL(student || mixture of both) with share lambda (DistiLLM)", false, true, true, losses_skew_reverse},
    {"adaptive_kl", "forward and reverse KL, weighted by where they differ: head or tail of the teacher", false, false, true, losses_adaptive},
    {"total_variation", "half the L1 distance of the probabilities", false, false, true, losses_total_variation},
    {"logits_mse", "mean squared difference of the logits", false, false, false, losses_mse},
}};

// Saves only dL/dlogits: one tensor of the logits' size, however many intermediate values the divergence needs.
struct LossesFunction : torch::autograd::Function<LossesFunction> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& student, const Tensor& teacher, const LogitLoss* loss, const LogitLossOptions* options, double divisor) {
    const bool gradient = student.requires_grad();
    Divergence result = evaluate_logits(*loss, student, teacher, *options, gradient);
    if (gradient) context->save_for_backward({result.gradient.div_(divisor).to(student.scalar_type())});
    return result.value.sum() / divisor;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const Tensor saved = context->get_saved_variables().at(0);
    return {saved * gradients.at(0).to(saved.scalar_type()), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

at::ScalarType losses_precision(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

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

Divergence evaluate_logits(const LogitLoss& loss, const Tensor& student, const Tensor& teacher, const LogitLossOptions& options, bool gradient) {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = losses_precision(student);
  const double t = options.temperature;
  const std::int64_t columns = options.vocabulary > 0 ? options.vocabulary : student.size(-1);
  if (columns > student.size(-1) || columns > teacher.size(-1) || (options.vocabulary == 0 && student.size(-1) != teacher.size(-1)))
    throw std::logic_error(str("logit loss: student has ", student.size(-1), " columns, teacher ", teacher.size(-1), ", vocabulary ", options.vocabulary));
  Tensor us = student.narrow(-1, 0, columns).to(type), ut = teacher.narrow(-1, 0, columns).to(type);
  if (t != 1) us = us / t, ut = ut / t;
  // One min() is cheaper than two isinf(): -inf is the smallest value there is.
  Tensor removed;
  if (us.numel() > 0 && (at::isneginf(us.min()).item<bool>() || at::isneginf(ut.min()).item<bool>())) {
    removed = at::isneginf(us).logical_or_(at::isneginf(ut));
    us = us.masked_fill(removed, losses_masked);
    ut = ut.masked_fill(removed, losses_masked);
  }
  Divergence out = loss.evaluate(us, ut, options, gradient);
  const double factor = options.scale_gradient ? t * t : 1;
  if (factor != 1) out.value.mul_(factor);
  if (!gradient) return out;
  if (factor != t) out.gradient.mul_(factor / t);
  if (removed.defined()) out.gradient.masked_fill_(removed, 0);
  if (columns < student.size(-1)) out.gradient = at::constant_pad_nd(out.gradient, {0, student.size(-1) - columns});
  return out;
}

Tensor logit_loss(const LogitLoss& loss, const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) {
  if (!(options.temperature > 0)) throw std::logic_error("logit loss: temperature must be above 0");
  if (student.sizes().slice(0, student.dim() - 1) != teacher.sizes().slice(0, teacher.dim() - 1)) throw std::logic_error("logit loss: student and teacher hold different positions");
  Tensor s = student.reshape({-1, student.size(-1)}), t = teacher.detach().reshape({-1, teacher.size(-1)});
  if (options.mask.defined()) {
    const Tensor mask = options.mask.reshape({-1});
    if (mask.numel() != s.size(0)) throw std::logic_error("logit loss: the mask does not fit the positions");
    const Tensor valid = mask.nonzero().squeeze(-1);
    if (valid.numel() < s.size(0)) s = s.index_select(0, valid), t = t.index_select(0, valid);
  }
  if (s.size(0) == 0) return s.sum().to(losses_precision(student));  // an empty sum: 0, and zero gradient whatever the logits hold
  const double divisor = options.count > 0 ? options.count : static_cast<double>(s.size(0));
  return LossesFunction::apply(s, t, &loss, &options, divisor);
}

Tensor forward_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("forward_kl"), student, teacher, options); }
Tensor reverse_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("reverse_kl"), student, teacher, options); }
Tensor generalized_jsd(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("generalized_jsd"), student, teacher, options); }
Tensor skew_forward_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("skew_forward_kl"), student, teacher, options); }
Tensor skew_reverse_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("skew_reverse_kl"), student, teacher, options); }
Tensor adaptive_kl(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("adaptive_kl"), student, teacher, options); }
Tensor total_variation(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("total_variation"), student, teacher, options); }
Tensor logits_mse(const Tensor& student, const Tensor& teacher, const LogitLossOptions& options) { return logit_loss(*find_logit_loss("logits_mse"), student, teacher, options); }

}  // namespace kompakt
