#include "quantize/budget_probe.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "model/families.h"

namespace kompakt {
namespace {

const Linear& probe_head(const Transformer& model) { return model.config().family->encoder ? model.classifier : model.lm_head; }

at::Tensor probe_weight(const Transformer& model) {
  const Linear& head = probe_head(model);
  return (head.weight.defined() ? head.effective_weight() : model.tokens.effective_weight()).detach();
}

}  // namespace

BudgetProbe::BudgetProbe(const Transformer& model, const CalibrationSet& set) : set_(set) {
  const at::NoGradGuard no_grad;
  before_ = features(model);
  weight_ = probe_weight(model);  // stages replace weights and do not write into them
  if (probe_head(model).bias.defined()) bias_ = probe_head(model).bias.detach().clone();
}

std::vector<at::Tensor> BudgetProbe::features(const Transformer& model) const {
  std::vector<at::Tensor> out;
  for (std::size_t b = 0; b < set_.inputs.size(); ++b) {
    at::Tensor x = model.hidden(set_.inputs[b]);
    if (model.config().family->encoder) {
      out.push_back(model.pooled(x, set_.inputs[b]));
      continue;
    }
    x = x.reshape({-1, x.size(-1)});
    out.push_back(set_.valid[b].defined() ? x.index_select(0, set_.valid[b]) : x);
  }
  return out;
}

double BudgetProbe::divergence(const Transformer& model, const at::Tensor& rows_kept) const {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> now = features(model);
  at::Tensor weight = probe_weight(model), bias = probe_head(model).bias;
  if (rows_kept.defined()) {
    weight = weight.index_select(0, rows_kept);
    if (bias.defined()) bias = bias.index_select(0, rows_kept);
  }
  constexpr std::int64_t rows = 128;  // logits of few tokens at a time
  double sum = 0;
  std::int64_t count = 0;
  for (std::size_t b = 0; b < now.size(); ++b)
    for (std::int64_t first = 0; first < now[b].size(0); first += rows) {
      at::Tensor p = at::log_softmax(at::linear(before_[b].slice(0, first, first + rows), weight_, bias_), -1);
      const at::Tensor q = at::log_softmax(at::linear(now[b].slice(0, first, first + rows), weight, bias), -1);
      if (rows_kept.defined()) {
        p = p.index_select(1, rows_kept);
        const at::Tensor mass = at::logsumexp(p, {1}, /*keepdim=*/true);
        sum -= mass.sum(at::kDouble).item<double>();
        p = p - mass;
      }
      sum += (p.exp() * (p - q)).sum(-1).to(at::kDouble).sum().item<double>();
      count += p.size(0);
    }
  return count > 0 ? sum / static_cast<double>(count) : 0;
}

}  // namespace kompakt
