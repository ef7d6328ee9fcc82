// Masks by magnitude and by Wanda's score.
#include "prune/masks.h"

#include <ATen/ATen.h>

#include <cmath>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

using at::Tensor;

// scores [N,K] -> mask. Groups are whole rows or runs of m columns.
Tensor masks_from_scores(const Tensor& scores, const SparsityPattern& pattern) {
  const std::int64_t columns = scores.size(1);
  check_pattern(pattern, columns);
  const std::int64_t width = pattern.grouped() ? pattern.m : columns;
  const std::int64_t keep = pattern.grouped() ? pattern.n : columns - static_cast<std::int64_t>(std::floor(pattern.sparsity * static_cast<double>(columns)));
  const Tensor groups = scores.reshape({-1, width});
  const Tensor order = std::get<1>(groups.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true)).narrow(1, 0, keep);
  return at::zeros_like(groups, at::kBool).scatter_(1, order, true).reshape(scores.sizes());
}

}  // namespace

Tensor magnitude_mask(const Tensor& weight, const SparsityPattern& pattern) { return masks_from_scores(weight.detach().abs(), pattern); }

Tensor wanda_mask(const Tensor& weight, const Tensor& input_square, const SparsityPattern& pattern) {
  if (input_square.numel() != weight.size(1)) throw std::logic_error("wanda_mask: one input statistic a column is needed");
  return masks_from_scores(weight.detach().abs() * input_square.to(weight.scalar_type()).sqrt().unsqueeze(0), pattern);
}

}  // namespace kompakt
