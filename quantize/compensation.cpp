#include "quantize/compensation.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "model/parallel.h"
#include "train/inverse_factor.h"

namespace kompakt {
namespace {

// The upper triangle U with H^-1 = U^T U of the damped moments; undefined when they are not positive.
at::Tensor compensation_factor(const at::Tensor& moments, double damping) {
  const double mean = moments.diagonal().mean().item<double>();
  if (!(mean > 0)) return {};
  at::Tensor damped = moments.clone();
  damped.diagonal().add_(std::max(damping, 1e-4) * mean);
  return inverse_factor(damped);
}

// sum_k (U H U^T)_kk / U_kk^2 over tr H.
double compensation_under(const at::Tensor& upper, const at::Tensor& moments) {
  const at::Tensor weights = upper.diagonal().square().reciprocal();
  return ((at::matmul(upper, moments) * upper).sum(1) * weights).sum().item<double>() / moments.diagonal().sum().item<double>();
}

}  // namespace

double compensation_ratio(const at::Tensor& inputs, double damping) {
  const at::NoGradGuard no_grad;
  const SingleThread single;
  const std::int64_t rows = inputs.size(0), half = rows / 2;
  if (rows < 16) return 1;
  const auto moments = [&](std::int64_t first, std::int64_t end) {
    const at::Tensor x = inputs.slice(0, first, end);
    return at::Tensor(at::matmul(x.t(), x).to(at::kDouble) / static_cast<double>(end - first));
  };
  const at::Tensor first = moments(0, half), second = moments(half, rows), all = 0.5 * (first + second);
  const at::Tensor seen = compensation_factor(all, damping), apart = compensation_factor(first, damping);
  if (!seen.defined() || !apart.defined()) return 1;
  const double ratio = std::sqrt(compensation_under(seen, all) * std::min(1.0, compensation_under(apart, second)));
  return std::isfinite(ratio) ? std::clamp(ratio, 1e-4, 1.0) : 1;
}

}  // namespace kompakt
