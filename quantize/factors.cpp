// The order of columns and the factor that all linears with the same input share.
#include "quantize/factors.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"

namespace kompakt {

ColumnOrder column_order(const at::Tensor& energy, std::int64_t group, bool act_order, bool inside_groups) {
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
    if (act_order && inside_groups) std::stable_sort(order.column.end() - (end - first), order.column.end(), [&](std::int64_t a, std::int64_t b) { return values[a] > values[b]; });
  }
  order.begin.push_back(columns);
  return order;
}

void factor_input(const LayerInput& input, std::int64_t group, const LayerOptions& options, InputFactors& factors) {
  at::NoGradGuard no_grad;
  const std::int64_t columns = input.weight.size(1);
  TORCH_CHECK(input.hessian.defined() && input.hessian.dim() == 2 && input.hessian.size(0) == columns && input.hessian.size(1) == columns, "gptq needs a [K,K] Hessian");
  at::Tensor hessian = input.hessian.detach().to(at::kCPU, options.float64 ? at::kDouble : at::kFloat).clone();
  if (!std::isfinite(hessian.sum(at::kDouble).item<double>())) throw Error("the calibration inputs of a layer are not finite").hint("an activation has overflowed: check the model on the calibration data");
  factors.dead = hessian.diagonal().le(0);
  factors.dead_count = factors.dead.sum().item<std::int64_t>();
  if (factors.dead_count > 0) hessian.diagonal().masked_fill_(factors.dead, 1);
  factors.order = column_order(hessian.diagonal(), group, options.act_order, !options.sparsity || !options.sparsity->grouped());
  const at::Tensor permutation = at::tensor(at::ArrayRef<std::int64_t>(factors.order.column), at::kLong);
  factors.factor = damped_inverse_factor(hessian.index_select(0, permutation).index_select(1, permutation), options.damping, options.float64);
  factors.group = group;
}

}  // namespace kompakt
