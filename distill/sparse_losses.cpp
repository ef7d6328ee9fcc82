// Losses on a partition of the vocabulary, and the correction of forward KL by draws from the rest.
#include "distill/sparse_losses.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <stdexcept>

#include "core/text.h"

namespace kompakt {
namespace {

using at::Tensor;

constexpr double sparse_masked = -1e30;
constexpr double sparse_largest_log_ratio = 20;  // its square is still a float32

// What the draws add to forward KL of the partition. r = (student / teacher within the rest) at the drawn tokens.
struct SparseCorrection {
  Tensor value;   // [n]
  Tensor weight;  // [n, N]: the estimated teacher probability at a drawn token is weight + the student's share of (rest - sum)
  Tensor sum;     // [n, 1]
};

// Estimate of the rest's p from draws j ~ p: with any factor a independent of the draws, a q~ + E[1_j (1 - a r_j)] = p~, because
// E_p[1_j r_j] = q~. a = E[r] / E[r^2] has least variance (1 when q = p, towards 0 when q is far); each half of the draws gives it
// for the other half, so that it is independent.
SparseCorrection sparse_correction(const Tensor& log_ratio, const Tensor& rest) {
  const std::int64_t count = log_ratio.size(1), half = count / 2;
  const Tensor log_r = log_ratio.clamp_max(sparse_largest_log_ratio), r = log_r.exp();
  const auto trust = [&](std::int64_t begin) {
    const Tensor part = r.narrow(1, begin, half);
    return (part.mean(1, true) / part.square().mean(1, true).clamp_min(1e-30)).clamp_max(1).expand({r.size(0), half});
  };
  const Tensor a = at::cat({trust(half), trust(0)}, 1);
  const Tensor share = rest / static_cast<double>(count);  // [n,1]
  SparseCorrection out;
  out.value = ((r - 1).mul_(a) - log_r).mul_(share).sum(1);
  out.weight = (1 - a * r).mul_(share);
  out.sum = out.weight.sum(1, true);
  return out;
}

}  // namespace

LogitSums evaluate_sparse_terms(std::span<const LogitTerm> terms, const Tensor& student, const SparseTargets& teacher, std::int64_t vocabulary, bool gradient) {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const std::int64_t columns = vocabulary > 0 ? vocabulary : student.size(-1), n = student.size(0), count = static_cast<std::int64_t>(terms.size());
  const std::int64_t known = teacher.ids.size(1), drawn = teacher.draws.defined() ? teacher.draws.size(1) : 0;
  if (drawn % 2 != 0) throw std::logic_error("sparse loss: an even number of draws is needed");
  const Tensor z = student.narrow(-1, 0, columns).to(type);
  const Tensor top = z.gather(1, teacher.ids);
  const bool whole = known >= columns;  // every token is known: there is no rest
  Tensor rest = whole ? Tensor() : z.scatter(1, teacher.ids, sparse_masked);
  const Tensor lse_rest = whole ? Tensor() : at::logsumexp(rest, 1, true);
  const LogitPair pair(whole ? top : at::cat({top, lse_rest}, 1), whole ? teacher.log_p.to(type) : at::cat({teacher.log_p.to(type), teacher.log_rest.to(type).unsqueeze(1)}, 1));
  SparseCorrection correction;
  if (drawn > 0 && !whole) correction = sparse_correction(z.gather(1, teacher.draws) - lse_rest - teacher.draw_log_p.to(type), pair.p().narrow(1, known, 1));

  LogitSums out{at::zeros({count + 2}, z.options().dtype(at::kDouble)), {}};
  Tensor coarse = at::zeros_like(pair.student());  // dL/d of the partition's logits
  double sampled = 0;                              // weight of the terms that use the draws
  for (std::int64_t i = 0; i < count; ++i) {
    const LogitTerm& term = terms[static_cast<std::size_t>(i)];
    if (!term.loss->partition || term.options.temperature != 1) throw std::logic_error(str("sparse loss: ", term.loss->name, " at temperature ", term.options.temperature, " needs all logits of the teacher"));
    const Divergence part = term.loss->evaluate(pair, term.options, gradient);
    out.values[i].copy_(part.value.sum(at::kDouble));
    if (gradient) coarse.add_(part.gradient, term.weight);
    if (!term.loss->linear_in_teacher || !correction.value.defined()) continue;
    out.values[i].add_(correction.value.sum(at::kDouble));
    sampled += term.weight;
  }
  out.values[count].copy_(pair.forward_kl().sum(at::kDouble));
  if (correction.value.defined()) out.values[count].add_(correction.value.sum(at::kDouble));
  out.values[count + 1].copy_(pair.reverse_kl().sum(at::kDouble));
  if (!gradient) return out;

  // A logit of the rest moves the rest's logsumexp by its share there.
  if (whole) {
    out.gradient = at::zeros({n, columns}, z.options());
  } else {
    Tensor to_rest = coarse.narrow(1, known, 1);
    if (sampled != 0) to_rest = to_rest + correction.sum * sampled;
    out.gradient = rest.sub_(lse_rest).exp_().mul_(to_rest);
    if (sampled != 0) out.gradient.scatter_add_(1, teacher.draws, correction.weight * -sampled);
  }
  out.gradient.scatter_(1, teacher.ids, coarse.narrow(1, 0, known));
  if (columns < student.size(-1)) out.gradient = at::constant_pad_nd(out.gradient, {0, student.size(-1) - columns});
  return out;
}

}  // namespace kompakt
