// Factorizations in the metric of the inputs.
#include "quantize/factors.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "model/parallel.h"

namespace kompakt {
namespace {

at::Tensor factors_damped(const at::Tensor& hessian, double damping) {
  at::Tensor damped = hessian.clone();
  damped.diagonal().add_(damping * hessian.diagonal().mean().item<double>());
  return damped;
}

// Damping is raised tenfold up to three times, then float64 is tried, then only the diagonal is used.
InverseFactor factors_inverse(const at::Tensor& hessian, const LayerOptions& options) {
  InverseFactor factor;
  std::vector<std::pair<double, bool>> ladder;
  for (const double raise : {1.0, 10.0, 100.0}) ladder.emplace_back(std::max(options.damping, raise > 1 ? 1e-4 : 0.0) * raise, options.float64);
  if (!options.float64)
    for (const double raise : {1.0, 100.0}) ladder.emplace_back(std::max(options.damping, raise > 1 ? 1e-4 : 0.0) * raise, true);
  for (std::size_t i = 0; i < ladder.size(); ++i) {
    const auto [damping, wide] = ladder[i];
    const at::Tensor upper = inverse_factor(factors_damped(hessian, damping).to(wide ? at::kDouble : at::kFloat));
    if (!upper.defined()) continue;
    factor.upper = upper, factor.damping = damping;
    factor.path = wide ? "cholesky float64" : "cholesky";
    if (i > 0) factor.path += damping > options.damping ? ", damping raised" : ", float32 failed";
    factor.diagonal = upper.diagonal().contiguous();
    return factor;
  }
  factor.damping = options.damping;
  factor.path = "diagonal";
  factor.diagonal = factors_damped(hessian, options.damping).diagonal().clamp_min(1e-30).rsqrt().contiguous();
  return factor;
}

// Inverse of an upper triangular matrix by halves, so that nearly all of its work are matrix products.
at::Tensor factors_inverted(const at::Tensor& upper) {
  const std::int64_t n = upper.size(0), half = n / 2;
  if (n <= 128) return at::linalg_solve_triangular(upper, at::eye(n, upper.options()), /*upper=*/true).triu();
  const at::Tensor first = factors_inverted(upper.slice(0, 0, half).slice(1, 0, half)), second = factors_inverted(upper.slice(0, half).slice(1, half));
  at::Tensor out = at::zeros_like(upper);
  out.slice(0, 0, half).slice(1, 0, half).copy_(first);
  out.slice(0, half).slice(1, half).copy_(second);
  out.slice(0, 0, half).slice(1, half).copy_(at::matmul(at::matmul(first, upper.slice(0, 0, half).slice(1, half)), second).neg_());
  return out;
}

}  // namespace

SingleThread::SingleThread() : before_(at::get_num_threads()) {
  if (before_ != 1) at::set_num_threads(1);
}
SingleThread::~SingleThread() {
  if (before_ != 1) at::set_num_threads(before_);
}

ColumnOrder column_order(const at::Tensor& energy, std::int64_t group, bool act_order) {
  const at::Tensor e = energy.to(at::kCPU, at::kDouble).contiguous();
  const double* values = e.data_ptr<double>();
  const std::int64_t columns = e.size(0), groups = (columns + group - 1) / group;
  ColumnOrder order;
  order.group.resize(static_cast<std::size_t>(groups));
  std::iota(order.group.begin(), order.group.end(), 0);
  if (act_order) {
    std::vector<double> largest(static_cast<std::size_t>(groups), 0);
    for (std::int64_t k = 0; k < columns; ++k) largest[static_cast<std::size_t>(k / group)] = std::max(largest[static_cast<std::size_t>(k / group)], values[k]);
    std::stable_sort(order.group.begin(), order.group.end(), [&](std::int64_t a, std::int64_t b) { return largest[static_cast<std::size_t>(a)] > largest[static_cast<std::size_t>(b)]; });
  }
  for (const std::int64_t g : order.group) {
    order.begin.push_back(static_cast<std::int64_t>(order.column.size()));
    const std::int64_t first = g * group, end = std::min(columns, first + group);
    for (std::int64_t k = first; k < end; ++k) order.column.push_back(k);
    if (act_order) std::stable_sort(order.column.end() - (end - first), order.column.end(), [&](std::int64_t a, std::int64_t b) { return values[a] > values[b]; });
  }
  order.begin.push_back(columns);
  return order;
}

at::Tensor inverse_factor(const at::Tensor& hessian) {
  const SingleThread single;
  // With J the reversal of order: J H J = L L^T, so H = M M^T with M = J L J upper triangular, and H^-1 = U^T U with U = M^-1.
  // One factorization and one triangular inverse, no inverse of H.
  const at::Tensor reversed = hessian.flip({0, 1}).contiguous();
  const auto [lower, info] = at::linalg_cholesky_ex(reversed);
  if (info.item<int>() != 0) return {};
  const at::Tensor middle = lower.flip({0, 1}).contiguous();
  const at::Tensor upper = factors_inverted(middle);
  if (!upper.isfinite().all().item<bool>() || upper.diagonal().min().item<double>() <= 0) return {};
  return upper.contiguous();
}

void factor_input(const LayerInput& input, std::int64_t group, const LayerOptions& options, InputFactors& factors) {
  at::NoGradGuard no_grad;
  const std::int64_t columns = input.weight.size(1);
  TORCH_CHECK(input.hessian.defined() && input.hessian.dim() == 2 && input.hessian.size(0) == columns && input.hessian.size(1) == columns, "gptq needs a [K,K] Hessian");
  at::Tensor hessian = input.hessian.detach().to(at::kCPU, options.float64 ? at::kDouble : at::kFloat).clone();
  if (!hessian.isfinite().all().item<bool>()) throw Error("the calibration inputs of a layer are not finite").hint("an activation has overflowed: check the model on the calibration data");
  factors.dead = hessian.diagonal().le(0);
  factors.dead_count = factors.dead.sum().item<std::int64_t>();
  if (factors.dead_count > 0) hessian.diagonal().masked_fill_(factors.dead, 1);
  factors.order = column_order(hessian.diagonal(), group, options.act_order);
  const at::Tensor permutation = at::tensor(at::ArrayRef<std::int64_t>(factors.order.column), at::kLong);
  factors.factor = factors_inverse(hessian.index_select(0, permutation).index_select(1, permutation), options);
  factors.group = group;
}

}  // namespace kompakt
