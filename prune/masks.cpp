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

std::string SparsityPattern::text() const { return grouped() ? str(n, ":", m) : shortest(sparsity); }

std::optional<SparsityPattern> parse_pattern(std::string_view text) {
  const std::vector<std::string> parts = split(text, ':');
  if (parts.size() != 2) return std::nullopt;
  const std::optional<std::int64_t> n = parse_int(parts[0]), m = parse_int(parts[1]);
  if (!n || !m || *m < 1) return std::nullopt;
  return SparsityPattern{0, *n, *m};
}

void check_pattern(const SparsityPattern& pattern, std::int64_t columns) {
  if (!pattern.grouped()) {
    if (!(pattern.sparsity >= 0 && pattern.sparsity < 1)) throw Error("the sparsity leaves nothing").given(shortest(pattern.sparsity)).allowed("0 to less than 1");
    return;
  }
  if (pattern.n < 1 || pattern.n > pattern.m) throw Error(str("the pattern ", pattern.text(), " keeps no valid number of weights")).given(pattern.text()).allowed(str("1:", pattern.m, " to ", pattern.m, ":", pattern.m));
  if (columns % pattern.m == 0) return;
  // The nearest group size that divides, with the nearest share of weights kept.
  std::int64_t nearest = 0;
  for (std::int64_t m = 2; m <= 2 * pattern.m; ++m)
    if (columns % m == 0 && (nearest == 0 || std::abs(m - pattern.m) < std::abs(nearest - pattern.m))) nearest = m;
  Error error(str("a row of ", columns, " weights does not divide into groups of ", pattern.m));
  error.given(pattern.text()).hint("leave this matrix dense with skip, or choose another pattern");
  if (nearest > 0) {
    const double kept = static_cast<double>(pattern.n) / static_cast<double>(pattern.m) * static_cast<double>(nearest);
    error.allowed(str("nearest: ", std::max<std::int64_t>(1, std::llround(kept)), ":", nearest));
  }
  throw error;
}

Tensor magnitude_mask(const Tensor& weight, const SparsityPattern& pattern) { return masks_from_scores(weight.detach().abs(), pattern); }

Tensor wanda_mask(const Tensor& weight, const Tensor& input_square, const SparsityPattern& pattern) {
  if (input_square.numel() != weight.size(1)) throw std::logic_error("wanda_mask: one input statistic a column is needed");
  return masks_from_scores(weight.detach().abs() * input_square.to(weight.scalar_type()).sqrt().unsqueeze(0), pattern);
}

}  // namespace kompakt
